"""Lumina 2's transformer, on which NewBie-image runs.

blocks.py rewrites it in plain torch, kernels.py puts it on fused kernels, and attention.py lets the stock blocks run
through diffusers' attention dispatcher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers hold the two to what a rewritten model must offer
    from ernie_accel.models.lumina import blocks, kernels
    from ernie_accel.models.rewritten import KernelModel, RewrittenModel

    _BLOCKS: RewrittenModel = blocks
    _KERNELS: KernelModel = kernels.KERNELS
