# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The Triton kernels and how they are launched. The twins in ``reference.py`` define what each computes.

Before float8 a kernel leaves out some of the twin's roundings: of gate and product in a gated branch, and of a norm
after a shift.

All of them move each byte once and are memory-bound; block shapes were chosen on an H200, at the sizes of the three
families. A program handles whole rows, so that a row's norm and its fp8 scale need no second pass.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_accel.kernels.hopper import attention as hopper
from ernie_accel.kernels.reference import FP8_MAX, ROOM
from ernie_accel.kernels.sizes import ceil_div, next_power_of_2

#: Rows whose values a program looks at for the largest.
_V_ROWS = 8
#: Rows that a program of the low-rank kernel multiplies: 4224 keep all 132 multiprocessors of a Hopper card busy.
_LOW_RANK_ROWS = 32
#: The same where both operands are float8: their rows are the product's columns, so that 32 need no padding and the
#: ranks, 64 or 128 of them, are the rows. By these, the columns of a step of its loop: among the fastest of 13 on an
#: H200, where 4224 rows of 4096 take 6.3 us with 64 ranks and 9.7 with 128, and of 12288 17.5 and 25.1.
_FP8_LOW_RANK_ROWS = 32
_FP8_LOW_RANK_BLOCK = {64: 256, 128: 128}
_FP8_LOW_RANK_STAGES = 6  # steps of the loop that are under way together, where there is shared memory for so many
#: Tokens whose values a program lays out anew: a line of memory in float8.
_LAID_OUT_TOKENS = 128
#: Columns of a row that are not worth being cut any further.
_SMALLEST_CHUNK = 512


@triton.jit
def _fp8_scale(amax, TOP: tl.constexpr = 448.0):
    return tl.maximum(amax, 1e-12) / TOP


