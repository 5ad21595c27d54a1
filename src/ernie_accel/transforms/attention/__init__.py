"""Attention: which mask reaches the blocks, in which shape, and which kernel computes it."""

from __future__ import annotations

from ernie_accel.transforms.attention.elide_mask import ElideMask
from ernie_accel.transforms.attention.expand_mask import ExpandAttentionMask
from ernie_accel.transforms.attention.set_attention import SetAttention

__all__ = ["ElideMask", "ExpandAttentionMask", "SetAttention"]
