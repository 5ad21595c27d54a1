# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The Triton kernels and how they are launched. The twins in ``reference.py`` define what each computes.

All of them move each byte once and are memory-bound; block shapes were chosen on an H200 at 4224 rows of 4096 and
12288. A program handles whole rows, so that a row's norm and its fp8 scale need no second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_accel.kernels.sizes import ceil_div, next_power_of_2

#: Rows that a program of the norm kernel handles together. It reads the modulation vectors once. With the loops below,
#: and the warps for a row of 4096, by whether it quantizes, it was the fastest of 36 on an H200 (40 and 37 us).
_ROWS = 2
_LOOPS = {True: 8, False: 1}
_MANY_ROWS = 2048  # with fewer, a program loops once, or there would be fewer programs than multiprocessors
_NORM_WARPS = {True: 4, False: 8}


@triton.jit
def _fp8_scale(amax):
    return tl.maximum(amax, 1e-12) / 448.0


@triton.jit(do_not_specialize=["tokens"])  # or it would be compiled again for a number that 16 does not divide
def _norm_modulate_kernel(
    X, BRANCH, GATE, WEIGHT, SCALE, SHIFT, X_OUT, Y, Y_SCALE, tokens, eps, WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr, QUANTIZE: tl.constexpr, ROWS: tl.constexpr, LOOPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    start = batch * tokens * WIDTH  # 64 bits once; within a batch element 32 bits do
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    dtype = X.dtype.element_ty
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(SCALE + batch * WIDTH + column, mask=inside, other=0.0)[None, :]
    shift = tl.load(SHIFT + batch * WIDTH + column, mask=inside, other=0.0)[None, :]
    if HAS_BRANCH:
        gate = tl.load(GATE + batch * WIDTH + column, mask=inside, other=0.0)[None, :]
    for i in range(LOOPS):
        token = (tl.program_id(0) * LOOPS + i) * ROWS + tl.arange(0, ROWS)
        at = token[:, None] * WIDTH + column[None, :]
        here = (token < tokens)[:, None] & inside[None, :]
        x = tl.load(X + start + at, mask=here, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            branch = tl.load(BRANCH + start + at, mask=here, other=0.0).to(tl.float32)
            x = (x + (gate * branch).to(dtype).to(tl.float32)).to(dtype)
            tl.store(X_OUT + start + at, x, mask=here)
            x = x.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
        y = ((x * inverse).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        y = (y * scale + shift).to(dtype)
        if QUANTIZE:
            y = y.to(tl.float32)  # zero outside the row: so are weight, scale and shift
            fp8_scale = _fp8_scale(tl.max(tl.abs(y), 1))
            tl.store(Y + start + at, (y * (1.0 / fp8_scale)[:, None]).to(tl.float8e4nv), mask=here)
            tl.store(Y_SCALE + batch * tokens + token, fp8_scale, mask=token < tokens)
        else:
            tl.store(Y + start + at, y, mask=here)


@triton.jit(do_not_specialize=["tokens"])
def _gated_add_kernel(X, BRANCH, GATE, OUT, tokens, width, BLOCK: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tokens + tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(X + row * width + column, mask=inside)
    branch = tl.load(BRANCH + row * width + column, mask=inside).to(tl.float32)
    gate = tl.load(GATE + batch * width + column, mask=inside)
    added = (gate * branch).to(x.dtype).to(tl.float32)
    tl.store(OUT + row * width + column, (x.to(tl.float32) + added).to(x.dtype), mask=inside)


@triton.jit
def _quantize_rows_kernel(X, Y, Y_SCALE, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(X + row * width + column, mask=inside, other=0.0).to(tl.float32)
    fp8_scale = _fp8_scale(tl.max(tl.abs(x), 0))
    tl.store(Y + row * width + column, (x * (1.0 / fp8_scale)).to(tl.float8e4nv), mask=inside)
    tl.store(Y_SCALE + row, fp8_scale)


@triton.jit
def _gelu(x):
    """GELU as ``x * sigmoid(x * p(x * x))``, cheaper than with erf and within 3e-5 of it.

    p is a minimax-weighted least-squares fit of logit(Phi(x)) / x over [0, 6]; beyond 6 it stays constant.
    """
    x2 = tl.minimum(x * x, 36.0)
    logit = x * (1.59501569 + x2 * (0.0740111359 - 0.00070304348 * x2))
    return x / (1.0 + tl.exp(-logit))


@triton.jit
def _gelu_mul_chunk(GATE, UP, column, width):
    inside = column < width
    gate = tl.load(GATE + column, mask=inside, other=0.0)
    up = tl.load(UP + column, mask=inside, other=0.0).to(tl.float32)
    return _gelu(gate.to(tl.float32)).to(gate.dtype).to(tl.float32) * up


@triton.jit
def _gelu_mul_quantize_kernel(GATE_UP, Y, Y_SCALE, width, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """A row is up to four chunks of BLOCK, held in registers until its largest value is known."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    gate = GATE_UP + row * 2 * width
    up = gate + width
    y0 = _gelu_mul_chunk(gate, up, column, width)
    amax = tl.max(tl.abs(y0), 0)
    if CHUNKS > 1:
        y1 = _gelu_mul_chunk(gate, up, column + BLOCK, width)
        amax = tl.maximum(amax, tl.max(tl.abs(y1), 0))
    if CHUNKS > 2:
        y2 = _gelu_mul_chunk(gate, up, column + 2 * BLOCK, width)
        amax = tl.maximum(amax, tl.max(tl.abs(y2), 0))
    if CHUNKS > 3:
        y3 = _gelu_mul_chunk(gate, up, column + 3 * BLOCK, width)
        amax = tl.maximum(amax, tl.max(tl.abs(y3), 0))
    fp8_scale = _fp8_scale(amax)
    inverse = 1.0 / fp8_scale
    out = Y + row * width + column
    tl.store(out, (y0 * inverse).to(tl.float8e4nv), mask=column < width)
    if CHUNKS > 1:
        tl.store(out + BLOCK, (y1 * inverse).to(tl.float8e4nv), mask=column + BLOCK < width)
    if CHUNKS > 2:
        tl.store(out + 2 * BLOCK, (y2 * inverse).to(tl.float8e4nv), mask=column + 2 * BLOCK < width)
    if CHUNKS > 3:
        tl.store(out + 3 * BLOCK, (y3 * inverse).to(tl.float8e4nv), mask=column + 3 * BLOCK < width)
    tl.store(Y_SCALE + row, fp8_scale)


@triton.jit
def _gelu_mul_kernel(GATE_UP, Y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = GATE_UP + row * 2 * width
    y = _gelu_mul_chunk(gate, gate + width, column, width)
    tl.store(Y + row * width + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _qk_norm_rope_kernel(
    QKV, WEIGHT_Q, WEIGHT_K, COS, SIN, Q, K, V_AMAX, eps, heads, FIND_AMAX: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, HALF)
    first = dim < D // 2
    inside = (head < heads)[:, None] & first[None, :]
    cos1 = tl.load(COS + row * D + dim, mask=first, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(SIN + row * D + dim, mask=first, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(COS + row * D + D // 2 + dim, mask=first, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(SIN + row * D + D // 2 + dim, mask=first, other=0.0).to(tl.float32)[None, :]
    at = head[:, None] * D + dim[None, :]
    for which in tl.static_range(2):
        source = QKV + row * 3 * heads * D + which * heads * D + at
        x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        WEIGHT = WEIGHT_Q if which == 0 else WEIGHT_K
        OUT = Q if which == 0 else K
        x1 = x1 * inverse * tl.load(WEIGHT + dim, mask=first, other=0.0).to(tl.float32)[None, :]
        x2 = x2 * inverse * tl.load(WEIGHT + D // 2 + dim, mask=first, other=0.0).to(tl.float32)[None, :]
        out = OUT + row * heads * D + at
        tl.store(out, (x1 * cos1 - x2 * sin1).to(OUT.dtype.element_ty), mask=inside)
        tl.store(out + D // 2, (x2 * cos2 + x1 * sin2).to(OUT.dtype.element_ty), mask=inside)
    if FIND_AMAX:
        source = QKV + row * 3 * heads * D + 2 * heads * D + at
        v1 = tl.abs(tl.load(source, mask=inside, other=0.0).to(tl.float32))
        v2 = tl.abs(tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32))
        tl.atomic_max(V_AMAX, tl.max(tl.max(tl.maximum(v1, v2), 1), 0))


@triton.jit
def _quantize_values_kernel(QKV, V_AMAX, V, SCALE, width, BLOCK: tl.constexpr):
    """The values of a fused projection with one scale for all, which is also written once per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    fp8_scale = _fp8_scale(tl.load(V_AMAX))
    v = tl.load(QKV + row * 3 * width + 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(V + row * width + column, (v * (1.0 / fp8_scale)).to(tl.float8e4nv), mask=inside)
    tl.store(SCALE + row, fp8_scale)


def norm_modulate(
    x_bsh: Tensor,
    branch_bsh: Tensor | None,
    gate_b1h: Tensor | None,
    weight_h: Tensor,
    scale_b1h: Tensor,
    shift_b1h: Tensor,
    eps: float,
    quantize: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (x + gate * branch, its modulated norm, and the norm's scales if it is quantized)."""
    batch, tokens, width = x_bsh.shape
    x_bsh = x_bsh.contiguous()
    x_out = x_bsh if branch_bsh is None else torch.empty_like(x_bsh)
    y = torch.empty_like(x_bsh, dtype=torch.float8_e4m3fn if quantize else x_bsh.dtype)
    y_scale = x_bsh.new_empty(batch * tokens, 1, dtype=torch.float32) if quantize else None
    loops = _LOOPS[quantize] if batch * tokens >= _MANY_ROWS else 1
    _norm_modulate_kernel[(ceil_div(tokens, _ROWS * loops), batch)](
        x_bsh,
        x_bsh if branch_bsh is None else branch_bsh.contiguous(),
        scale_b1h if gate_b1h is None else gate_b1h.contiguous(),
        weight_h,
        scale_b1h.contiguous(),
        shift_b1h.contiguous(),
        x_out,
        y,
        y if y_scale is None else y_scale,
        tokens,
        eps,
        WIDTH=width,
        HAS_BRANCH=branch_bsh is not None,
        QUANTIZE=quantize,
        ROWS=_ROWS,
        LOOPS=loops,
        BLOCK=next_power_of_2(width),
        num_warps=min(_warps(width), _NORM_WARPS[quantize]),
    )
    return x_out, y, y_scale


def gated_add(x_bsh: Tensor, branch_bsh: Tensor, gate_b1h: Tensor) -> Tensor:
    """Return ``x + gate * branch``."""
    batch, tokens, width = x_bsh.shape
    x_bsh = x_bsh.contiguous()
    out = torch.empty_like(x_bsh)
    _gated_add_kernel[(tokens, batch)](
        x_bsh, branch_bsh.contiguous(), gate_b1h.contiguous(), out, tokens, width,
        BLOCK=next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return out


def quantize_rows(x_bsk: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows in float8 and their scales."""
    x_bsk, width = x_bsk.contiguous(), x_bsk.shape[-1]
    rows = x_bsk.numel() // width
    y, scale = torch.empty_like(x_bsk, dtype=torch.float8_e4m3fn), x_bsk.new_empty(rows, 1, dtype=torch.float32)
    _quantize_rows_kernel[(rows,)](x_bsk, y, scale, width, BLOCK=next_power_of_2(width), num_warps=_warps(width))
    return y, scale


def gelu_mul(gate_up_bs2f: Tensor, quantize: bool) -> tuple[Tensor, Tensor | None]:
    """Return gelu(gate) * up, and its scales if it is quantized."""
    gate_up_bs2f, width = gate_up_bs2f.contiguous(), gate_up_bs2f.shape[-1] // 2
    rows = gate_up_bs2f.numel() // (2 * width)
    shape = (*gate_up_bs2f.shape[:-1], width)
    if not quantize:
        y, block = gate_up_bs2f.new_empty(shape), min(4096, next_power_of_2(width))
        _gelu_mul_kernel[(rows, ceil_div(width, block))](gate_up_bs2f, y, width, BLOCK=block, num_warps=8)
        return y, None
    y = gate_up_bs2f.new_empty(shape, dtype=torch.float8_e4m3fn)
    scale = gate_up_bs2f.new_empty(rows, 1, dtype=torch.float32)
    chunks, block = _chunks(width)
    _gelu_mul_quantize_kernel[(rows,)](
        gate_up_bs2f, y, scale, width, CHUNKS=chunks, BLOCK=block, num_warps=2 * _warps(block)
    )
    return y, scale


def qk_norm_rope(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return queries and keys [B, S, N, D]."""
    return _qk_norm_rope(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps, qkv_bs3h.dtype, None)


def qkv_fp8(
    qkv_bs3h: Tensor, weight_q_d: Tensor, weight_k_d: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys and values in float8 [B, S, N, D], and the values' scale once for each row [B * S, 1]."""
    qkv_bs3h = qkv_bs3h.contiguous()
    amax = torch.zeros(1, device=qkv_bs3h.device)
    fp8 = torch.float8_e4m3fn
    q, k = _qk_norm_rope(qkv_bs3h, weight_q_d, weight_k_d, cos_bs1d, sin_bs1d, heads, eps, fp8, amax)
    width = qkv_bs3h.shape[-1] // 3
    rows = qkv_bs3h.numel() // (3 * width)
    v, scale = torch.empty_like(q), amax.new_empty(rows, 1)
    _quantize_values_kernel[(rows,)](
        qkv_bs3h, amax, v, scale, width, BLOCK=next_power_of_2(width), num_warps=_warps(width)
    )
    return q, k, v, scale


def _qk_norm_rope(
    qkv_bs3h: Tensor,
    weight_q_d: Tensor,
    weight_k_d: Tensor,
    cos_bs1d: Tensor,
    sin_bs1d: Tensor,
    heads: int,
    eps: float,
    dtype: torch.dtype,
    v_amax: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv_bs3h.shape
    size = width // (3 * heads)
    q, k = (qkv_bs3h.new_empty(batch, tokens, heads, size, dtype=dtype) for _ in range(2))
    _qk_norm_rope_kernel[(batch * tokens,)](
        qkv_bs3h.contiguous(), weight_q_d, weight_k_d, cos_bs1d.contiguous(), sin_bs1d.contiguous(), q, k,
        q if v_amax is None else v_amax, eps, heads, FIND_AMAX=v_amax is not None,
        D=size, HALF=next_power_of_2(size // 2), HEADS=next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    return q, k


def _warps(width: int) -> int:
    """Return the warps for a row: 16 values a thread, between 1 and 8 warps."""
    return max(1, min(8, next_power_of_2(width) // 512))


def _chunks(width: int) -> tuple[int, int]:
    """Return (number, power-of-two size) of the chunks that cover `width` with the least left over."""
    options = [(n, next_power_of_2(ceil_div(width, n))) for n in (1, 2, 3, 4)]
    return min(options, key=lambda option: (option[0] * option[1], option[0]))
