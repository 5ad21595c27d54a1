# mypy: allow-untyped-calls
"""The kernels as torch operators: Triton on CUDA, the plain-torch twin elsewhere, one graph node under torch.compile.

Operators are for inference: a backward raises an error.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.kernels import reference
from ernie_accel.kernels.hopper import attention as hopper
from ernie_accel.kernels.hopper import product as hopper_product
from ernie_accel.kernels.hopper.compiling import is_usable

FP8 = torch.float8_e4m3fn

# Not torch.library.custom_op: its calls take 7.5 us on a CPU under no_grad instead of 1.4, and a step makes 360.
_R = TypeVar("_R")
_LIBRARY = torch.library.Library("ernie_accel", "FRAGMENT")


def _operator(
    cuda: Callable[..., _R], fake: Callable[..., object], *, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Turn a function into an operator of the same name, which calls it on every device but CUDA.

    Args:
        cuda: Takes the same arguments, the first of them a tensor, and returns the same, on CUDA.
        fake: Returns tensors like them, without computing.
        mutates: Arguments that are changed in place.
    """

    def on_its_device(x: Tensor, *others: object) -> _R:
        if x.device.index == torch.cuda.current_device():
            return cuda(x, *others)
        with torch.cuda.device(x.device):  # what is launched is launched on the current one
            return cuda(x, *others)

    def register(twin: Callable[..., _R]) -> Callable[..., _R]:
        name = twin.__name__
        schema = torch.library.infer_schema(twin, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, twin, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, on_its_device, "CUDA")
        torch.library.register_fake(f"ernie_accel::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.ernie_accel, name).default

        @functools.wraps(twin)
        def call(*arguments: object) -> _R:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
                guarded: _R = _NoBackward.apply(operator, *arguments)
                return guarded
            result: _R = operator(*arguments)
            return result

        return call

    return register


class _NoBackward(torch.autograd.Function):
    """An operator under gradients. Without this, torch would treat the gradients as zero, and only warn."""

    @staticmethod
    def forward(ctx: Any, operator: OpOverload, *arguments: object) -> object:
        ctx.name = operator.name()
        return operator(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: object) -> NoReturn:
        raise ErnieAccelError(
            f"{ctx.name} has no backward: fused kernels are for inference. Call ernie_accel.restore(pipe) to train."
        )


def _gpu() -> ModuleType:
    """Return the launchers, which need Triton: imported by the first call on CUDA."""
    return importlib.import_module("ernie_accel.kernels.gpu")


def _attention(q: Tensor) -> ModuleType:
    """Return what attends with such queries on CUDA; in float32, as after an overflow, torch does."""
    if hopper.takes(q):
        return hopper
    if q.dtype not in (torch.float16, torch.bfloat16, FP8):
        return reference
    return importlib.import_module("ernie_accel.kernels.cudnn_attention")


def _group_norm() -> ModuleType:
    return importlib.import_module("ernie_accel.kernels.group_norm")


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fp8_like(x: Tensor, width: int, spare: int = 0) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix the sizes under torch.compile
    return x.new_empty(*x.shape[:-1], width + spare, dtype=FP8), x.new_empty(rows, 1, dtype=torch.float32)


def _spare(arguments: tuple[int, ...], at: int) -> int:
    """Return the spare columns among the arguments of an operator, its last and `at`; the dispatcher drops defaults."""
    return arguments[at] if len(arguments) > at else 0


def _heads_like(qkv_bs3h: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    batch, tokens, width = qkv_bs3h.shape
    return qkv_bs3h.new_empty(batch, tokens, heads, width // (3 * heads), dtype=dtype)


@_operator(
    cuda=lambda x, *modulation: _gpu().norm_modulate(x, None, None, *modulation, False)[1],
    fake=lambda x, *_: _like(x),
)
def norm_modulate(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float) -> Tensor:
    """Return `reference.norm_modulate`."""
    return reference.norm_modulate(x_bsh, weight_h, scale_b1h, shift_b1h, eps)


# Where rows are quantized for a product with a low-rank part, `spare` columns follow them (`reference.quantize_rows`).


@_operator(
    cuda=lambda x, *modulation: _gpu().norm_modulate(x, None, None, *modulation[:4], True, spare=_spare(modulation, 4))[
        1:
    ],
    fake=lambda x, *rest: _fp8_like(x, x.shape[-1], _spare(rest, 4)),
)
def norm_modulate_fp8(
    x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor, shift_b1h: Tensor, eps: float, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """Return `reference.norm_modulate`, quantized: (float8, scales)."""
    return reference.quantize_rows(reference.norm_modulate(x_bsh, weight_h, scale_b1h, shift_b1h, eps), spare)


@_operator(
    cuda=lambda *arguments: _gpu().norm_modulate(*arguments, False)[:2],
    fake=lambda x, *_: (_like(x), _like(x)),
)
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


@_operator(
    cuda=lambda *arguments: _gpu().norm_modulate(*arguments[:7], True, spare=_spare(arguments, 7)),
    fake=lambda x, *rest: (_like(x), *_fp8_like(x, x.shape[-1], _spare(rest, 6))),
)
def add_norm_modulate_fp8(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    gate_b1h: Tensor,
    weight_h: Tensor,
    scale_b1h: Tensor,
    shift_b1h: Tensor,
    eps: float,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x = reference.gated_add(...)`` and `reference.norm_modulate` of it, quantized: (x, float8, scales)."""
    x_bsh = reference.gated_add(x_bsh, branch_bsh, gate_b1h)
    return x_bsh, *reference.quantize_rows(reference.norm_modulate(x_bsh, weight_h, scale_b1h, shift_b1h, eps), spare)


@_operator(cuda=lambda *arguments: _gpu().gated_add(*arguments), fake=lambda x, *_: _like(x))
def gated_add(x_bsh: Tensor, branch_bsh: Tensor, gate_b1h: Tensor) -> Tensor:
    """Return `reference.gated_add`."""
    return reference.gated_add(x_bsh, branch_bsh, gate_b1h)


@_operator(
    cuda=lambda x, weight, scale, eps: _gpu().norm_modulate(x, None, None, weight, scale, None, eps, False)[1],
    fake=lambda x, *_: _like(x),
)
def norm_scale(x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor | None, eps: float) -> Tensor:
    """Return `reference.norm_scale`."""
    return reference.norm_scale(x_bsh, weight_h, scale_b1h, eps)


@_operator(
    cuda=lambda x, weight, scale, eps, spare=0: _gpu().norm_modulate(
        x, None, None, weight, scale, None, eps, True, spare=spare
    )[1:],
    fake=lambda x, *rest: _fp8_like(x, x.shape[-1], _spare(rest, 3)),
)
def norm_scale_fp8(
    x_bsh: Tensor, weight_h: Tensor, scale_b1h: Tensor | None, eps: float, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """Return `reference.norm_scale`, quantized: (float8, scales)."""
    return reference.quantize_rows(reference.norm_scale(x_bsh, weight_h, scale_b1h, eps), spare)


def _add_norm_scale(
    quantize: bool,
    x: Tensor,
    branch: Tensor,
    branch_weight: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    spare: int = 0,
) -> Any:
    return _gpu().norm_modulate(x, branch, gate, weight, scale, None, eps, quantize, branch_weight, spare)


@_operator(
    cuda=lambda *arguments: _add_norm_scale(False, *arguments)[:2],
    fake=lambda x, *_: (_like(x), _like(x)),
)
def add_norm_scale(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    branch_weight_h: Tensor,
    gate_b1h: Tensor | None,
    weight_h: Tensor,
    scale_b1h: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``x = reference.add_normed(...)`` and `reference.norm_scale` of it."""
    x_bsh = reference.add_normed(x_bsh, branch_bsh, branch_weight_h, gate_b1h, eps)
    return x_bsh, reference.norm_scale(x_bsh, weight_h, scale_b1h, eps)


@_operator(
    cuda=lambda *arguments: _add_norm_scale(True, *arguments),
    fake=lambda x, *rest: (_like(x), *_fp8_like(x, x.shape[-1], _spare(rest, 6))),
)
def add_norm_scale_fp8(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    branch_weight_h: Tensor,
    gate_b1h: Tensor | None,
    weight_h: Tensor,
    scale_b1h: Tensor | None,
    eps: float,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x = reference.add_normed(...)`` and `reference.norm_scale` of it, quantized: (x, float8, scales)."""
    x_bsh = reference.add_normed(x_bsh, branch_bsh, branch_weight_h, gate_b1h, eps)
    return x_bsh, *reference.quantize_rows(reference.norm_scale(x_bsh, weight_h, scale_b1h, eps), spare)


@_operator(
    cuda=lambda x, branch, weight, gate, eps: _gpu().gated_add(x, branch, gate, weight, eps),
    fake=lambda x, *_: _like(x),
)
def add_normed(
    x_bsh: Tensor, branch_bsh: Tensor, branch_weight_h: Tensor, gate_b1h: Tensor | None, eps: float
) -> Tensor:
    """Return `reference.add_normed`."""
    return reference.add_normed(x_bsh, branch_bsh, branch_weight_h, gate_b1h, eps)


@_operator(
    cuda=lambda mod: _gpu().scales_and_gates(mod),
    fake=lambda mod: mod.new_empty(mod.shape[0], 4, mod.shape[-1] // 4),
)
def scales_and_gates(mod_b4h: Tensor) -> Tensor:
    """Return `reference.scales_and_gates`."""
    return reference.scales_and_gates(mod_b4h)


@_operator(
    cuda=lambda x, spare=0: _gpu().quantize_rows(x, spare),
    fake=lambda x, spare=0: _fp8_like(x, x.shape[-1], spare),
)
def quantize_rows(x_bsk: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Return `reference.quantize_rows`: (float8, scales)."""
    return reference.quantize_rows(x_bsk, spare)


@_operator(
    cuda=lambda gate_up: _gpu().gelu_mul(gate_up, False)[0],
    fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)
def gelu_mul(gate_up_bs2f: Tensor) -> Tensor:
    """Return `reference.gelu_mul`."""
    return reference.gelu_mul(gate_up_bs2f)


@_operator(
    cuda=lambda gate_up, spare=0: _gpu().gelu_mul(gate_up, True, spare),
    fake=lambda gate_up, spare=0: _fp8_like(gate_up, gate_up.shape[-1] // 2, spare),
)
def gelu_mul_fp8(gate_up_bs2f: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Return `reference.gelu_mul`, quantized: (float8, scales)."""
    return reference.quantize_rows(reference.gelu_mul(gate_up_bs2f), spare)


@_operator(
    cuda=lambda gate_up: _gpu().silu_mul(gate_up, False)[0],
    fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)
def silu_mul(gate_up_bs2f: Tensor) -> Tensor:
    """Return `reference.silu_mul`."""
    return reference.silu_mul(gate_up_bs2f)


@_operator(
    cuda=lambda gate_up, spare=0: _gpu().silu_mul(gate_up, True, spare),
    fake=lambda gate_up, spare=0: _fp8_like(gate_up, gate_up.shape[-1] // 2, spare),
)
def silu_mul_fp8(gate_up_bs2f: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Return `reference.silu_mul`, quantized: (float8, scales)."""
    return reference.quantize_rows(reference.silu_mul(gate_up_bs2f), spare)


def _kv_heads(qkv_bsm: Tensor, size: int, heads: int) -> int:
    return (qkv_bsm.shape[-1] // size - heads) // 2


def _rows_of_heads(qkv_bsm: Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    return qkv_bsm.new_empty(*qkv_bsm.shape[:2], heads, size, dtype=dtype)


@_operator(
    cuda=lambda qkv, q, k, rope, heads, eps: _gpu().qk_norm_rope(qkv, q, k, rope[0], rope[1], heads, eps, True),
    fake=lambda qkv, q, k, rope, heads, eps: tuple(
        _rows_of_heads(qkv, n, len(q), qkv.dtype) for n in (heads, _kv_heads(qkv, len(q), heads))
    ),
)
def qk_norm_rope_pairs(
    qkv_bsm: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, rope_2bs1p: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `reference.qk_norm_rope_pairs`: (queries, keys)."""
    return reference.qk_norm_rope_pairs(qkv_bsm, weight_q_d, weight_k_d, rope_2bs1p, heads, eps)


def _fake_qkv_fp8_pairs(
    qkv: Tensor, q: Tensor, k: Tensor, rope: Tensor, heads: int, eps: float, spare: int = 0
) -> tuple[Tensor, ...]:
    others = _kv_heads(qkv, len(q), heads)
    return _fp8_heads(*(_rows_of_heads(qkv, n, len(q), FP8) for n in (heads, others)))


def _fp8_heads(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys, and what belongs to them: values and the scale of attention's rows."""
    v = k.new_empty(hopper.shape_of_values(k.shape)) if hopper.takes(q) else torch.empty_like(k)
    return q, k, v, q.new_empty(q.shape[0] * q.shape[1], 1, dtype=torch.float32)


@_operator(
    cuda=lambda qkv, q, k, rope, heads, eps, spare=0: _gpu().qkv_fp8(
        qkv, q, k, rope[0], rope[1], heads, eps, True, spare
    ),
    fake=_fake_qkv_fp8_pairs,
)
def qkv_fp8_pairs(
    qkv_bsm: Tensor,
    weight_q_d: Tensor,
    weight_k_d: Tensor,
    rope_2bs1p: Tensor,
    heads: int,
    eps: float,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `reference.qkv_fp8_pairs`: (queries, keys, values, scale of attention's rows).

    Values are as `attention_fp8` takes them on this device: on Hopper cards as `hopper.attention.laid_out` makes them.
    """
    return reference.qkv_fp8_pairs(qkv_bsm, weight_q_d, weight_k_d, rope_2bs1p, heads, eps, spare)


@_operator(
    cuda=lambda *arguments: _gpu().qk_norm_rope(*arguments),
    fake=lambda qkv, q, k, cos, sin, heads, eps: (
        _heads_like(qkv, heads, qkv.dtype),
        _heads_like(qkv, heads, qkv.dtype),
    ),
)
def qk_norm_rope(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `reference.qk_norm_rope`: (queries, keys)."""
    return reference.qk_norm_rope(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps)


@_operator(
    cuda=lambda *arguments: _gpu().qkv_fp8(*arguments[:7], spare=_spare(arguments, 7)),
    fake=lambda qkv, q, k, cos, sin, heads, eps, spare=0: _fp8_heads(
        _heads_like(qkv, heads, FP8), _heads_like(qkv, heads, FP8)
    ),
)
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
    """Return `reference.qkv_fp8`: (queries, keys, values, scale of attention's rows).

    Values are as `attention_fp8` takes them on this device: on Hopper cards as `hopper.attention.laid_out` makes them.
    """
    return reference.qkv_fp8(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps, spare)


@_operator(
    cuda=lambda q, *others: _attention(q).attention(q, *others),
    fake=lambda q, *_: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]),
)
def attention(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, lengths_b: Tensor | None) -> Tensor:
    """Return `reference.attention`."""
    return reference.attention(q_bsnd, k_bsnd, v_bsnd, lengths_b)


@_operator(
    cuda=lambda q, *others: _attention(q).attention_fp8(q, *others),
    fake=lambda q, k, v, scale, lengths, spare=0: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3] + spare),
)
def attention_fp8(
    q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, scale: Tensor, lengths_b: Tensor | None, spare: int = 0
) -> Tensor:
    """Return `reference.attention_fp8`: float8, with `scale` [B * S, 1] for its rows."""
    return reference.attention_fp8(q_bsnd, k_bsnd, v_bsnd, scale, lengths_b, spare)


@_operator(
    cuda=lambda *arguments: _group_norm().group_norm_affine(*arguments),
    fake=lambda x, *_: x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float32),
)
def group_norm_affine(
    x_bchw: Tensor, add_c: Tensor | None, weight_c: Tensor, bias_c: Tensor, groups: int, eps: float
) -> Tensor:
    """Return `reference.group_norm_affine`."""
    return reference.group_norm_affine(x_bchw, add_c, weight_c, bias_c, groups, eps)


@_operator(
    cuda=lambda *arguments: _group_norm().add_group_norm_affine(*arguments),
    fake=lambda x, *_: (
        torch.empty_like(x, memory_format=torch.channels_last),
        x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float32),
    ),
)
def add_group_norm_affine(
    x_bchw: Tensor,
    residual_bchw: Tensor | None,
    add_c: Tensor | None,
    weight_c: Tensor,
    bias_c: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return `reference.add_group_norm_affine`: (sum, scale and shift)."""
    return reference.add_group_norm_affine(x_bchw, residual_bchw, add_c, weight_c, bias_c, groups, eps)


@_operator(
    cuda=lambda *arguments: _group_norm().affine(*arguments),
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.channels_last),
)
def affine(x_bchw: Tensor, affine_b2c: Tensor, silu: bool) -> Tensor:
    """Return `reference.affine`."""
    return reference.affine(x_bchw, affine_b2c, silu)


def _linear_fp8(x_bsk: Tensor, x_scale: Tensor, weight_nk: Tensor, weight_scale: Tensor, terms: int = 0) -> Tensor:
    x_mk, terms = x_bsk.flatten(0, -2), terms or x_bsk.shape[-1]
    if hopper_product.takes(x_mk, x_scale, weight_nk, weight_scale, terms, gated=False):
        out = hopper_product.product(x_mk, x_scale, weight_nk, weight_scale, terms)
    else:
        out = torch._scaled_mm(
            x_mk, weight_nk.t(), x_scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return out.view(*x_bsk.shape[:-1], -1)


@_operator(
    cuda=_linear_fp8,
    fake=lambda x, x_scale, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.bfloat16),
)
def linear_fp8(x_bsk: Tensor, x_scale: Tensor, weight_nk: Tensor, weight_scale: Tensor, terms: int = 0) -> Tensor:
    """Return the bfloat16 product [B, S, N] of quantized rows [B, S, K] and a quantized weight [N, K].

    Args:
        x_bsk: float8 rows, with `x_scale` [B * S, 1].
        x_scale: float32 scale of each row.
        weight_nk: float8 weight.
        weight_scale: float32 scale of each output feature [1, N].
        terms: How many of the K columns count, a multiple of 16; those that follow are zeros in the weight, and may be
            left out. 0: all.
    """
    x_2d, rows = x_bsk.float().flatten(0, -2) * x_scale, weight_nk.float() * weight_scale.view(-1, 1)
    return (x_2d @ rows.t()).to(torch.bfloat16).view(*x_bsk.shape[:-1], -1)


def gates_in_product(x_bsk: Tensor) -> bool:
    """Return whether `gated_linear_fp8` of such rows does without the product in memory, if its sizes allow it.

    Elsewhere two kernels do it, with the product in memory between them, which plans have to count. A compiler cannot
    ask.
    """
    return not torch.compiler.is_compiling() and x_bsk.is_cuda and is_usable(x_bsk.device)


def _gated_linear_fp8(
    x_bsk: Tensor,
    x_scale: Tensor,
    weight_nk: Tensor,
    weight_scale: Tensor,
    silu: bool,
    spare: int = 0,
    terms: int = 0,
) -> tuple[Tensor, Tensor]:
    x_mk, columns = x_bsk.flatten(0, -2), terms or x_bsk.shape[-1]
    if not hopper_product.takes(x_mk, x_scale, weight_nk, weight_scale, columns, gated=True):
        gate_up_bs2f, gpu = _linear_fp8(x_bsk, x_scale, weight_nk, weight_scale, terms), _gpu()
        gated: tuple[Tensor, Tensor] = (gpu.silu_mul if silu else gpu.gelu_mul)(gate_up_bs2f, True, spare)
        return gated
    out = hopper_product.product(x_mk, x_scale, weight_nk, weight_scale, columns, "silu" if silu else "gelu")
    quantized: tuple[Tensor, Tensor] = _gpu().quantize_rows(out.view(*x_bsk.shape[:-1], -1), spare)
    return quantized


@_operator(
    cuda=_gated_linear_fp8,
    fake=lambda x, x_scale, weight, weight_scale, silu, *rest: _fp8_like(x, weight.shape[0] // 2, _spare(rest, 0)),
)
def gated_linear_fp8(
    x_bsk: Tensor,
    x_scale: Tensor,
    weight_nk: Tensor,
    weight_scale: Tensor,
    silu: bool,
    spare: int = 0,
    terms: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return `reference.silu_mul` or `reference.gelu_mul` of a product, quantized: (float8 [B, S, N / 2], scales).

    Args:
        x_bsk: float8 rows, with `x_scale` [B * S, 1].
        x_scale: float32 scale of each row.
        weight_nk: float8 weight: the first half of its features gates the second.
        weight_scale: float32 scale of each feature [1, N].
        silu: By SiLU; else by GELU.
        spare: Columns that follow the result.
        terms: How many of the K columns count; see `linear_fp8`.
    """
    gate_up_bs2f = linear_fp8(x_bsk, x_scale, weight_nk, weight_scale, terms)
    gate = reference.silu_mul if silu else reference.gelu_mul
    return reference.quantize_rows(gate(gate_up_bs2f), spare)


@_operator(
    cuda=lambda *arguments: _gpu().low_rank_fp8(*arguments),
    fake=lambda x, x_scale, down: x.new_empty(x_scale.shape[0], down.shape[0], dtype=down.dtype),
)
def low_rank_fp8(x_bsk: Tensor, x_scale: Tensor, down_rk: Tensor) -> Tensor:
    """Return `reference.low_rank_fp8`."""
    return reference.low_rank_fp8(x_bsk, x_scale, down_rk)


@_operator(
    cuda=lambda *arguments: _gpu().low_rank_into(*arguments),
    fake=lambda *_: None,
    mutates=("x_bsw",),
)
def low_rank_into(x_bsw: Tensor, down_rk: Tensor, factor_r: Tensor) -> None:
    """Do `reference.low_rank_into`, in place."""
    reference.low_rank_into(x_bsw, down_rk, factor_r)


@_operator(
    cuda=lambda *arguments: _gpu().with_low_rank(*arguments),
    fake=lambda x, x_scale, down, factor, spare: _fp8_like(x, x.shape[-1], spare),
)
def with_low_rank(
    x_bsk: Tensor, x_scale: Tensor, down_rk: Tensor, factor_r: Tensor, spare: int
) -> tuple[Tensor, Tensor]:
    """Return `reference.with_low_rank`: (float8, scales)."""
    return reference.with_low_rank(x_bsk, x_scale, down_rk, factor_r, spare)
