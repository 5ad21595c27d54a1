# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Triton kernels for one decoded token of a language model: every weight is read once, at the speed of the memory.

A decoder layer is five launches: norm and q, k, v; rotary embedding, cache and attention; output projection and
residual; norm, gate, up and activation; down projection and residual. The specification is the plain-torch forward in
``models/ministral/decoder.py``. One row (prompt) is a plain sum of products; 2 to 16 rows are one tensor-core product
of [features, K] by [K, rows] and cost little more. The norm's factor is applied to the product, not before it, so
streaming the weights need not wait for the norm. This rounds once where stock rounds twice. Letting a kernel start
before the one before it ends (programmatic dependent launch) made a token 7 % slower on an H200.

Shapes in names: b rows, h hidden size, n output features, k input features, d head size, p positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_accel.kernels.sizes import next_power_of_2

#: Rows a launch is padded to, which is also its maximum: the smallest width of a tensor-core product.
MAX_ROWS = 16
#: Output and input features of a weight are multiples of these.
MULTIPLE_N, MULTIPLE_K = 64, 16


class DecodeWeight(NamedTuple):
    """A weight [N, K] in bfloat16, or in float8 with its float32 scales [N]."""

    values_nk: Tensor
    scale_n: Tensor | None = None


@triton.jit
def _dequantize_kernel(W, S, OUT, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(S + row)
    for k in range(0, K, BLOCK):
        at = k + tl.arange(0, BLOCK)
        w = tl.load(W + row * K + at, mask=at < K, other=0.0).to(tl.float32)
        tl.store(OUT + row * K + at, (w * scale).to(OUT.dtype.element_ty), mask=at < K)


@triton.jit
def _product(
    W, X, NORM, feature, rows, K: tl.constexpr, HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The products [BLOCK_N, ROWS] of the weight's rows `feature` with ``x * norm``, and the mean squares of x."""
    offset = feature.to(tl.int64)[:, None] * K
    if ROWS == 1:  # without tensor cores: these need 16 rows, which costs more than they gain
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squared = tl.zeros((BLOCK_K,), tl.float32)
        for k in tl.static_range(0, K, BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            inside = at < K
            w = tl.load(W + offset + at[None, :], mask=inside[None, :], other=0.0)
            x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                squared += x * x
                x *= tl.load(NORM + at, mask=inside, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * x[None, :]
        product = tl.sum(sums, 1)[:, None]
        squares = tl.sum(squared, 0) + tl.zeros((1,), tl.float32)
    else:
        row = tl.arange(0, ROWS)
        product = tl.zeros((BLOCK_N, ROWS), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        for k in range(0, K, BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            inside = at < K
            w = tl.load(W + offset + at[None, :], mask=inside[None, :], other=0.0)
            x = tl.load(X + row[None, :] * K + at[:, None], mask=(row < rows)[None, :] & inside[:, None], other=0.0)
            if HAS_NORM:
                x32 = x.to(tl.float32)
                squares += tl.sum(x32 * x32, 0)
                x = (x32 * tl.load(NORM + at, mask=inside, other=0.0).to(tl.float32)[:, None]).to(x.dtype)
            product = tl.dot(w.to(x.dtype), x, product)
    return product, squares / K


@triton.jit
def _linear_kernel(
    X, NORM, W0, W1, W2, S0, S1, S2, RESIDUAL, OUT, rows, n0, n1, n_all, eps, K: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply up to three weights, one after the other along the output features; no program spans two."""
    start = tl.program_id(0) * BLOCK_N
    W = W0
    S = S0
    first = n0 * 0
    if start >= n0 + n1:
        W = W2
        S = S2
        first = n0 + n1
    elif start >= n0:
        W = W1
        S = S1
        first = n0
    feature = start - first + tl.arange(0, BLOCK_N)
    y, mean_square = _product(W, X, NORM, feature, rows, K, HAS_NORM, ROWS, BLOCK_N, BLOCK_K)
    if SCALED:
        y *= tl.load(S + feature)[:, None]
    if HAS_NORM:
        y *= tl.rsqrt(mean_square + eps)[None, :]
    y = y.to(OUT.dtype.element_ty)
    row = tl.arange(0, ROWS)
    live = (row < rows)[None, :]
    out = row[None, :] * n_all + (start + tl.arange(0, BLOCK_N))[:, None]
    if HAS_RESIDUAL:
        y = (tl.load(RESIDUAL + out, mask=live, other=0.0).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
    tl.store(OUT + out, y, mask=live)


@triton.jit
def _gate_up_kernel(
    X, NORM, GATE, UP, S_GATE, S_UP, OUT, rows, n_all, eps, K: tl.constexpr,
    SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate, mean_square = _product(GATE, X, NORM, feature, rows, K, True, ROWS, BLOCK_N, BLOCK_K)
    up, _ = _product(UP, X, NORM, feature, rows, K, True, ROWS, BLOCK_N, BLOCK_K)
    if SCALED:
        gate *= tl.load(S_GATE + feature)[:, None]
        up *= tl.load(S_UP + feature)[:, None]
    inverse = tl.rsqrt(mean_square + eps)[None, :]
    dtype = OUT.dtype.element_ty
    gate = (gate * inverse).to(dtype).to(tl.float32)
    up = (up * inverse).to(dtype).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    row = tl.arange(0, ROWS)
    tl.store(OUT + row[None, :] * n_all + feature[:, None], (active * up).to(dtype), mask=(row < rows)[None, :])


@triton.jit
def _rotated(x, other, cos, sin, dtype: tl.constexpr):
    """``x * cos + rotate_half(x) * sin``, rounded where transformers rounds; `other` is rotate_half(x)."""
    turned = (x * cos).to(dtype).to(tl.float32) + (other * sin).to(dtype).to(tl.float32)
    return turned.to(dtype)


@triton.jit
def _attend_kernel(
    QKV, COS, SIN, Q_SCALE, POSITION, KEYS, VALUES, OUT, capacity, kv_heads, scale,
    D: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row and one key head: the queries that share it, its new key and value, and all those before."""
    b, head = tl.program_id(0), tl.program_id(1)
    dtype = QKV.dtype.element_ty
    position = tl.load(POSITION + b).to(tl.int32)
    dim = tl.arange(0, D)
    partner = (dim + D // 2) % D
    sign = tl.where(dim < D // 2, -1.0, 1.0)
    cos = tl.load(COS + position * D + dim).to(tl.float32)
    sin = tl.load(SIN + position * D + dim).to(tl.float32)

    source = QKV + b * (GROUP + 2) * kv_heads * D
    member = tl.arange(0, GROUP_ROWS)
    is_member = (member < GROUP)[:, None]
    q_at = source + (head * GROUP + member)[:, None] * D
    q = tl.load(q_at + dim[None, :], mask=is_member, other=0.0).to(tl.float32)
    q_partner = tl.load(q_at + partner[None, :], mask=is_member, other=0.0).to(tl.float32) * sign[None, :]
    q = _rotated(q, q_partner, cos[None, :], sin[None, :], dtype)
    q = (q.to(tl.float32) * tl.load(Q_SCALE + position).to(tl.float32)).to(dtype)
    k_at = source + (GROUP * kv_heads + head) * D
    k_partner = tl.load(k_at + partner).to(tl.float32) * sign
    k_new = _rotated(tl.load(k_at + dim).to(tl.float32), k_partner, cos, sin, dtype)
    v_new = tl.load(source + ((GROUP + 1) * kv_heads + head) * D + dim)
    cache = (b.to(tl.int64) * kv_heads + head) * capacity * D
    tl.store(KEYS + cache + position * D + dim, k_new)
    tl.store(VALUES + cache + position * D + dim, v_new)

    # Online softmax, starting with the new key: reading that back from memory would need a barrier.
    largest = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
    total = tl.full((GROUP_ROWS,), 1.0, tl.float32)
    acc = tl.zeros((GROUP_ROWS, D), tl.float32) + v_new.to(tl.float32)[None, :]
    for start in range(0, position, BLOCK):
        at = start + tl.arange(0, BLOCK)
        before = at < position
        place = cache + at[:, None] * D + dim[None, :]
        keys = tl.load(KEYS + place, mask=before[:, None], other=0.0)
        values = tl.load(VALUES + place, mask=before[:, None], other=0.0)
        scores = tl.where(before[None, :], tl.dot(q, tl.trans(keys)) * scale, float("-inf"))
        largest_now = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - largest_now[:, None])
        shrink = tl.exp(largest - largest_now)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), values, acc * shrink[:, None])
        largest = largest_now
    out = OUT + b * GROUP * kv_heads * D + (head * GROUP + member)[:, None] * D + dim[None, :]
    tl.store(out, (acc / total[:, None]).to(dtype), mask=is_member)


class Tile(NamedTuple):
    """How a product is tiled: output and input features of a tile, its warps, and tiles in flight."""

    n: int
    k: int
    warps: int
    stages: int


#: Tiles for one row and for several, by the kind of product and whether its weight is float8. These were the fastest of
#: 60 and 30 candidates, on an H200 at the sizes of ERNIE-Image's prompt enhancer.
_TILES: Mapping[tuple[str, bool], tuple[Tile, Tile]] = {
    ("normed", False): (Tile(4, 256, 1, 1), Tile(64, 256, 4, 3)),
    ("normed", True): (Tile(4, 1024, 2, 1), Tile(64, 256, 4, 3)),
    ("gated", False): (Tile(1, 1024, 4, 1), Tile(64, 128, 2, 5)),
    ("gated", True): (Tile(1, 256, 1, 1), Tile(32, 256, 2, 3)),
    ("plain", False): (Tile(2, 1024, 1, 1), Tile(16, 512, 2, 3)),
    ("plain", True): (Tile(2, 512, 1, 1), Tile(16, 512, 2, 3)),
}


def tile_for(kind: str, scaled: bool, width: int, rows: int) -> Tile:
    """Return how a product is tiled.

    Args:
        kind: "normed" (of normed rows), "gated" (two of them, for the activation) or "plain".
        scaled: Whether its weight is float8.
        width: Input features.
        rows: Rows.
    """
    one, several = _TILES[kind, scaled]
    tile = one if rows == 1 else several
    return tile._replace(k=min(tile.k, next_power_of_2(width)))


def attention_blocks(size: int, shared_bytes: int) -> tuple[int, int, int]:
    """Return the positions of a tile, warps and tiles in flight of the attention.

    The first was the fastest on an H200. With heads of 128 it takes 136 KiB, but a block on consumer cards (capability
    8.6, 8.9, 12.0) has only 99.

    Args:
        size: Of a head.
        shared_bytes: Shared memory that a block of the device can have.
    """
    tiles = ((128, 8, 3), (128, 8, 2), (64, 4, 2), (32, 4, 2))
    # Keys and values in bfloat16, of all tiles in flight but the one being multiplied; the rest takes up to 16 KiB.
    fitting = (tile for tile in tiles if (tile[2] - 1) * tile[0] * size * 4 + 2**14 <= shared_bytes)
    return next(fitting, tiles[-1])


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 2**18
    facts = triton.runtime.driver.active.utils.get_device_properties(device.index)  # the same query that Triton uses
    return int(facts["max_shared_mem"])


def dequantize(weight: DecodeWeight, dtype: torch.dtype) -> Tensor:
    """Return a weight [N, K] in `dtype`, for products of many rows, which cuBLAS computes."""
    if weight.scale_n is None:
        return weight.values_nk
    features, width = weight.values_nk.shape
    out = weight.values_nk.new_empty(features, width, dtype=dtype)
    _dequantize_kernel[(features,)](weight.values_nk, weight.scale_n, out, width, BLOCK=1024, num_warps=4)
    return out


def linear(
    x_bk: Tensor,
    weights: tuple[DecodeWeight, ...],
    norm: tuple[Tensor, float] | None = None,
    residual_bn: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return ``concat([rms_norm(x) @ w.T for w in weights]) + residual`` [b, n], for up to three weights.

    Args:
        x_bk: Rows, at most `MAX_ROWS`, contiguous.
        weights: [n, k] each, n a multiple of `MULTIPLE_N`, k of `MULTIPLE_K`; all in the same dtype.
        norm: Weight [k] and epsilon of the RMS norm, or None for no norm.
        residual_bn: Added at the end, or None.
        tile: How the product is tiled; default: `tile_for`.
    """
    rows, width = x_bk.shape
    sizes = [weight.values_nk.shape[0] for weight in weights]
    total = sum(sizes)
    first, second, third = (*weights, *weights[:1] * 2)[:3]
    out = x_bk.new_empty(rows, total)
    scaled, padded = first.scale_n is not None, 1 if rows == 1 else MAX_ROWS
    tile = tile or tile_for("plain" if norm is None else "normed", scaled, width, rows)
    second_ends = sizes[1] if len(sizes) > 1 else total
    _linear_kernel[(total // tile.n,)](
        x_bk, x_bk if norm is None else norm[0], first.values_nk, second.values_nk, third.values_nk,
        first.scale_n if scaled else x_bk, second.scale_n if scaled else x_bk, third.scale_n if scaled else x_bk,
        x_bk if residual_bn is None else residual_bn, out, rows, sizes[0], second_ends, total,
        0.0 if norm is None else norm[1], K=width, HAS_NORM=norm is not None, HAS_RESIDUAL=residual_bn is not None,
        SCALED=scaled, ROWS=padded, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out


def gate_up(
    x_bk: Tensor, gate: DecodeWeight, up: DecodeWeight, norm: tuple[Tensor, float], tile: Tile | None = None
) -> Tensor:
    """Return ``silu(y @ gate.T) * (y @ up.T)`` [b, n] with ``y = rms_norm(x)``; arguments as of `linear`."""
    rows, width = x_bk.shape
    features = gate.values_nk.shape[0]
    out = x_bk.new_empty(rows, features)
    scaled, padded = gate.scale_n is not None, 1 if rows == 1 else MAX_ROWS
    tile = tile or tile_for("gated", scaled, width, rows)
    _gate_up_kernel[(features // tile.n,)](
        x_bk, norm[0], gate.values_nk, up.values_nk, gate.scale_n if scaled else x_bk, up.scale_n if scaled else x_bk,
        out, rows, features, norm[1], K=width, SCALED=scaled, ROWS=padded, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def attend(
    qkv_bn: Tensor,
    cos_pd: Tensor,
    sin_pd: Tensor,
    q_scale_p: Tensor,
    position_b: Tensor,
    keys_bnpd: Tensor,
    values_bnpd: Tensor,
    scale: float,
    blocks: tuple[int, int, int] | None = None,
) -> Tensor:
    """Return the attention output [b, heads * d] of one new token a row; its key and value go to the cache in place.

    Args:
        qkv_bn: Queries, keys and values of all heads side by side.
        cos_pd: Rotary cosines of each position; dimension i and i + d / 2 belong together.
        sin_pd: Sines.
        q_scale_p: Factor of the queries at each position.
        position_b: Position of each row's new token; the cache holds those before.
        keys_bnpd: Cache of the keys, rotated.
        values_bnpd: Cache of the values.
        scale: Of the scores.
        blocks: Positions of a tile, warps, tiles in flight; default: `attention_blocks`.
    """
    rows, kv_heads, capacity, size = keys_bnpd.shape
    if blocks is None:
        blocks = attention_blocks(size, _shared_bytes(qkv_bn.device))
    group = qkv_bn.shape[1] // (kv_heads * size) - 2
    out = qkv_bn.new_empty(rows, group * kv_heads * size)
    _attend_kernel[(rows, kv_heads)](
        qkv_bn, cos_pd, sin_pd, q_scale_p, position_b, keys_bnpd, values_bnpd, out, capacity, kv_heads, scale,
        D=size, GROUP=group, GROUP_ROWS=max(16, next_power_of_2(group)), BLOCK=blocks[0], num_warps=blocks[1],
        num_stages=blocks[2],
    )  # fmt: skip
    return out
