"""The rewritten blocks of NewBie-image's own code on the fused kernels; `FuseKernels` installs them."""

from __future__ import annotations

from ernie_accel.models.newbie.blocks import BLOCKS, RewrittenNewbieBlock
from ernie_accel.models.next_dit.kernels import KernelNextBlock
from ernie_accel.models.on_kernels import KernelFamily


class KernelNewbieBlock(KernelNextBlock, RewrittenNewbieBlock):
    """A `RewrittenNewbieBlock` on the kernels."""


KERNELS = KernelFamily(BLOCKS, RewrittenNewbieBlock.names.attention, RewrittenNewbieBlock, KernelNewbieBlock)
