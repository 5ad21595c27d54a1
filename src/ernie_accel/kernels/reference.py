"""What each kernel computes, in plain torch: the specification, and the path on devices without Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Largest finite value of float8_e4m3fn.
FP8_MAX = 448.0
#: Below this a row counts as zero, so that the scale of an all-zero row is not zero.
SMALLEST_AMAX = 1e-12
#: Rows with spare columns are smaller by this power of two, so that a low-rank part there may be larger than they are.
ROOM = 32.0


def quantize_rows(x_bsk: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Return `x_bsk` in float8_e4m3fn, and its scales [B * S, 1] in float32.

    Args:
        x_bsk: Rows.
        spare: Columns to add, for `low_rank_into`. With them, the largest value of a row is FP8_MAX / ROOM.
    """
    x = x_bsk.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) / (FP8_MAX / ROOM if spare else FP8_MAX)
    return _with_columns((x / scale).to(torch.float8_e4m3fn), spare), scale.view(-1, 1)


def _with_columns(x_bsk: Tensor, spare: int) -> Tensor:
    """Return float8 rows followed by columns of zeros; the rows themselves if there are none."""
    if not spare:
        return x_bsk
    width = x_bsk.shape[-1]
    wide = torch.zeros(*x_bsk.shape[:-1], width + spare, dtype=torch.uint8, device=x_bsk.device)
    wide[..., :width] = x_bsk.view(torch.uint8)
    return wide.view(x_bsk.dtype)


