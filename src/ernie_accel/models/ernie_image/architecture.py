"""Diffusers' ERNIE-Image transformer as a type checker sees it: diffusers' own classes come without types.

These classes are never made; `transformer_of` and `attention_of` say that a module is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from torch import nn


class Config(Protocol):
    """The settings that are read."""

    rope_axes_dim: Sequence[int]


class FinalNorm(nn.Module):
    """``ErnieImageAdaLNContinuous``."""

    norm: nn.Module
    linear: nn.Module


class Processor(Protocol):
    """An attention processor that goes through diffusers' dispatcher."""

    _attention_backend: object


class Attention(nn.Module):
    """The attention of a block, stock or rewritten."""

    heads: int
    processor: Processor


class ErnieTransformer(nn.Module):
    """``ErnieImageTransformer2DModel``."""

    config: Config
    patch_size: int
    out_channels: int
    head_dim: int
    gradient_checkpointing: bool
    x_embedder: nn.Module
    text_proj: nn.Module | None
    pos_embed: nn.Module
    time_proj: nn.Module
    time_embedding: nn.Module
    adaLN_modulation: nn.Module
    layers: nn.ModuleList
    final_norm: FinalNorm
    final_linear: nn.Module
    _repeated_blocks: list[str]


def transformer_of(module: nn.Module) -> ErnieTransformer:
    """Return `module` as what it is."""
    return cast(ErnieTransformer, module)


def attention_of(block: nn.Module) -> Attention:
    """Return the attention of a block, stock or rewritten."""
    return cast(Attention, block.get_submodule("self_attention"))
