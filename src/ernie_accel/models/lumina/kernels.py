"""The rewritten Lumina 2 blocks on the fused kernels; `FuseKernels` installs them."""

from __future__ import annotations

from torch import nn

from ernie_accel.core.undo import Undo
from ernie_accel.models import on_kernels
from ernie_accel.models.lumina.blocks import BLOCKS, RewrittenLuminaBlock
from ernie_accel.models.next_dit.kernels import KernelNextBlock
from ernie_accel.models.on_kernels import TOKENS_MULTIPLE_OF

__all__ = ["TOKENS_MULTIPLE_OF", "KernelLuminaBlock", "calls_cudnn", "install", "is_installed", "is_left_open"]


class KernelLuminaBlock(KernelNextBlock, RewrittenLuminaBlock):
    """A `RewrittenLuminaBlock` on the kernels."""


def is_left_open(transformer: nn.Module) -> bool:
    """Return whether nobody has chosen an attention backend for any block, stock or not, or by diffusers' defaults."""
    return on_kernels.is_left_open(transformer, BLOCKS, RewrittenLuminaBlock.names.attention)


def calls_cudnn(transformer: nn.Module) -> bool:
    """Return whether all blocks call cuDNN's attention themselves now."""
    return on_kernels.calls_cudnn(transformer, BLOCKS)


def is_installed(transformer: nn.Module) -> bool:
    """Return whether `install` has been here."""
    return on_kernels.is_installed(transformer, BLOCKS)


def install(transformer: nn.Module, undo: Undo, attention: str | None = None) -> dict[str, str]:
    """Put the rewritten blocks of `transformer` on the kernels in place; return what could not be: path -> reason.

    `attention` is `KernelBlock.attends_in`.
    """
    return on_kernels.install(transformer, BLOCKS, RewrittenLuminaBlock, KernelLuminaBlock, undo, attention)