def norm_modulate(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm(x) * weight * scale + shift`` in the dtype of `x_bsh`.

    Rounds where diffusers' RMSNorm does: after the norm, after the weight, at the end.

    Args:
        x_bsh: Hidden states.
        weight_h: RMS norm weight, dtype of `x_bsh`.
        scale_b1h: One plus the adaLN scale, float32.
        shift_b1h: The adaLN shift, float32.
        eps: Added to the mean square.
    """
    x = x_bsh.float()
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_bsh.dtype) * weight_h
    return (normed.float() * scale_b1h + shift_b1h).to(x_bsh.dtype)


def gated_add(x_bsh: Tensor, branch_bsh: Tensor, gate_b1h: Tensor) -> Tensor:
    """Return ``x + gate * branch``, the product in float32 and rounded once before the sum."""
    return x_bsh + (gate_b1h * branch_bsh.float()).to(x_bsh.dtype)


def norm_scale(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor | None, eps: float) -> Tensor:
    """Return ``rms_norm(x) * weight * scale`` in the dtype of `x_bsh`, rounded after each; None scales by one."""
    x = x_bsh.float()
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_bsh.dtype) * weight_h
    return normed if scale_b1h is None else (normed.float() * scale_b1h.float()).to(x_bsh.dtype)


def add_normed(
    x_bsh: Tensor, branch_bsh: Tensor, branch_weight_h: Tensor, gate_b1h: Tensor | None, eps: float
) -> Tensor:
    """Return ``x + gate * rms_norm(branch) * branch_weight``, rounded after each operation; None gates by one."""
    return x_bsh + norm_scale(branch_bsh, branch_weight_h, gate_b1h, eps)


def scales_and_gates(mod_b4h: Tensor) -> Tensor:
    """Return ``1 + scale`` and ``tanh(gate)`` of the attention, then of the MLP [B, 4, H], of all four side by side."""
    scale_sa, gate_sa, scale_mlp, gate_mlp = mod_b4h.chunk(4, -1)
    return torch.stack((1 + scale_sa, gate_sa.tanh(), 1 + scale_mlp, gate_mlp.tanh()), 1)


def qk_norm_rope(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the queries and keys [B, S, N, D] of a fused projection, RMS-normed over D and rotated (half-split RoPE).

    Computed in float32 and rounded once, at the end.

    Args:
        qkv_bs3h: Queries, keys and values side by side [B, S, 3 * N * D].
        weight_q_d: RMS norm weight of the queries.
        weight_k_d: RMS norm weight of the keys.
        cos_bs1d: Cosines of the angles; dimension i and i + D / 2 belong together.
        sin_bs1d: Sines.
        heads: N.
        eps: Added to the mean square.
    """
    out = []
    for x, weight in zip(qkv_bs3h.chunk(3, -1)[:2], (weight_q_d, weight_k_d), strict=True):
        x = x.float().view(*x.shape[:-1], heads, -1)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        first, second = x.chunk(2, -1)
        x = x * cos_bs1d.float() + torch.cat((-second, first), -1) * sin_bs1d.float()
        out.append(x.to(qkv_bs3h.dtype))
    return out[0], out[1]


def qk_norm_rope_pairs(
    qkv_bsm: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, rope_2bs1p: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `qk_norm_rope` where dimensions 2 i and 2 i + 1 belong together; keys may have fewer heads.

    Args:
        qkv_bsm: Queries, keys and values side by side [B, S, (N + 2 * K) * D]; keys and values have K heads.
        weight_q_d: RMS norm weight of the queries.
        weight_k_d: RMS norm weight of the keys.
        rope_2bs1p: Cosines and sines of the angles of the D / 2 pairs.
        heads: N.
        eps: Added to the mean square.
    """
    (cos, sin), size = rope_2bs1p.float().unbind(0), len(weight_q_d)
    others = (qkv_bsm.shape[-1] - heads * size) // 2
    out = []
    parts = torch.split(qkv_bsm, [heads * size, others, others], -1)[:2]
    for x, weight in zip(parts, (weight_q_d, weight_k_d), strict=True):
        x = x.float().reshape(*x.shape[:-1], -1, size)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
        x = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        out.append(x.to(qkv_bsm.dtype))
    return out[0], out[1]


def qkv_fp8(
    qkv_bs3h: Tensor,
    weight_q_d: Tensor,
    weight_k_d: Tensor,
    cos_bs1d: Tensor,
    sin_bs1d: Tensor,
    heads: int,
    eps: float,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `qk_norm_rope` and the values in float8 [B, S, N, D], and the scale of `attention_fp8`'s rows [B * S, 1].

    Queries and keys need no scale: they are normed, and float8_e4m3fn reaches from 2 ** -9 to 448. The values share
    one scale, because attention sums over their rows. It is that of the rows, too, times ROOM where `spare` columns
    follow them.
    """
    return _in_fp8(*qk_norm_rope(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps), qkv_bs3h, spare)


def qkv_fp8_pairs(
    qkv_bsm: Tensor,
    weight_q_d: Tensor,
    weight_k_d: Tensor,
    rope_2bs1p: Tensor,
    heads: int,
    eps: float,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `qk_norm_rope_pairs`, `mixed`, and the values in float8, and the scale of the rows, as `qkv_fp8` does."""
    q_bsnd, k_bsnd = qk_norm_rope_pairs(qkv_bsm, weight_q_d, weight_k_d, rope_2bs1p, heads, eps)
    return _in_fp8(mixed(q_bsnd.float()), mixed(k_bsnd.float()), qkv_bsm, spare)


def mixed(x_bsnd: Tensor) -> Tensor:
    """Return queries or keys with the quarters of each head mixed, by an orthogonal matrix (Hadamard's, of 4).

    No product of a query and a key changes by it, but what float8 makes of them does. Slow rotations give many tokens
    nearly the same number, hence the same rounding error, and no sum over tokens averages that away. Mixed with the
    axes in the other quarters, the numbers differ. FlashAttention-3 (Shah et al., 2024) calls it incoherent processing;
    here no program has to exchange a value for it. `x_bsnd` stays as it is where 8 does not divide D.
    """
    if x_bsnd.shape[-1] % 8:
        return x_bsnd
    a, b, c, d = x_bsnd.chunk(4, -1)
    return torch.cat((a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d), -1) / 2


def _in_fp8(q_bsnd: Tensor, k_bsnd: Tensor, qkv_bsm: Tensor, spare: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = qkv_bsm[..., -k_bsnd.shape[2] * k_bsnd.shape[3] :].float()
    scale = v.abs().amax().clamp_min(SMALLEST_AMAX) / FP8_MAX
    v8 = (v / scale).to(torch.float8_e4m3fn).view(k_bsnd.shape)
    q8, k8 = (x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn) for x in (q_bsnd, k_bsnd))
    of_rows = scale * ROOM if spare else scale
    return q8, k8, v8, of_rows.expand(q_bsnd.shape[0] * q_bsnd.shape[1], 1).contiguous()


def attention(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, lengths_b: Tensor | None) -> Tensor:
    """Return the attention output [B, S, N * D], with only the first `lengths_b` (int32) keys of each row.

    None means all keys. Keys and values may have fewer heads; each of them serves as many heads of queries in a row.
    """
    share = q_bsnd.shape[2] // k_bsnd.shape[2]
    k_bsnd, v_bsnd = (x.repeat_interleave(share, 2) if share > 1 else x for x in (k_bsnd, v_bsnd))
    q, k, v = (x.transpose(1, 2) for x in (q_bsnd, k_bsnd, v_bsnd))
    counts_b11s = None
    if lengths_b is not None:
        counts_b11s = torch.arange(k.shape[2], device=k.device) < lengths_b.view(-1, 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=counts_b11s).transpose(1, 2).flatten(2, 3)


def attention_fp8(
    q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, scale: Tensor, lengths_b: Tensor | None, spare: int = 0
) -> Tensor:
    """Return `attention` in float8 [B, S, N * D + spare], with the scale of the values, whose range it cannot exceed.

    With `spare` columns of zeros, for `low_rank_into`, its rows are smaller by ROOM.
    """
    out = attention(q_bsnd.float(), k_bsnd.float(), v_bsnd.float(), lengths_b)
    return _with_columns((out / ROOM if spare else out).to(torch.float8_e4m3fn), spare)


def gelu_mul(gate_up_bs2f: Tensor) -> Tensor:
    """Return ``gelu(gate) * up`` [B, S, F] of both side by side [B, S, 2 * F]; rounds the GELU before the product."""
    gate, up = gate_up_bs2f.chunk(2, -1)
    return F.gelu(gate.contiguous()) * up


def silu_mul(gate_up_bs2f: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` [B, S, F] of both side by side [B, S, 2 * F]; rounds the SiLU before the product."""
    gate, up = gate_up_bs2f.chunk(2, -1)
    return F.silu(gate.contiguous()) * up


def low_rank_fp8(x_bsk: Tensor, x_scale: Tensor, down_rk: Tensor) -> Tensor:
    """Return ``x @ down.T`` [B * S, R] of quantized rows, in the dtype of `down_rk`; float8 is exact in it.

    Args:
        x_bsk: float8 rows, with `x_scale` [B * S, 1].
        x_scale: float32 scale of each row.
        down_rk: bfloat16.
    """
    return (x_bsk.flatten(0, -2).float() @ down_rk.float().t() * x_scale).to(down_rk.dtype)


def low_rank_into(x_bsw: Tensor, down_rk: Tensor, factor_r: Tensor) -> None:
    """Write ``x @ down.T * factor`` into the spare columns of float8 rows, in place; zeros into those beyond R.

    Args:
        x_bsw: Rows [B, S, K] and their spare columns, at least R.
        down_rk: float8.
        factor_r: float32. What it makes larger than FP8_MAX is clamped to that.
    """
    ranks, width = down_rk.shape
    low = x_bsw[..., :width].float() @ down_rk.float().t() * factor_r
    spare = torch.zeros_like(x_bsw[..., width:], dtype=torch.float32)
    spare[..., :ranks] = low.clamp(-FP8_MAX, FP8_MAX)
    x_bsw.view(torch.uint8)[..., width:] = spare.to(torch.float8_e4m3fn).view(torch.uint8)


def with_low_rank(
    x_bsk: Tensor, x_scale: Tensor, down_rk: Tensor, factor_r: Tensor, spare: int
) -> tuple[Tensor, Tensor]:
    """Return float8 rows [B, S, K + spare] with `low_rank_into` done, and their scales [B * S, 1].

    Args:
        x_bsk: float8 rows without spare columns; the new ones are smaller by ROOM.
        x_scale: float32 scale of each row [B * S, 1].
        down_rk: As in `low_rank_into`.
        factor_r: Likewise.
        spare: Columns to add.
    """
    wide = _with_columns((x_bsk.float() / ROOM).to(torch.float8_e4m3fn), spare)
    low_rank_into(wide, down_rk, factor_r)
    return wide, x_scale * ROOM


def group_norm_affine(
    x_bchw: Tensor, add_c: Tensor | None, weight_c: Tensor, bias_c: Tensor, groups: int, eps: float
) -> Tensor:
    """Return the scale and shift [B, 2, C] in float32 that make ``group_norm(x + add)`` of each channel of `x_bchw`.

    Args:
        x_bchw: Any layout; for example a convolution's result before its bias.
        add_c: Added to each channel first, the bias of that convolution; None is zero.
        weight_c: Weight of the norm.
        bias_c: Bias of the norm.
        groups: How many groups the channels form; it divides their number.
        eps: Added to the variance.
    """
    add = torch.zeros_like(bias_c).float() if add_c is None else add_c.float()
    x_bgn = (x_bchw.float() + add.view(-1, 1, 1)).reshape(len(x_bchw), groups, -1)
    variance, mean = torch.var_mean(x_bgn, -1, correction=0)
    scale_bg = torch.rsqrt(variance + eps)
    scale_bc = scale_bg.repeat_interleave(len(weight_c) // groups, 1) * weight_c.float()
    mean_bc = mean.repeat_interleave(len(weight_c) // groups, 1)
    return torch.stack((scale_bc, bias_c.float() + (add - mean_bc) * scale_bc), 1)


def add_group_norm_affine(
    x_bchw: Tensor,
    residual_bchw: Tensor | None,
    add_c: Tensor | None,
    weight_c: Tensor,
    bias_c: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``y = x + add + residual``, rounded once, channels-last, and `group_norm_affine` of it."""
    y = x_bchw.float() if add_c is None else x_bchw.float() + add_c.float().view(-1, 1, 1)
    y = y if residual_bchw is None else y + residual_bchw.float()
    y = torch.empty_like(x_bchw, memory_format=torch.channels_last).copy_(y)
    return y, group_norm_affine(y, None, weight_c, bias_c, groups, eps)


def affine(x_bchw: Tensor, affine_b2c: Tensor, silu: bool) -> Tensor:
    """Return ``x * scale + shift`` of each channel, through SiLU if `silu`, rounded once, channels-last."""
    scale, shift = affine_b2c[:, :, :, None, None].unbind(1)
    y = x_bchw.float() * scale + shift
    return torch.empty_like(x_bchw, memory_format=torch.channels_last).copy_(F.silu(y) if silu else y)
