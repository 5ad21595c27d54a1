"""The rewritten Z-Image blocks on the fused kernels; `FuseKernels` installs them."""

from __future__ import annotations

from ernie_accel.models.next_dit.kernels import KernelNextBlock
from ernie_accel.models.on_kernels import KernelFamily
from ernie_accel.models.z_image.blocks import BLOCKS, RewrittenZImageBlock


class KernelZImageBlock(KernelNextBlock, RewrittenZImageBlock):
    """A `RewrittenZImageBlock` on the kernels."""


KERNELS = KernelFamily(BLOCKS, RewrittenZImageBlock.names.attention, RewrittenZImageBlock, KernelZImageBlock)
