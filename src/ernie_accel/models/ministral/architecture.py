"""Transformers' Ministral 3 as a type checker sees it: transformers' own classes come without types.

These classes are never made; they say which attributes are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Config(Protocol):
    """``Ministral3Config``."""

    rope_parameters: Mapping[str, Any]
    sliding_window: int | None
    num_hidden_layers: int
    max_position_embeddings: int
    hidden_act: str


class GenerationConfig(Protocol):
    """How text is sampled where a call does not say it."""

    top_k: int | None


class Norm(nn.Module):
    """``Ministral3RMSNorm``."""

    weight: nn.Parameter
    variance_epsilon: float


class Attention(nn.Module):
    """``Ministral3Attention``."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    scaling: float


class Mlp(nn.Module):
    """``Ministral3MLP``."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """``Ministral3DecoderLayer``."""

    self_attn: Attention
    mlp: Mlp
    input_layernorm: Norm
    post_attention_layernorm: Norm


class LanguageModel(nn.Module):
    """``Ministral3Model``."""

    config: Config
    layers: Sequence[Layer]
    norm: Norm
    embed_tokens: nn.Embedding
    rotary_emb: nn.Module


class CausalLanguageModel(nn.Module):
    """``Ministral3ForCausalLM``."""

    config: Config
    generation_config: GenerationConfig
    model: LanguageModel
    lm_head: nn.Linear
