"""The layers of a Ministral-like language model, the same for writing with a cache and for encoding a prompt.

Shapes in names: b rows, t tokens, h hidden size, n heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.models.ministral.architecture import Config, Layer, Norm

#: Attends with the queries, keys and values of the same tokens: (q_bntd, k_bntd, v_bntd, scale) -> out_bntd.
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Rotary:
    """What depends on the positions of tokens.

    Attributes:
        cos_bt1d: Rotary cosines.
        signed_sin_bt1d: Sines, the first half of them negative; see `signed`.
        q_scale_bt11: Factor of the queries, or None where it is 1 at all of them.
    """

    cos_bt1d: Tensor
    signed_sin_bt1d: Tensor
    q_scale_bt11: Tensor | None


def unsupported_config_reasons(config: Config) -> list[str]:
    """Return why a model with this ``Ministral3Config`` does not compute what these layers do; empty if it does."""
    reasons = []
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        reasons.append("its rotary embedding changes with the length of the text")
    if config.sliding_window is not None:
        reasons.append(f"its attention slides over {config.sliding_window} tokens")
    return reasons


def call(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a module gives for `x`."""
    out: Tensor = module(x)
    return out


def rms_norm(norm: Norm, x: Tensor) -> Tensor:
    """Return what a ``Ministral3RMSNorm`` gives, in one launch instead of eight.

    It rounds once where the module rounds twice: in bfloat16 it is 0.0017 from the exact result, the module 0.0023
    (relative L2 at hidden size 3072, on a CPU); in float32 they agree.
    """
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def signed(sin: Tensor) -> Tensor:
    """Return sines of which `rotate` needs no negative of its input."""
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)


def run_layer(
    layer: Layer,
    x_bth: Tensor,
    at: Rotary,
    attend: Attend,
    project: Callable[[nn.Linear, Tensor], Tensor] = call,
    normalize: Callable[[Norm, Tensor], Tensor] = call,
) -> Tensor:
    """Return what a ``Ministral3DecoderLayer`` gives.

    Args:
        layer: Its weights.
        x_bth: Hidden states.
        at: Positions of the tokens.
        attend: Looks at what the tokens may see.
        project: (linear layer, input) -> output.
        normalize: (norm, input) -> output.
    """
    attention, mlp = layer.self_attn, layer.mlp
    y_bth = normalize(layer.input_layernorm, x_bth)
    heads = (*y_bth.shape[:2], -1, attention.head_dim)
    q_btnd = project(attention.q_proj, y_bth).view(heads)
    k_btnd = project(attention.k_proj, y_bth).view(heads)
    v_btnd = project(attention.v_proj, y_bth).view(heads)
    both_btnd = rotate(torch.cat((q_btnd, k_btnd), 2), at)  # together: half the launches
    q_btnd, k_btnd = both_btnd.tensor_split((q_btnd.shape[2],), 2)
    if at.q_scale_bt11 is not None:
        q_btnd = q_btnd * at.q_scale_bt11
    out_bntd = attend(q_btnd.transpose(1, 2), k_btnd.transpose(1, 2), v_btnd.transpose(1, 2), attention.scaling)
    x_bth = x_bth + project(attention.o_proj, out_bntd.transpose(1, 2).flatten(2))
    y_bth = normalize(layer.post_attention_layernorm, x_bth)
    active_bth = mlp.act_fn(project(mlp.gate_proj, y_bth)) * project(mlp.up_proj, y_bth)
    return x_bth + project(mlp.down_proj, active_bth)


def rotate(x_btnd: Tensor, at: Rotary) -> Tensor:
    """Return rotated queries or keys: the bits of x cos + (-second, first) sin, with one launch less."""
    return x_btnd * at.cos_bt1d + x_btnd.roll(x_btnd.shape[-1] // 2, -1) * at.signed_sin_bt1d


def linears_of(layer: Layer) -> Iterator[nn.Linear]:
    """Yield the linear layers of a ``Ministral3DecoderLayer``."""
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def pass_on(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    """Stand in for the forward of a layer whose result nothing uses.

    The layer itself has to stay: without it, ``hidden_states[-2]`` would silently be another layer's.
    """
    return hidden_states
