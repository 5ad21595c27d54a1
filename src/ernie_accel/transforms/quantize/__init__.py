"""Store linear layers in fewer bits and, where the hardware can, multiply in them. One backend a file."""

from __future__ import annotations

from ernie_accel.transforms.quantize.quantize import Quantize

__all__ = ["Quantize"]
