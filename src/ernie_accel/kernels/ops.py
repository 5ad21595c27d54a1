"""The kernels as torch operators: Triton on CUDA, the plain-torch twin elsewhere, one graph node under torch.compile.

Operators have no backward: they are for inference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import custom_op

from ernie_accel.kernels import reference

FP8 = torch.float8_e4m3fn


@custom_op("ernie_accel::norm_modulate", mutates_args=())
def norm_modulate(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float) -> Tensor:
    """Return `reference.norm_modulate`."""
    return reference.norm_modulate(x_bsh, weight_h, scale_b1h, shift_b1h, eps)


@norm_modulate.register_kernel("cuda")
def _(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float) -> Tensor:
    from ernie_accel.kernels import gpu

    return gpu.norm_modulate(x_bsh, None, None, weight_h, scale_b1h, shift_b1h, eps, False)[1]


@norm_modulate.register_fake
def _(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x_bsh, memory_format=torch.contiguous_format)


@custom_op("ernie_accel::norm_modulate_fp8", mutates_args=())
def norm_modulate_fp8(
    x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `reference.norm_modulate`, quantized: (float8, scales)."""
    return reference.quantize_rows(reference.norm_modulate(x_bsh, weight_h, scale_b1h, shift_b1h, eps))


@norm_modulate_fp8.register_kernel("cuda")
def _(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from ernie_accel.kernels import gpu

    _, y, scale = gpu.norm_modulate(x_bsh, None, None, weight_h, scale_b1h, shift_b1h, eps, True)
    return y, _not_none(scale)


@norm_modulate_fp8.register_fake
def _(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _fake_fp8(x_bsh, x_bsh.shape[-1])


@custom_op("ernie_accel::add_norm_modulate", mutates_args=())
def add_norm_modulate(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    gate_b1h: Tensor,
    weight_h: Tensor,
    scale_b1h: Tensor,
    shift_b1h: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``x = reference.gated_add(...)`` and `reference.norm_modulate` of it."""
    x_bsh = reference.gated_add(x_bsh, branch_bsh, gate_b1h)
    return x_bsh, reference.norm_modulate(x_bsh, weight_h, scale_b1h, shift_b1h, eps)


@add_norm_modulate.register_kernel("cuda")
def _(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    gate_b1h: Tensor,
    weight_h: Tensor,
    scale_b1h: Tensor,
    shift_b1h: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from ernie_accel.kernels import gpu

    return gpu.norm_modulate(x_bsh, branch_bsh, gate_b1h, weight_h, scale_b1h, shift_b1h, eps, False)[:2]


@add_norm_modulate.register_fake
def _(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    gate_b1h: Tensor,
    weight_h: Tensor,
    scale_b1h: Tensor,
    shift_b1h: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _fake_like(x_bsh), _fake_like(x_bsh)


@custom_op("ernie_accel::add_norm_modulate_fp8", mutates_args=())
def add_norm_modulate_fp8(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    gate_b1h: Tensor,
    weight_h: Tensor,
    scale_b1h: Tensor,
    shift_b1h: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x = reference.gated_add(...)`` and `reference.norm_modulate` of it, quantized: (x, float8, scales)."""
    x_bsh = reference.gated_add(x_bsh, branch_bsh, gate_b1h)
    return x_bsh, *reference.quantize_rows(reference.norm_modulate(x_bsh, weight_h, scale_b1h, shift_b1h, eps))


@add_norm_modulate_fp8.register_kernel("cuda")
def _(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    gate_b1h: Tensor,
    weight_h: Tensor,
    scale_b1h: Tensor,
    shift_b1h: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from ernie_accel.kernels import gpu

    x, y, scale = gpu.norm_modulate(x_bsh, branch_bsh, gate_b1h, weight_h, scale_b1h, shift_b1h, eps, True)
    return x, y, _not_none(scale)


@add_norm_modulate_fp8.register_fake
def _(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    gate_b1h: Tensor,
    weight_h: Tensor,
    scale_b1h: Tensor,
    shift_b1h: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_like(x_bsh), *_fake_fp8(x_bsh, x_bsh.shape[-1])


@custom_op("ernie_accel::gated_add", mutates_args=())
def gated_add(x_bsh: Tensor, branch_bsh: Tensor, gate_b1h: Tensor) -> Tensor:
    """Return `reference.gated_add`."""
    return reference.gated_add(x_bsh, branch_bsh, gate_b1h)


@gated_add.register_kernel("cuda")
def _(x_bsh: Tensor, branch_bsh: Tensor, gate_b1h: Tensor) -> Tensor:
    from ernie_accel.kernels import gpu

    return gpu.gated_add(x_bsh, branch_bsh, gate_b1h)


@gated_add.register_fake
def _(x_bsh: Tensor, branch_bsh: Tensor, gate_b1h: Tensor) -> Tensor:
    return _fake_like(x_bsh)


@custom_op("ernie_accel::quantize_rows", mutates_args=())
def quantize_rows(x_bsk: Tensor) -> tuple[Tensor, Tensor]:
    """Return `reference.quantize_rows`: (float8, scales)."""
    return reference.quantize_rows(x_bsk)


@quantize_rows.register_kernel("cuda")
def _(x_bsk: Tensor) -> tuple[Tensor, Tensor]:
    from ernie_accel.kernels import gpu

    return gpu.quantize_rows(x_bsk)


@quantize_rows.register_fake
def _(x_bsk: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_fp8(x_bsk, x_bsk.shape[-1])


@custom_op("ernie_accel::gelu_mul", mutates_args=())
def gelu_mul(gate_up_bs2f: Tensor) -> Tensor:
    """Return `reference.gelu_mul`."""
    return reference.gelu_mul(gate_up_bs2f)


@gelu_mul.register_kernel("cuda")
def _(gate_up_bs2f: Tensor) -> Tensor:
    from ernie_accel.kernels import gpu

    return gpu.gelu_mul(gate_up_bs2f, False)[0]


@gelu_mul.register_fake
def _(gate_up_bs2f: Tensor) -> Tensor:
    return gate_up_bs2f.new_empty(*gate_up_bs2f.shape[:-1], gate_up_bs2f.shape[-1] // 2)


@custom_op("ernie_accel::gelu_mul_fp8", mutates_args=())
def gelu_mul_fp8(gate_up_bs2f: Tensor) -> tuple[Tensor, Tensor]:
    """Return `reference.gelu_mul`, quantized: (float8, scales)."""
    return reference.quantize_rows(reference.gelu_mul(gate_up_bs2f))


@gelu_mul_fp8.register_kernel("cuda")
def _(gate_up_bs2f: Tensor) -> tuple[Tensor, Tensor]:
    from ernie_accel.kernels import gpu

    y, scale = gpu.gelu_mul(gate_up_bs2f, True)
    return y, _not_none(scale)


@gelu_mul_fp8.register_fake
def _(gate_up_bs2f: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_fp8(gate_up_bs2f, gate_up_bs2f.shape[-1] // 2)


@custom_op("ernie_accel::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `reference.qk_norm_rope`: (queries, keys)."""
    return reference.qk_norm_rope(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps)


@qk_norm_rope.register_kernel("cuda")
def _(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    from ernie_accel.kernels import gpu

    return gpu.qk_norm_rope(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps)


@qk_norm_rope.register_fake
def _(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv_bs3h.shape
    q_bsnd = qkv_bs3h.new_empty(batch, tokens, heads, width // (3 * heads))
    return q_bsnd, torch.empty_like(q_bsnd)


@custom_op("ernie_accel::qkv_fp8", mutates_args=())
def qkv_fp8(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `reference.qkv_fp8`: (queries, keys, values, scale of the values)."""
    return reference.qkv_fp8(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps)


@qkv_fp8.register_kernel("cuda")
def _(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ernie_accel.kernels import gpu

    return gpu.qkv_fp8(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps)


@qkv_fp8.register_fake
def _(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv_bs3h.shape
    q, k, v = (qkv_bs3h.new_empty(batch, tokens, heads, width // (3 * heads), dtype=FP8) for _ in range(3))
    return q, k, v, qkv_bs3h.new_empty(batch * tokens, 1, dtype=torch.float32)


@custom_op("ernie_accel::attention_fp8", mutates_args=())
def attention_fp8(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, scale: Tensor) -> Tensor:
    """Return `reference.attention_fp8`: float8, with `scale` [B * S, 1] for its rows, too."""
    return reference.attention_fp8(q_bsnd, k_bsnd, v_bsnd, scale)


@attention_fp8.register_kernel("cuda")
def _(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, scale: Tensor) -> Tensor:
    from ernie_accel.kernels import cudnn_attention

    return cudnn_attention.attention_fp8(q_bsnd, k_bsnd, v_bsnd, scale)


@attention_fp8.register_fake
def _(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, scale: Tensor) -> Tensor:
    return q_bsnd.new_empty(*q_bsnd.shape[:2], q_bsnd.shape[2] * q_bsnd.shape[3])


@custom_op("ernie_accel::linear_fp8", mutates_args=())
def linear_fp8(x_bsk: Tensor, x_scale: Tensor, weight_nk: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the bfloat16 product [B, S, N] of quantized rows [B, S, K] and a quantized weight [N, K].

    Args:
        x_bsk: float8 rows, with `x_scale` [B * S, 1].
        x_scale: float32 scale of each row.
        weight_nk: float8 weight.
        weight_scale: float32 scale of each output feature [1, N].
    """
    x_2d, rows = x_bsk.float().flatten(0, -2) * x_scale, weight_nk.float() * weight_scale.view(-1, 1)
    return (x_2d @ rows.t()).to(torch.bfloat16).view(*x_bsk.shape[:-1], -1)


@linear_fp8.register_kernel("cuda")
def _(x_bsk: Tensor, x_scale: Tensor, weight_nk: Tensor, weight_scale: Tensor) -> Tensor:
    out = torch._scaled_mm(
        x_bsk.flatten(0, -2), weight_nk.t(), x_scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return out.view(*x_bsk.shape[:-1], -1)


@linear_fp8.register_fake
def _(x_bsk: Tensor, x_scale: Tensor, weight_nk: Tensor, weight_scale: Tensor) -> Tensor:
    return x_bsk.new_empty(*x_bsk.shape[:-1], weight_nk.shape[0], dtype=torch.bfloat16)


def _fake_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_fp8(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix the sizes under torch.compile
    return x.new_empty(*x.shape[:-1], width, dtype=FP8), x.new_empty(rows, 1, dtype=torch.float32)


def _not_none(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise RuntimeError("the kernel was asked to quantize and returned no scales")
    return scale
