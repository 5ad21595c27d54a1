"""Language models of transformers: how their architectures differ, and their parts as a type checker sees them.

Transformers' own classes come without types. The classes below are never made; they say which attributes are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Config(Protocol):
    """``Ministral3Config``, ``Qwen3Config``, ``Gemma2Config`` or ``Gemma3TextConfig``."""

    rope_parameters: Mapping[str, Any]
    sliding_window: int | None
    num_hidden_layers: int
    max_position_embeddings: int
    hidden_act: str
    layer_types: Sequence[str]


class GenerationConfig(Protocol):
    """How text is sampled where a call does not say it."""

    top_k: int | None


class Norm(nn.Module):
    """``Ministral3RMSNorm`` and the like."""

    weight: nn.Parameter
    variance_epsilon: float
    eps: float  # Gemma's name of it


class Attention(nn.Module):
    """``Ministral3Attention`` and the like."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: Norm  # with norms per head
    k_norm: Norm
    head_dim: int
    scaling: float
    sliding_window: int | None
    attn_logit_softcapping: float | None


class Mlp(nn.Module):
    """``Ministral3MLP`` and the like."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """``Ministral3DecoderLayer`` and the like."""

    self_attn: Attention
    mlp: Mlp
    input_layernorm: Norm
    post_attention_layernorm: Norm


class LanguageModel(nn.Module):
    """``Ministral3Model`` and the like."""

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


@dataclass(frozen=True)
class Architecture:
    """How a language model differs from a plain one: pre-norms, rotary embedding, causal attention, a gated MLP.

    Attributes:
        model: Class name of the model.
        prefix: What the class names of its layers and of their parts begin with.
        epsilon: Attribute of a norm with what it adds to the mean square.
        has_unit_offset: A norm multiplies by 1 + weight, in float32, and rounds once (Gemma).
        has_head_norms: Queries and keys are normed per head before they are rotated.
        before_mlp: Attribute of a layer with the norm before its MLP.
        after_attention: That of the norm of the attention's result, before it is added (a sandwich norm); None: none.
        after_mlp: Likewise of the MLP's result.
        has_soft_caps: Attention scores are capped by ``attn_logit_softcapping``, if that is set.
        has_layer_types: Layers of each type in ``config.layer_types`` have a rotary embedding of their own.
        has_windows: A layer with a ``sliding_window`` sees no more than so many tokens.
        scales_queries: Queries grow with their position, by the ``llama_4_scaling_beta`` of ``rope_parameters``.
        scaled_embedding: Class name of its embedding, where that multiplies: releases in which the model did so itself
            have another one. None where nothing multiplies.
    """

    model: str
    prefix: str
    epsilon: str = "variance_epsilon"
    has_unit_offset: bool = False
    has_head_norms: bool = False
    before_mlp: str = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    has_soft_caps: bool = False
    has_layer_types: bool = False
    has_windows: bool = False
    scales_queries: bool = False
    scaled_embedding: str | None = None

    @property
    def norms(self) -> tuple[str, ...]:
        """Attributes of a layer with its norms."""
        names = ("input_layernorm", self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in names if name is not None)


MINISTRAL3 = Architecture("Ministral3Model", "Ministral3", scales_queries=True)
QWEN3 = Architecture("Qwen3Model", "Qwen3", has_head_norms=True, has_windows=True)
GEMMA2 = Architecture(
    "Gemma2Model",
    "Gemma2",
    epsilon="eps",
    has_unit_offset=True,
    before_mlp="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
    has_soft_caps=True,
    has_windows=True,
    scaled_embedding="Gemma2TextScaledWordEmbedding",
)
GEMMA3 = Architecture(
    "Gemma3TextModel",
    "Gemma3",
    epsilon="eps",
    has_unit_offset=True,
    has_head_norms=True,
    before_mlp="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
    has_layer_types=True,
    has_windows=True,
    scaled_embedding="Gemma3TextScaledWordEmbedding",
)
ARCHITECTURES = (MINISTRAL3, QWEN3, GEMMA2, GEMMA3)


def architecture_of(model: nn.Module) -> Architecture | None:
    """Return the architecture of a language model by the name of its class; None if it is not known here."""
    return next((known for known in ARCHITECTURES if known.model == type(model).__name__), None)
