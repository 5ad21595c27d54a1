# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Group norm of channels-last pictures in Triton. The twins in ``reference.py`` define what each launcher computes.

A norm takes two passes over a picture, because its statistics cover the whole picture: one pass reads it, the other
reads and writes it. The first also adds the convolution's bias and the residual; the second applies SiLU. In this
layout neighbours in memory are channels, which belong to different groups. So statistics are gathered for each channel
and then for each group. Kernels are not specialized for sizes of pictures, or each size would compile its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_accel.kernels.sizes import ceil_div, next_power_of_2

_BLOCK = 128  # channels a program handles: one compiled kernel for all pictures with at least so many
_TILE = 2048  # values it holds together: its channels of some pixels
_PROGRAMS = 528  # that gather statistics of a picture: four for each multiprocessor of an H200, the best of five
_SIZE = 16  # channels that the program of a group has room for; more take another compiled kernel
_WARPS = 8


@triton.jit(do_not_specialize=["pixels", "rows_each"])
def _statistics_kernel(
    X, RESIDUAL, ADD, Y, PARTS, pixels, rows_each, channels, HAS_RESIDUAL: tl.constexpr, HAS_ADD: tl.constexpr,
    WRITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each channel of a part of the pixels: sums of the differences from its first, of their squares, that first.

    So squares stay small where the mean is large, and no digits are lost.
    """
    part, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    start = batch * pixels * channels  # 64 bits, as all that is multiplied with the pixels
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    dtype = X.dtype.element_ty
    first_at = start + part.to(tl.int64) * rows_each * channels + column
    first = tl.load(X + first_at, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADD:
        add = tl.load(ADD + column, mask=inside, other=0.0).to(tl.float32)
        first += add
    if HAS_RESIDUAL:
        first += tl.load(RESIDUAL + first_at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(0, rows_each, ROWS):
        pixel = part.to(tl.int64) * rows_each + i + tl.arange(0, ROWS)
        at = start + pixel[:, None] * channels + column[None, :]
        here = (pixel < pixels)[:, None] & inside[None, :]
        y = tl.load(X + at, mask=here, other=0.0).to(tl.float32)
        if HAS_ADD:
            y += add[None, :]
        if HAS_RESIDUAL:
            y += tl.load(RESIDUAL + at, mask=here, other=0.0).to(tl.float32)
        if WRITE:
            tl.store(Y + at, y.to(dtype), mask=here)
            y = y.to(dtype).to(tl.float32)
        difference = tl.where(here, y - first[None, :], 0.0)
        total += difference
        squares += difference * difference
    out = PARTS + (batch * tl.num_programs(0) + part) * 3 * channels + column
    tl.store(out, tl.sum(total, 0), mask=inside)
    tl.store(out + channels, tl.sum(squares, 0), mask=inside)
    tl.store(out + 2 * channels, first, mask=inside)


@triton.jit
def _some_parts(i, first_part, inside, parts, pixels, rows_each, channels, ROWS: tl.constexpr):
    """Return the offsets of ROWS parts from the i-th on, which of them exist, and how many pixels each covers."""
    part = i + tl.arange(0, ROWS)
    at = first_part[None, :] + part[:, None] * 3 * channels
    here = (part < parts)[:, None] & inside[None, :]
    return at, here, tl.minimum(rows_each, pixels - part * rows_each).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["parts", "pixels", "rows_each", "size"])
def _affine_of_group_kernel(
    PARTS, ADD, WEIGHT, BIAS, AFFINE, parts, pixels, rows_each, channels, size, eps, HAS_ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and variance (Chan, Golub and LeVeque) of a group of `size` channels from its parts, scale and shift."""
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    channel = group * size + column
    first_part = PARTS + batch * parts * 3 * channels + channel
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(0, parts, ROWS):
        at, here, count = _some_parts(i, first_part, inside, parts, pixels, rows_each, channels, ROWS)
        first = tl.load(at + 2 * channels, mask=here, other=0.0)
        sums += tl.where(here, count * first + tl.load(at, mask=here, other=0.0), 0.0)
    values = pixels.to(tl.float32) * size
    mean = tl.sum(tl.sum(sums, 0), 0) / values
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(0, parts, ROWS):
        at, here, count = _some_parts(i, first_part, inside, parts, pixels, rows_each, channels, ROWS)
        total = tl.load(at, mask=here, other=0.0)
        from_mean = tl.load(at + 2 * channels, mask=here, other=0.0) + total / count - mean
        within = tl.load(at + channels, mask=here, other=0.0) - total * total / count
        squares += tl.where(here, within + count * from_mean * from_mean, 0.0)
    variance = tl.sum(tl.sum(squares, 0), 0) / values
    scale = tl.rsqrt(variance + eps) * tl.load(WEIGHT + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(BIAS + channel, mask=inside, other=0.0).to(tl.float32) - mean * scale
    if HAS_ADD:
        shift += tl.load(ADD + channel, mask=inside, other=0.0).to(tl.float32) * scale
    out = AFFINE + batch * 2 * channels + channel
    tl.store(out, scale, mask=inside)
    tl.store(out + channels, shift, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _affine_kernel(
    X, AFFINE, Y, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    scale = tl.load(AFFINE + batch * 2 * channels + column, mask=inside, other=0.0)
    shift = tl.load(AFFINE + (batch * 2 + 1) * channels + column, mask=inside, other=0.0)
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (batch * pixels + pixel)[:, None] * channels + column[None, :]
    here = (pixel < pixels)[:, None] & inside[None, :]
    y = tl.load(X + at, mask=here, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=here)


def group_norm_affine(
    x_bchw: Tensor, add_c: Tensor | None, weight_c: Tensor, bias_c: Tensor, groups: int, eps: float
) -> Tensor:
    """Return the scale and shift [B, 2, C] of each channel."""
    return _affine_of(_channels_last(x_bchw), None, add_c, None, weight_c, bias_c, groups, eps)


def add_group_norm_affine(
    x_bchw: Tensor,
    residual_bchw: Tensor | None,
    add_c: Tensor | None,
    weight_c: Tensor,
    bias_c: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the sum, channels-last, and the scale and shift [B, 2, C] of each channel."""
    x_bchw = _channels_last(x_bchw)
    residual_bchw = None if residual_bchw is None else _channels_last(residual_bchw)
    y_bchw = torch.empty_like(x_bchw)
    return y_bchw, _affine_of(x_bchw, residual_bchw, add_c, y_bchw, weight_c, bias_c, groups, eps)


def affine(x_bchw: Tensor, affine_b2c: Tensor, silu: bool) -> Tensor:
    """Return ``x * scale + shift``, or SiLU of it, channels-last."""
    x_bchw = _channels_last(x_bchw)
    batch, channels, height, width = x_bchw.shape
    y_bchw, (rows, block) = torch.empty_like(x_bchw), _tile(channels)
    _affine_kernel[(ceil_div(height * width, rows), ceil_div(channels, block), batch)](
        x_bchw, affine_b2c, y_bchw, height * width, channels, SILU=silu, ROWS=rows, BLOCK=block, num_warps=_WARPS
    )
    return y_bchw


def _affine_of(
    x_bchw: Tensor,
    residual_bchw: Tensor | None,
    add_c: Tensor | None,
    y_bchw: Tensor | None,
    weight_c: Tensor,
    bias_c: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    batch, channels, height, width = x_bchw.shape
    pixels, (rows, block) = height * width, _tile(channels)
    columns = ceil_div(channels, block)
    rows_each = rows * ceil_div(pixels, rows * max(1, _PROGRAMS // columns))
    parts = ceil_div(pixels, rows_each)
    parts_bp3c = x_bchw.new_empty(batch, parts, 3, channels, dtype=torch.float32)
    _statistics_kernel[(parts, columns, batch)](
        x_bchw,
        x_bchw if residual_bchw is None else residual_bchw,
        x_bchw if add_c is None else add_c,
        x_bchw if y_bchw is None else y_bchw,
        parts_bp3c,
        pixels,
        rows_each,
        channels,
        HAS_RESIDUAL=residual_bchw is not None,
        HAS_ADD=add_c is not None,
        WRITE=y_bchw is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=_WARPS,
    )
    affine_b2c = parts_bp3c.new_empty(batch, 2, channels)
    # The norm is of the written sum, which includes the bias.
    apart = add_c if y_bchw is None else None
    size = channels // groups
    block = max(_SIZE, next_power_of_2(size))
    _affine_of_group_kernel[(groups, batch)](
        parts_bp3c, weight_c if apart is None else apart, weight_c, bias_c, affine_b2c, parts, pixels, rows_each,
        channels, size, eps, HAS_ADD=apart is not None, ROWS=max(1, 2048 // block), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return affine_b2c


def _channels_last(x_bchw: Tensor) -> Tensor:
    return x_bchw.contiguous(memory_format=torch.channels_last)


def _tile(channels: int) -> tuple[int, int]:
    """Return how many (pixels, channels) a program holds; channels is a power of two."""
    block = min(_BLOCK, next_power_of_2(channels))
    return _TILE // block, block
