"""NewBie-image's transformer as its authors' own code has it, which comes with the checkpoint (remote code).

blocks.py rewrites it in plain torch, and kernels.py puts it on fused kernels. As diffusers runs the same weights, see
lumina/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers hold the two to what a rewritten model must offer
    from ernie_accel.models.newbie import blocks, kernels
    from ernie_accel.models.rewritten import KernelModel, RewrittenModel

    _BLOCKS: RewrittenModel = blocks
    _KERNELS: KernelModel = kernels.KERNELS
