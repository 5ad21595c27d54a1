"""ERNIE-Image's transformer rewritten: blocks.py in plain torch, kernels.py on fused kernels, positions.py for both."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers hold the two modules to what a rewritten model must offer
    from ernie_accel.models.ernie_image import blocks, kernels
    from ernie_accel.models.rewritten import KernelModel, RewrittenModel

    _BLOCKS: RewrittenModel = blocks
    _KERNELS: KernelModel = kernels
