"""The rewritten Lumina 2 blocks on the fused kernels; `FuseKernels` installs them."""

from __future__ import annotations

from ernie_accel.models.lumina.blocks import BLOCKS, RewrittenLuminaBlock
from ernie_accel.models.next_dit.kernels import KernelNextBlock
from ernie_accel.models.on_kernels import KernelFamily


class KernelLuminaBlock(KernelNextBlock, RewrittenLuminaBlock):
    """A `RewrittenLuminaBlock` on the kernels."""


KERNELS = KernelFamily(BLOCKS, RewrittenLuminaBlock.names.attention, RewrittenLuminaBlock, KernelLuminaBlock)
