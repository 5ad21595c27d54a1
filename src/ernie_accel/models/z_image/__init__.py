"""Z-Image's transformer: rewritten in plain torch (blocks.py) and on fused kernels (kernels.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers hold the two to what a rewritten model must offer
    from ernie_accel.models.rewritten import KernelModel, RewrittenModel
    from ernie_accel.models.z_image import blocks, kernels

    _BLOCKS: RewrittenModel = blocks
    _KERNELS: KernelModel = kernels.KERNELS
