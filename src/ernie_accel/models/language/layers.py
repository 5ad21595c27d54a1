"""One layer of a language model, the same for writing with a cache and for encoding a prompt.

Shapes in names: b rows, t tokens, h hidden size, n heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.common.language import said
from ernie_accel.models.language.architecture import MINISTRAL3, Architecture, Config, Layer, Norm

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


def unsupported_config_reasons(config: Config, architecture: Architecture = MINISTRAL3) -> list[str]:
    """Return why a model with this configuration does not compute what these layers do; empty if it does."""
    reasons = []
    settings: Any = config.rope_parameters
    of_types = settings.values() if architecture.has_layer_types else (settings,)
    if any(each is not None and each["rope_type"] in ("dynamic", "longrope") for each in of_types):
        reasons.append(said("its rotary embedding changes with the length of the text"))
    if config.sliding_window is not None and not architecture.has_windows:
        reasons.append(said("its attention slides over {sliding_window} tokens", sliding_window=config.sliding_window))
    if getattr(config, "use_bidirectional_attention", None):
        reasons.append(said("its attention looks ahead, too"))
    return reasons


def call(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a module gives for `x`."""
    out: Tensor = module(x)
    return out


def rms_norm(norm: Norm, x: Tensor, architecture: Architecture = MINISTRAL3) -> Tensor:
    """Return what a norm of this architecture gives, in fewer launches: one instead of eight for Ministral and Qwen.

    That one rounds once where the module rounds twice: in bfloat16 it is 0.0017 from the exact result, the module
    0.0023 (relative L2 at hidden size 3072, on a CPU); in float32 they agree.
    """
    epsilon: float = getattr(norm, architecture.epsilon)
    if architecture.has_unit_offset:  # 1 + weight in bfloat16 would lose most of a small weight
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + norm.weight.float(), epsilon).type_as(x)
    return F.rms_norm(x, x.shape[-1:], norm.weight, epsilon)


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
    architecture: Architecture = MINISTRAL3,
) -> Tensor:
    """Return what a decoder layer gives.

    Args:
        layer: Its weights.
        x_bth: Hidden states.
        at: Positions of the tokens.
        attend: Looks at what the tokens may see.
        project: (linear layer, input) -> output.
        normalize: (norm, input) -> output.
        architecture: Which norms it has.
    """
    attention, mlp = layer.self_attn, layer.mlp
    y_bth = normalize(layer.input_layernorm, x_bth)
    heads = (*y_bth.shape[:2], -1, attention.head_dim)
    q_btnd = project(attention.q_proj, y_bth).view(heads)
    k_btnd = project(attention.k_proj, y_bth).view(heads)
    v_btnd = project(attention.v_proj, y_bth).view(heads)
    if architecture.has_head_norms:
        q_btnd, k_btnd = normalize(attention.q_norm, q_btnd), normalize(attention.k_norm, k_btnd)
    both_btnd = rotate(torch.cat((q_btnd, k_btnd), 2), at)  # together: half the launches
    q_btnd, k_btnd = both_btnd.tensor_split((q_btnd.shape[2],), 2)
    if at.q_scale_bt11 is not None:
        q_btnd = q_btnd * at.q_scale_bt11
    out_bntd = attend(q_btnd.transpose(1, 2), k_btnd.transpose(1, 2), v_btnd.transpose(1, 2), attention.scaling)
    out_bth = project(attention.o_proj, out_bntd.transpose(1, 2).flatten(2))
    if architecture.after_attention is not None:
        out_bth = normalize(getattr(layer, architecture.after_attention), out_bth)
    x_bth = x_bth + out_bth
    y_bth = normalize(getattr(layer, architecture.before_mlp), x_bth)
    active_bth = mlp.act_fn(project(mlp.gate_proj, y_bth)) * project(mlp.up_proj, y_bth)
    out_bth = project(mlp.down_proj, active_bth)
    if architecture.after_mlp is not None:
        out_bth = normalize(getattr(layer, architecture.after_mlp), out_bth)
    return x_bth + out_bth


def rotate(x_btnd: Tensor, at: Rotary) -> Tensor:
    """Return rotated queries or keys: the bits of x cos + (-second, first) sin, with one launch less."""
    return x_btnd * at.cos_bt1d + x_btnd.roll(x_btnd.shape[-1] // 2, -1) * at.signed_sin_bt1d


def attend_causally(
    q_bntd: Tensor,
    k_bntd: Tensor,
    v_bntd: Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Return causal attention.

    Args:
        q_bntd: Queries.
        k_bntd: Keys; a head may serve several of the queries'.
        v_bntd: Values.
        scale: Of the scores.
        window: How many tokens a token sees at most, itself included; None for all.
        soft_cap: What the tanh of the scores is scaled to, which no fused kernel of torch does; None for no cap.
    """
    tokens = q_bntd.shape[2]
    if window is not None and tokens <= window:
        window = None
    if soft_cap is None and window is None:
        return F.scaled_dot_product_attention(q_bntd, k_bntd, v_bntd, is_causal=True, scale=scale, enable_gqa=True)
    position_t = torch.arange(tokens, device=q_bntd.device)
    distance_tt = position_t[:, None] - position_t
    visible_tt = distance_tt >= 0
    if window is not None:
        visible_tt = visible_tt & (distance_tt < window)
    if soft_cap is None:
        return F.scaled_dot_product_attention(
            q_bntd, k_bntd, v_bntd, attn_mask=visible_tt, scale=scale, enable_gqa=True
        )
    groups = q_bntd.shape[1] // k_bntd.shape[1]
    k_bntd, v_bntd = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (k_bntd, v_bntd))
    scores_bntt = torch.tanh(q_bntd @ k_bntd.transpose(2, 3) * scale / soft_cap) * soft_cap
    scores_bntt = scores_bntt.masked_fill(~visible_tt, torch.finfo(scores_bntt.dtype).min)
    return scores_bntt.softmax(-1, dtype=torch.float32).to(q_bntd.dtype) @ v_bntd


def linears_of(layer: Layer) -> Iterator[nn.Linear]:
    """Yield the linear layers of a decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def norms_of(layer: Layer, architecture: Architecture) -> Iterator[Norm]:
    """Yield the norms of a decoder layer."""
    yield from (getattr(layer, name) for name in architecture.norms)
    if architecture.has_head_norms:
        yield from (layer.self_attn.q_norm, layer.self_attn.k_norm)


def pass_on(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    """Stand in for the forward of a layer whose result nothing uses.

    The layer itself has to stay: without it, ``hidden_states[-2]`` would silently be another layer's.
    """
    return hidden_states