@triton.jit
def _add_branch(
    x, branch, inverse, BRANCH_WEIGHT, GATE, X_OUT, column, width, NORM_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr
):  # fmt: skip
    """Part of a row plus that of a branch; it is written, too."""
    inside = column < width
    dtype = x.dtype
    branch = branch.to(tl.float32)
    if NORM_BRANCH:
        weight = tl.load(BRANCH_WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
        branch = ((branch * inverse).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(GATE + column, mask=inside, other=0.0).to(tl.float32)
        branch = (gate * branch).to(dtype).to(tl.float32)
    x = (x.to(tl.float32) + branch).to(dtype)
    tl.store(X_OUT + column, x, mask=inside)
    return x


@triton.jit
def _modulate(
    x, inverse, WEIGHT, SCALE, SHIFT, column, WIDTH: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Part of a row, normed and modulated; zero outside the row."""
    inside = column < WIDTH
    dtype = x.dtype
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
    y = ((x.to(tl.float32) * inverse).to(dtype).to(tl.float32) * weight).to(dtype)
    if HAS_SCALE:
        y = y.to(tl.float32) * tl.load(SCALE + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        y = y.to(tl.float32) + tl.load(SHIFT + column, mask=inside, other=0.0).to(tl.float32)
    if not (HAS_SHIFT and QUANTIZE):  # float8 is made of the float32 sum: rounding that first is a slow conversion
        y = y.to(dtype)
    return y


@triton.jit
def _square(x):
    x = x.to(tl.float32)
    return x * x


@triton.jit
def _abs(x):
    return tl.abs(x.to(tl.float32))


@triton.jit(do_not_specialize=["tokens"])  # or it would be compiled again for a number that 16 does not divide
def _norm_modulate_kernel(
    X, BRANCH, BRANCH_WEIGHT, GATE, WEIGHT, SCALE, SHIFT, X_OUT, Y, Y_SCALE, tokens, gate_stride, scale_stride,
    shift_stride, pitch, eps, WIDTH: tl.constexpr, HAS_BRANCH: tl.constexpr, NORM_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, QUANTIZE: tl.constexpr,
    CHUNK: tl.constexpr, HAS_THIRD: tl.constexpr, SPARE: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """A row is two or three chunks of CHUNK columns. With SPARE, quantized rows are `pitch` apart.

    TOP is the largest value of a quantized row.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tokens + tl.program_id(0)
    at0 = tl.arange(0, CHUNK)
    at1, at2 = CHUNK + at0, 2 * CHUNK + at0
    inside0, inside1, inside2 = at0 < WIDTH, at1 < WIDTH, at2 < WIDTH
    x, branch, x_out = X + row * WIDTH, BRANCH + row * WIDTH, X_OUT + row * WIDTH
    # The whole row is read first, so that all of it is under way at once. One row a program, with its vectors read
    # again, beat several rows, at once or in a loop (39 us vs 41 to 60, 2304 columns, H200): it needs few registers,
    # so that many programs wait for memory together.
    x0 = tl.load(x + at0, mask=inside0, other=0.0)
    x1 = tl.load(x + at1, mask=inside1, other=0.0)
    if HAS_THIRD:
        x2 = tl.load(x + at2, mask=inside2, other=0.0)
    if HAS_BRANCH:
        branch0 = tl.load(branch + at0, mask=inside0, other=0.0)
        branch1 = tl.load(branch + at1, mask=inside1, other=0.0)
        if HAS_THIRD:
            branch2 = tl.load(branch + at2, mask=inside2, other=0.0)
        inverse = 1.0
        if NORM_BRANCH:
            squares = _square(branch0) + _square(branch1)
            if HAS_THIRD:
                squares += _square(branch2)
            inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
        gate = GATE + batch * gate_stride
        x0 = _add_branch(x0, branch0, inverse, BRANCH_WEIGHT, gate, x_out, at0, WIDTH, NORM_BRANCH, HAS_GATE)
        x1 = _add_branch(x1, branch1, inverse, BRANCH_WEIGHT, gate, x_out, at1, WIDTH, NORM_BRANCH, HAS_GATE)
        if HAS_THIRD:
            x2 = _add_branch(x2, branch2, inverse, BRANCH_WEIGHT, gate, x_out, at2, WIDTH, NORM_BRANCH, HAS_GATE)
    squares = _square(x0) + _square(x1)
    if HAS_THIRD:
        squares += _square(x2)
    inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    scale, shift = SCALE + batch * scale_stride, SHIFT + batch * shift_stride
    y0 = _modulate(x0, inverse, WEIGHT, scale, shift, at0, WIDTH, HAS_SCALE, HAS_SHIFT, QUANTIZE)
    y1 = _modulate(x1, inverse, WEIGHT, scale, shift, at1, WIDTH, HAS_SCALE, HAS_SHIFT, QUANTIZE)
    if HAS_THIRD:
        y2 = _modulate(x2, inverse, WEIGHT, scale, shift, at2, WIDTH, HAS_SCALE, HAS_SHIFT, QUANTIZE)
    if QUANTIZE:
        largest = tl.maximum(_abs(y0), _abs(y1))
        if HAS_THIRD:
            largest = tl.maximum(largest, _abs(y2))
        fp8_scale = _fp8_scale(tl.max(largest, 0), TOP)
        factor = 1.0 / fp8_scale
        y = Y + row * (pitch if SPARE else WIDTH)
        tl.store(y + at0, (y0.to(tl.float32) * factor).to(tl.float8e4nv), mask=inside0)
        tl.store(y + at1, (y1.to(tl.float32) * factor).to(tl.float8e4nv), mask=inside1)
        if HAS_THIRD:
            tl.store(y + at2, (y2.to(tl.float32) * factor).to(tl.float8e4nv), mask=inside2)
        tl.store(Y_SCALE + row, fp8_scale)
    else:
        y = Y + row * WIDTH
        tl.store(y + at0, y0, mask=inside0)
        tl.store(y + at1, y1, mask=inside1)
        if HAS_THIRD:
            tl.store(y + at2, y2, mask=inside2)


@triton.jit(do_not_specialize=["tokens"])
def _gated_add_kernel(
    X, BRANCH, BRANCH_WEIGHT, GATE, OUT, tokens, gate_stride, width, eps, NORM_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tokens + tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(X + row * width + column, mask=inside)
    branch = tl.load(BRANCH + row * width + column, mask=inside, other=0.0)
    inverse = 1.0
    if NORM_BRANCH:
        inverse = tl.rsqrt(tl.sum(_square(branch), 0) / width + eps)
    gate = GATE + batch * gate_stride
    _add_branch(
        x, branch, inverse, BRANCH_WEIGHT, gate, OUT + row * width, column, width, NORM_BRANCH, HAS_GATE
    )  # fmt: skip


@triton.jit
def _tanh(x):
    """Tanh by the exponential; near zero, where that cancels, by its series."""
    return tl.where(tl.abs(x) < 0.05, x * (1.0 - x * x / 3.0), 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)


@triton.jit
def _scales_and_gates_kernel(MOD, OUT, width, BLOCK: tl.constexpr):
    """Of four vectors side by side the first and the third are scales, the others gates."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(MOD + row * width + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    y = tl.where(row % 2 == 0, 1.0 + wide, _tanh(wide))
    tl.store(OUT + row * width + column, y.to(x.dtype), mask=inside)


@triton.jit
def _quantize_rows_kernel(
    X, Y, Y_SCALE, width, pitch, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, TOP: tl.constexpr
):
    """A row is up to three chunks of so many columns, held in registers until its largest value is known."""
    row = tl.program_id(0).to(tl.int64)
    x, y = X + row * width, Y + row * pitch
    at0 = tl.arange(0, FIRST)
    x0 = tl.load(x + at0, mask=at0 < width, other=0.0)
    amax = tl.max(_abs(x0), 0)
    if SECOND > 0:
        at1 = FIRST + tl.arange(0, SECOND)
        x1 = tl.load(x + at1, mask=at1 < width, other=0.0)
        amax = tl.maximum(amax, tl.max(_abs(x1), 0))
    if THIRD > 0:
        at2 = FIRST + SECOND + tl.arange(0, THIRD)
        x2 = tl.load(x + at2, mask=at2 < width, other=0.0)
        amax = tl.maximum(amax, tl.max(_abs(x2), 0))
    fp8_scale = _fp8_scale(amax, TOP)
    inverse = 1.0 / fp8_scale
    tl.store(y + at0, (x0.to(tl.float32) * inverse).to(tl.float8e4nv), mask=at0 < width)
    if SECOND > 0:
        tl.store(y + at1, (x1.to(tl.float32) * inverse).to(tl.float8e4nv), mask=at1 < width)
    if THIRD > 0:
        tl.store(y + at2, (x2.to(tl.float32) * inverse).to(tl.float8e4nv), mask=at2 < width)
    tl.store(Y_SCALE + row, fp8_scale)


@triton.jit
def _times_sigmoid(x, logit):
    """``x / (1 + exp(-logit))``, without the checks that a division takes."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * logit))
    return x * root * root


@triton.jit
def _gelu(x):
    """GELU as ``x * sigmoid(x * p(x * x))``, cheaper than with erf and within 3e-5 of it.

    p is a minimax-weighted least-squares fit of logit(Phi(x)) / x over [0, 6]; beyond 6 it stays constant.
    """
    x2 = tl.minimum(x * x, 36.0)
    logit = x * (1.59501569 + x2 * (0.0740111359 - 0.00070304348 * x2))
    return _times_sigmoid(x, logit)


@triton.jit
def _gated_chunk(GATE, UP, column, width, SILU: tl.constexpr, ROUND: tl.constexpr):
    inside = column < width
    gate = tl.load(GATE + column, mask=inside, other=0.0)
    up = tl.load(UP + column, mask=inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    x = _times_sigmoid(x, x) if SILU else _gelu(x)
    if ROUND:
        x = x.to(gate.dtype).to(tl.float32)
    return x * up


@triton.jit
def _gated_quantize_kernel(
    GATE_UP, Y, Y_SCALE, width, pitch, SILU: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    THIRD: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """A row is up to three chunks of so many columns, held in registers until its largest value is known.

    Nothing is rounded before then: each value would take a slow conversion.
    """
    row = tl.program_id(0).to(tl.int64)
    gate = GATE_UP + row * 2 * width
    up = gate + width
    at0 = tl.arange(0, FIRST)
    y0 = _gated_chunk(gate, up, at0, width, SILU, False)
    amax = tl.max(tl.abs(y0), 0)
    if SECOND > 0:
        at1 = FIRST + tl.arange(0, SECOND)
        y1 = _gated_chunk(gate, up, at1, width, SILU, False)
        amax = tl.maximum(amax, tl.max(tl.abs(y1), 0))
    if THIRD > 0:
        at2 = FIRST + SECOND + tl.arange(0, THIRD)
        y2 = _gated_chunk(gate, up, at2, width, SILU, False)
        amax = tl.maximum(amax, tl.max(tl.abs(y2), 0))
    fp8_scale = _fp8_scale(amax, TOP)
    inverse = 1.0 / fp8_scale
    out = Y + row * pitch
    tl.store(out + at0, (y0 * inverse).to(tl.float8e4nv), mask=at0 < width)
    if SECOND > 0:
        tl.store(out + at1, (y1 * inverse).to(tl.float8e4nv), mask=at1 < width)
    if THIRD > 0:
        tl.store(out + at2, (y2 * inverse).to(tl.float8e4nv), mask=at2 < width)
    tl.store(Y_SCALE + row, fp8_scale)


@triton.jit
def _gated_kernel(GATE_UP, Y, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = GATE_UP + row * 2 * width
    y = _gated_chunk(gate, gate + width, column, width, SILU, True)
    tl.store(Y + row * width + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _rotated_quarter(x, WEIGHT, COS, SIN, inverse, N: tl.constexpr, D: tl.constexpr, HEADS, BLOCK: tl.constexpr):
    """Quarter N of the heads of a row, normed and rotated in pairs: the even dimensions and the odd ones."""
    dim, pair = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    weight = tl.load(WEIGHT + N * (D // 4) + dim, mask=dim < D // 4, other=0.0).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(x * inverse * weight, (HEADS, BLOCK // 2, 2)))
    cos = tl.load(COS + N * (D // 8) + pair, mask=pair < D // 8, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + N * (D // 8) + pair, mask=pair < D // 8, other=0.0).to(tl.float32)[None, :]
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _norm_rotate_and_mix(
    SOURCE, WEIGHT, COS, SIN, OUT, heads, eps, D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """The heads of a row: normed, rotated in pairs, and the quarters of each mixed; rounded once, at the end.

    Each thread holds the same elements of all four quarters.
    """
    head, dim = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (dim < D // 4)[None, :]
    at = head[:, None] * D + dim[None, :]
    x0 = tl.load(SOURCE + at, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(SOURCE + D // 4 + at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(SOURCE + D // 2 + at, mask=inside, other=0.0).to(tl.float32)
    x3 = tl.load(SOURCE + 3 * (D // 4) + at, mask=inside, other=0.0).to(tl.float32)
    # Half of each, for the mean of the mixing: its matrix has entries of 1 / 2.
    inverse = 0.5 * tl.rsqrt(tl.sum(x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3, 1) / D + eps)[:, None]
    even0, odd0 = _rotated_quarter(x0, WEIGHT, COS, SIN, inverse, 0, D, HEADS, BLOCK)
    even1, odd1 = _rotated_quarter(x1, WEIGHT, COS, SIN, inverse, 1, D, HEADS, BLOCK)
    even2, odd2 = _rotated_quarter(x2, WEIGHT, COS, SIN, inverse, 2, D, HEADS, BLOCK)
    even3, odd3 = _rotated_quarter(x3, WEIGHT, COS, SIN, inverse, 3, D, HEADS, BLOCK)
    even0, even1, odd0, odd1 = even0 + even1, even0 - even1, odd0 + odd1, odd0 - odd1
    even2, even3, odd2, odd3 = even2 + even3, even2 - even3, odd2 + odd3, odd2 - odd3
    y0 = tl.reshape(tl.join(even0 + even2, odd0 + odd2), (HEADS, BLOCK))
    y1 = tl.reshape(tl.join(even1 + even3, odd1 + odd3), (HEADS, BLOCK))
    y2 = tl.reshape(tl.join(even0 - even2, odd0 - odd2), (HEADS, BLOCK))
    y3 = tl.reshape(tl.join(even1 - even3, odd1 - odd3), (HEADS, BLOCK))
    tl.store(OUT + at, y0.to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT + D // 4 + at, y1.to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT + D // 2 + at, y2.to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT + 3 * (D // 4) + at, y3.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _norm_and_rotate(
    SOURCE, WEIGHT, COS, SIN, OUT, heads, eps, PAIRS: tl.constexpr, MIX: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The heads of a row: normed, then rotated, dimension i with i + D / 2, or with PAIRS 2 i with 2 i + 1.

    COS and SIN have one value for each dimension, or with PAIRS for each pair. With PAIRS and MIX, their quarters are
    mixed last.
    """
    head = tl.arange(0, HEADS)
    if PAIRS and MIX and D % 8 == 0:
        _norm_rotate_and_mix(SOURCE, WEIGHT, COS, SIN, OUT, heads, eps, D, HALF // 2, HEADS)
    elif PAIRS:
        dim = tl.arange(0, 2 * HALF)
        inside = (head < heads)[:, None] & (dim < D)[None, :]
        at = head[:, None] * D + dim[None, :]
        x = tl.load(SOURCE + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * inverse * tl.load(WEIGHT + dim, mask=dim < D, other=0.0).to(tl.float32)[None, :]
        even, odd = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
        pair = tl.arange(0, HALF)
        cos = tl.load(COS + pair, mask=pair < D // 2, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(SIN + pair, mask=pair < D // 2, other=0.0).to(tl.float32)[None, :]
        y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, 2 * HALF))
        tl.store(OUT + at, y.to(OUT.dtype.element_ty), mask=inside)
    else:
        dim = tl.arange(0, HALF)
        first = dim < D // 2
        inside = (head < heads)[:, None] & first[None, :]
        cos1 = tl.load(COS + dim, mask=first, other=0.0).to(tl.float32)[None, :]
        sin1 = tl.load(SIN + dim, mask=first, other=0.0).to(tl.float32)[None, :]
        cos2 = tl.load(COS + D // 2 + dim, mask=first, other=0.0).to(tl.float32)[None, :]
        sin2 = tl.load(SIN + D // 2 + dim, mask=first, other=0.0).to(tl.float32)[None, :]
        at = head[:, None] * D + dim[None, :]
        x1 = tl.load(SOURCE + at, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(SOURCE + D // 2 + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        x1 = x1 * inverse * tl.load(WEIGHT + dim, mask=first, other=0.0).to(tl.float32)[None, :]
        x2 = x2 * inverse * tl.load(WEIGHT + D // 2 + dim, mask=first, other=0.0).to(tl.float32)[None, :]
        tl.store(OUT + at, (x1 * cos1 - x2 * sin1).to(OUT.dtype.element_ty), mask=inside)
        tl.store(OUT + D // 2 + at, (x2 * cos2 + x1 * sin2).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _qk_norm_rope_kernel(
    QKV, WEIGHT_Q, WEIGHT_K, COS, SIN, Q, K, V_AMAX, eps, rows, heads, kv_heads, FIND_AMAX: tl.constexpr,
    PAIRS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    V_ROWS: tl.constexpr,
):  # fmt: skip
    """FIND_AMAX is set when the outputs are float8: the first programs look at the values of V_ROWS rows each.

    Programs that looked at their own row's would take 45 us instead of 38 (NewBie-image, H200).
    """
    row_width = (heads + 2 * kv_heads) * D
    amax_programs = tl.cdiv(rows, V_ROWS) if FIND_AMAX else 0
    row = (tl.program_id(0) - amax_programs).to(tl.int64)
    if row >= 0:
        source = QKV + row * row_width
        table = row * (D // 2 if PAIRS else D)
        _norm_and_rotate(
            source, WEIGHT_Q, COS + table, SIN + table, Q + row * heads * D, heads, eps, PAIRS, FIND_AMAX, D, HALF,
            HEADS,
        )  # fmt: skip
        _norm_and_rotate(
            source + heads * D, WEIGHT_K, COS + table, SIN + table, K + row * kv_heads * D, kv_heads, eps, PAIRS,
            FIND_AMAX, D, HALF, KV_HEADS,
        )  # fmt: skip
    elif FIND_AMAX:
        column = tl.arange(0, KV_HEADS * 2 * HALF)
        largest = tl.zeros((KV_HEADS * 2 * HALF,), dtype=tl.float32)
        for i in tl.static_range(V_ROWS):
            v_row = tl.program_id(0).to(tl.int64) * V_ROWS + i
            inside = column < tl.where(v_row < rows, kv_heads * D, 0)
            v = tl.load(QKV + v_row * row_width + (heads + kv_heads) * D + column, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.abs(v.to(tl.float32)))
        tl.atomic_max(V_AMAX, tl.max(largest, 0))


@triton.jit
def _quantize_values_kernel(QKV, V_AMAX, V, SCALE, row_width, width, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """The values of a fused projection, its last columns, with one scale for all; times ROOM written once per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    fp8_scale = _fp8_scale(tl.load(V_AMAX))
    v = tl.load(QKV + (row + 1) * row_width - width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(V + row * width + column, (v * (1.0 / fp8_scale)).to(tl.float8e4nv), mask=inside)
    tl.store(SCALE + row, fp8_scale * ROOM)


@triton.jit(do_not_specialize=["tokens", "padded"])
def _lay_out_values_kernel(
    QKV, V_AMAX, V, SCALE, tokens, padded, kv_heads, row_width, D: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Quantize the values of a fused projection, with one scale for all, as ``hopper/attention.cu`` reads them.

    That is [B, N, D, padded], and within groups of 16 keys in its order; `padded` is a multiple of 16.
    """
    words = tl.multiple_of(padded // 4, 4)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    word = tl.program_id(0) * (TOKENS // 4) + tl.arange(0, TOKENS // 4)  # four tokens, which are transposed together
    token = word // 4 * 16 + word % 4 * 2
    dim = tl.arange(0, BLOCK)
    fp8_scale = _fp8_scale(tl.load(V_AMAX))
    source = QKV + batch * tokens * row_width + row_width - (kv_heads - head) * D
    packed = tl.zeros((TOKENS // 4, BLOCK), dtype=tl.int32)
    for i in tl.static_range(4):
        from_token = token + i % 2 + i // 2 * 8
        here = (from_token < tokens)[:, None] & (dim < D)[None, :]
        v = tl.load(source + from_token[:, None] * row_width + dim[None, :], mask=here, other=0.0).to(tl.float32)
        byte = (v * (1.0 / fp8_scale)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        packed |= byte.to(tl.int32) << (8 * i)
    to = ((batch * kv_heads + head) * D + dim)[:, None] * words + word[None, :]
    tl.store(V + to, tl.trans(packed), mask=(dim < D)[:, None] & (word < words)[None, :])
    if head == 0:
        row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        scale = tl.zeros((TOKENS,), dtype=tl.float32) + fp8_scale * ROOM
        tl.store(SCALE + batch * tokens + row, scale, mask=row < tokens)


@triton.jit(do_not_specialize=["rows"])
def _low_rank_kernel(
    X, X_SCALE, DOWN, OUT, rows, width, ranks, ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """Float8 rows times a few bfloat16 rows; the scale of each row comes last."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    column = tl.arange(0, BLOCK)
    x_at = X + row.to(tl.int64)[:, None] * width + column[None, :]
    down_at = DOWN + rank[None, :] * width + column[:, None]
    here, there = (row < rows)[:, None], (rank < ranks)[None, :]
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for k in range(0, width, BLOCK):
        inside = column < width - k
        x = tl.load(x_at + k, mask=here & inside[None, :], other=0.0).to(tl.float32).to(OPERANDS)
        down = tl.load(down_at + k, mask=there & inside[:, None], other=0.0)
        total += tl.dot(x, down.to(OPERANDS))
    total *= tl.load(X_SCALE + row, mask=row < rows, other=0.0)[:, None]
    tl.store(OUT + row.to(tl.int64)[:, None] * ranks + rank[None, :], total.to(OUT.dtype.element_ty), mask=here & there)


@triton.jit(do_not_specialize=["rows"])
def _fp8_low_rank_kernel(
    X, X_SCALE, DOWN, FACTOR, OUT, OUT_SCALE, rows, width, x_pitch, pitch, ranks, COPY: tl.constexpr,
    SHRINK: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Float8 rows times a few others, into the columns of OUT after the rows; zeros into those beyond the ranks.

    With COPY it also writes the rows there, times SHRINK, and their scales. Without, OUT is X.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    column = tl.arange(0, BLOCK)
    x_at = X + row.to(tl.int64)[:, None] * x_pitch + column[None, :]
    out_at = OUT + row.to(tl.int64)[:, None] * pitch
    down_at = DOWN + rank[:, None] * width + column[None, :]
    here, there = (row < rows)[:, None], (rank < ranks)[:, None]
    copies = row < tl.where(tl.program_id(1) == 0, rows, 0)  # once, by the first of the programs of these rows
    total = tl.zeros((RANKS, ROWS), dtype=tl.float32)
    for k in range(0, width, BLOCK):
        inside = (column < width - k)[None, :]
        x = tl.load(x_at + k, mask=here & inside, other=0.0)
        down = tl.load(down_at + k, mask=there & inside, other=0.0)
        total += tl.dot(down, tl.trans(x))
        if COPY:
            small = (x.to(tl.float32) * SHRINK).to(tl.float8e4nv)
            tl.store(out_at + k + column[None, :], small, mask=copies[:, None] & inside)
    factor = tl.load(FACTOR + rank, mask=rank < ranks, other=0.0)[:, None]
    low = tl.trans(tl.minimum(tl.maximum(total * (factor * SHRINK), -448.0), 448.0))
    tl.store(out_at + width + rank[None, :], low.to(tl.float8e4nv), mask=here & (rank < pitch - width)[None, :])
    for start in range(tl.num_programs(1) * RANKS, pitch - width, RANKS):  # by the first of them, too
        rank = start + tl.arange(0, RANKS)
        zeros = tl.zeros((ROWS, RANKS), dtype=tl.float32).to(tl.float8e4nv)
        tl.store(out_at + width + rank[None, :], zeros, mask=copies[:, None] & (rank < pitch - width)[None, :])
    if COPY:
        tl.store(OUT_SCALE + row, tl.load(X_SCALE + row, mask=copies, other=0.0) * (1.0 / SHRINK), mask=copies)


def norm_modulate(
    x_bsh: Tensor,
    branch_bsh: Tensor | None,
    gate_b1h: Tensor | None,
    weight_h: Tensor,
    scale_b1h: Tensor | None,
    shift_b1h: Tensor | None,
    eps: float,
    quantize: bool,
    branch_weight_h: Tensor | None = None,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (x + gate * branch, its modulated norm, and the norm's scales if it is quantized).

    What is None is left out. With `branch_weight_h`, the branch is normed first. `spare` columns that follow quantized
    rows are not written.
    """
    batch, tokens, width = x_bsh.shape
    x_bsh = x_bsh.contiguous()
    x_out = x_bsh if branch_bsh is None else torch.empty_like(x_bsh)
    y = x_bsh.new_empty(batch, tokens, width + spare, dtype=torch.float8_e4m3fn if quantize else x_bsh.dtype)
    y_scale = x_bsh.new_empty(batch * tokens, 1, dtype=torch.float32) if quantize else None
    vectors = [_vector(each, weight_h) for each in (gate_b1h, scale_b1h, shift_b1h)]
    chunk = next_power_of_2(ceil_div(width, 3))
    _norm_modulate_kernel[(tokens, batch)](
        x_bsh,
        x_bsh if branch_bsh is None else branch_bsh.contiguous(),
        weight_h if branch_weight_h is None else branch_weight_h,
        vectors[0][0],
        weight_h,
        vectors[1][0],
        vectors[2][0],
        x_out,
        y,
        y if y_scale is None else y_scale,
        tokens,
        *(stride for _, stride in vectors),
        width + spare,
        eps,
        WIDTH=width,
        HAS_BRANCH=branch_bsh is not None,
        NORM_BRANCH=branch_weight_h is not None,
        HAS_GATE=gate_b1h is not None,
        HAS_SCALE=scale_b1h is not None,
        HAS_SHIFT=shift_b1h is not None,
        QUANTIZE=quantize,
        CHUNK=chunk,
        HAS_THIRD=width > 2 * chunk,
        SPARE=spare > 0,
        TOP=_top(spare),
        num_warps=max(1, min(8, chunk // 256)),  # 8 columns of a chunk are the 16 bytes that a thread reads at once
    )
    return x_out, y, y_scale


def _top(spare: int) -> float:
    """Return the largest value of a quantized row."""
    return FP8_MAX / ROOM if spare else FP8_MAX


def _vector(x_b1h: Tensor | None, otherwise: Tensor) -> tuple[Tensor, int]:
    """Return a vector of each batch element as it lies, and how far they are apart; `otherwise` stands for none."""
    if x_b1h is None:
        return otherwise, 0
    if x_b1h.stride(-1) != 1:
        x_b1h = x_b1h.contiguous()
    return x_b1h, x_b1h.stride(0)


def gated_add(
    x_bsh: Tensor,
    branch_bsh: Tensor,
    gate_b1h: Tensor | None,
    branch_weight_h: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Return ``x + gate * branch``; with `branch_weight_h`, the branch is normed first."""
    batch, tokens, width = x_bsh.shape
    x_bsh = x_bsh.contiguous()
    out, (gate, gate_stride) = torch.empty_like(x_bsh), _vector(gate_b1h, x_bsh)
    _gated_add_kernel[(tokens, batch)](
        x_bsh, branch_bsh.contiguous(), x_bsh if branch_weight_h is None else branch_weight_h, gate, out, tokens,
        gate_stride, width, eps, NORM_BRANCH=branch_weight_h is not None, HAS_GATE=gate_b1h is not None,
        BLOCK=next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return out


def scales_and_gates(mod_b4h: Tensor) -> Tensor:
    """Return ``1 + scale`` and ``tanh(gate)`` of the attention, then of the MLP [B, 4, H]."""
    mod_b4h = mod_b4h.contiguous()
    batch, width = len(mod_b4h), mod_b4h.shape[-1] // 4
    out, block = mod_b4h.new_empty(batch, 4, width), min(1024, next_power_of_2(width))
    _scales_and_gates_kernel[(4 * batch, ceil_div(width, block))](mod_b4h, out, width, BLOCK=block, num_warps=4)
    return out


def quantize_rows(x_bsk: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Return the rows in float8 and their scales; `spare` columns that follow them are not written."""
    x_bsk, width = x_bsk.contiguous(), x_bsk.shape[-1]
    rows = x_bsk.numel() // width
    y = x_bsk.new_empty(*x_bsk.shape[:-1], width + spare, dtype=torch.float8_e4m3fn)
    scale = x_bsk.new_empty(rows, 1, dtype=torch.float32)
    first, second, third = _chunks(width)
    _quantize_rows_kernel[(rows,)](
        x_bsk, y, scale, width, width + spare, FIRST=first, SECOND=second, THIRD=third, TOP=_top(spare),
        num_warps=_warps(first),
    )  # fmt: skip
    return y, scale


def low_rank_fp8(x_bsk: Tensor, x_scale: Tensor, down_rk: Tensor) -> Tensor:
    """Return the product [B * S, R] of float8 rows and bfloat16 ones, in the dtype of the latter."""
    x_bsk, down_rk, width = x_bsk.contiguous(), down_rk.contiguous(), x_bsk.shape[-1]
    rows, ranks = x_bsk.numel() // width, len(down_rk)
    out, block = down_rk.new_empty(rows, ranks), min(64, max(16, next_power_of_2(ranks)))
    # Triton's interpreter would multiply bfloat16 as if it were integers.
    operands = tl.bfloat16 if isinstance(_low_rank_kernel, triton.JITFunction) else tl.float32
    _low_rank_kernel[(ceil_div(rows, _LOW_RANK_ROWS), ceil_div(ranks, block))](
        x_bsk, x_scale, down_rk, out, rows, width, ranks, ROWS=_LOW_RANK_ROWS, RANKS=block, BLOCK=128,
        OPERANDS=operands, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def low_rank_into(x_bsw: Tensor, down_rk: Tensor, factor_r: Tensor) -> None:
    """Write the product of float8 rows and `down_rk` into the columns that follow the rows, in place."""
    rows = x_bsw.numel() // x_bsw.shape[-1]
    _fp8_low_rank(x_bsw, factor_r, down_rk, factor_r, x_bsw, factor_r, rows, copy=False)


def with_low_rank(
    x_bsk: Tensor, x_scale: Tensor, down_rk: Tensor, factor_r: Tensor, spare: int
) -> tuple[Tensor, Tensor]:
    """Return float8 rows with `spare` columns, which have the product with `down_rk`, and their scales."""
    x_bsk, rows = x_bsk.contiguous(), len(x_scale)
    out, scale = x_bsk.new_empty(*x_bsk.shape[:-1], x_bsk.shape[-1] + spare), torch.empty_like(x_scale)
    _fp8_low_rank(x_bsk, x_scale, down_rk, factor_r, out, scale, rows, copy=True)
    return out, scale


def _fp8_low_rank(
    x: Tensor, x_scale: Tensor, down_rk: Tensor, factor_r: Tensor, out: Tensor, scale: Tensor, rows: int, *, copy: bool
) -> None:
    (ranks, width), pitch = down_rk.shape, out.shape[-1]
    at_once = 64 if ranks <= 64 else 128
    block = _FP8_LOW_RANK_BLOCK[at_once]
    stages = min(_FP8_LOW_RANK_STAGES, _shared_memory(x.device) // (block * (_FP8_LOW_RANK_ROWS + at_once)))
    _fp8_low_rank_kernel[(ceil_div(rows, _FP8_LOW_RANK_ROWS), ceil_div(ranks, at_once))](
        x, x_scale, down_rk, factor_r, out, scale, rows, width, x.shape[-1], pitch, ranks, COPY=copy,
        SHRINK=1 / ROOM if copy else 1.0, ROWS=_FP8_LOW_RANK_ROWS, RANKS=at_once, BLOCK=block, num_warps=4,
        num_stages=stages,
    )  # fmt: skip


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have; Triton's interpreter has no limit."""
    if device.type != "cuda":
        return 2**18
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def gelu_mul(gate_up_bs2f: Tensor, quantize: bool, spare: int = 0) -> tuple[Tensor, Tensor | None]:
    """Return gelu(gate) * up, and its scales if it is quantized; `spare` columns that follow are not written then."""
    return _gated(gate_up_bs2f, quantize, spare, silu=False)


def silu_mul(gate_up_bs2f: Tensor, quantize: bool, spare: int = 0) -> tuple[Tensor, Tensor | None]:
    """Return silu(gate) * up, and its scales if it is quantized; `spare` columns that follow are not written then."""
    return _gated(gate_up_bs2f, quantize, spare, silu=True)


def _gated(gate_up_bs2f: Tensor, quantize: bool, spare: int, *, silu: bool) -> tuple[Tensor, Tensor | None]:
    gate_up_bs2f, width = gate_up_bs2f.contiguous(), gate_up_bs2f.shape[-1] // 2
    rows = gate_up_bs2f.numel() // (2 * width)
    shape = (*gate_up_bs2f.shape[:-1], width)
    if not quantize:
        y, block = gate_up_bs2f.new_empty(shape), min(4096, next_power_of_2(width))
        _gated_kernel[(rows, ceil_div(width, block))](gate_up_bs2f, y, width, SILU=silu, BLOCK=block, num_warps=8)
        return y, None
    y = gate_up_bs2f.new_empty(*shape[:-1], width + spare, dtype=torch.float8_e4m3fn)
    scale = gate_up_bs2f.new_empty(rows, 1, dtype=torch.float32)
    first, second, third = _chunks(width)
    _gated_quantize_kernel[(rows,)](
        gate_up_bs2f, y, scale, width, width + spare, SILU=silu, FIRST=first, SECOND=second, THIRD=third,
        TOP=_top(spare), num_warps=_warps(first),
    )  # fmt: skip
    return y, scale


def qk_norm_rope(
    qkv_bsm: Tensor,
    weight_q_d: Tensor,
    weight_k_d: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    pairs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys [B, S, N, D]; keys and values may have fewer heads."""
    return _qk_norm_rope(qkv_bsm, weight_q_d, weight_k_d, cos, sin, heads, eps, pairs, qkv_bsm.dtype, None)


def qkv_fp8(
    qkv_bsm: Tensor,
    weight_q_d: Tensor,
    weight_k_d: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    pairs: bool = False,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys and values in float8 [B, S, N, D], and the scale of what attention makes of them [B * S, 1].

    That is the values' scale, for each row; where `spare` columns will follow, times ROOM. Values for the kernel of
    Hopper cards are laid out as it reads them (`hopper.attention.laid_out`).
    """
    qkv_bsm = qkv_bsm.contiguous()
    amax = torch.zeros(1, device=qkv_bsm.device)
    fp8 = torch.float8_e4m3fn
    q, k = _qk_norm_rope(qkv_bsm, weight_q_d, weight_k_d, cos, sin, heads, eps, pairs, fp8, amax)
    (batch, tokens, kv_heads, size), room = k.shape, ROOM if spare else 1.0
    scale = amax.new_empty(batch * tokens, 1)
    if hopper.takes(q):
        v = k.new_empty(hopper.shape_of_values(k.shape))
        _lay_out_values_kernel[(ceil_div(v.shape[-1], _LAID_OUT_TOKENS), kv_heads, batch)](
            qkv_bsm, amax, v.view(torch.int32), scale, tokens, v.shape[-1], kv_heads, qkv_bsm.shape[-1], D=size,
            BLOCK=next_power_of_2(size), TOKENS=_LAID_OUT_TOKENS, ROOM=room, num_warps=4,
        )  # fmt: skip
        return q, k, v, scale
    v, width = torch.empty_like(k), kv_heads * size
    _quantize_values_kernel[(batch * tokens,)](
        qkv_bsm, amax, v, scale, qkv_bsm.shape[-1], width, BLOCK=next_power_of_2(width), ROOM=room,
        num_warps=_warps(width),
    )  # fmt: skip
    return q, k, v, scale


def _qk_norm_rope(
    qkv_bsm: Tensor,
    weight_q_d: Tensor,
    weight_k_d: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    pairs: bool,
    dtype: torch.dtype,
    v_amax: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv_bsm.shape
    size = len(weight_q_d)
    kv_heads = (width // size - heads) // 2
    q, k = (qkv_bsm.new_empty(batch, tokens, n, size, dtype=dtype) for n in (heads, kv_heads))
    rows = batch * tokens
    programs = rows if v_amax is None else rows + ceil_div(rows, _V_ROWS)
    _qk_norm_rope_kernel[(programs,)](
        qkv_bsm.contiguous(), weight_q_d, weight_k_d, cos.contiguous(), sin.contiguous(), q, k,
        q if v_amax is None else v_amax, eps, rows, heads, kv_heads, FIND_AMAX=v_amax is not None, PAIRS=pairs,
        D=size, HALF=next_power_of_2(size // 2), HEADS=next_power_of_2(heads), KV_HEADS=next_power_of_2(kv_heads),
        V_ROWS=_V_ROWS, num_warps=4,
    )  # fmt: skip
    return q, k


def _warps(width: int) -> int:
    """Return the warps for a row: 16 values a thread, between 1 and 8 warps."""
    return max(1, min(8, next_power_of_2(width) // 512))


def _chunks(width: int) -> tuple[int, int, int]:
    """Return three powers of two, largest first, that cover `width` with the least left over; unused ones are 0.

    What is left over costs as much as what counts: 10240 in (8192, 2048) took 57 us where three of 4096 took 67, and
    9216 in (8192, 1024) 98 where they took 122 (4224 and 8448 rows, H200).
    """
    chunks: list[int] = []
    while width > 0 and len(chunks) < 2:
        largest = next_power_of_2(width)
        # The last fifth of a power of two is not worth a chunk of its own.
        chunk = largest if 5 * width > 4 * largest or largest <= _SMALLEST_CHUNK else largest // 2
        chunks.append(chunk)
        width -= chunk
    if width > 0:
        chunks.append(next_power_of_2(width))
    first, second, third = (*chunks, 0, 0)[:3]
    return first, second, third
