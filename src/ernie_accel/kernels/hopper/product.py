"""Products in float8 for Hopper cards, with one scale for each row and each feature; see ``product.cu``.

Unlike cuBLAS' they can gate one half of their output features by the other before anything is written, and leave out
unused spare columns. Their larger tiles take less time and power where they fill the card.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ernie_accel.kernels.hopper.compiling import (
    Kernel,
    compile_source,
    enter_context,
    is_usable,
    multiprocessors,
    sources,
)
from ernie_accel.kernels.hopper.instructions import from_shared_memory
from ernie_accel.kernels.hopper.tensor_maps import ALIGNED_TO, is_as_tma_reads, tensor_map
from ernie_accel.kernels.sizes import ceil_div

#: Rows and features of a tile, and bytes of each that lie together in shared memory: as wide as a swizzle.
_ROWS, _FEATURES, _TERMS = 128, 256, 128
_PART = 64  # columns of the output that are written at once: as wide as a swizzle, too
_STAGES = 3  # blocks of terms that shared memory holds
_BARRIERS = 256  # bytes behind all others
_THREADS = 128 * (_ROWS // 64 + 1)  # a warpgroup for each 64 rows, and one for the producer
_STEP = 32  # bytes of each row that lie together in what is beyond full blocks
#: cuBLAS' time relative to this kernel's, with full tiles, and together with the kernel that gates its result: on an
#: H200 at its power limit 1.03 to 1.06, and 1.02 to 1.06 (NewBie-image, Z-Image, ERNIE-Image), in single experiments.
_THEIR_COST, _THEIR_COST_GATED = 1.04, 1.05
_THEIR_TILE = 128
#: Below so many tiles for each multiprocessor, cuBLAS has smaller ones.
_FEWEST_TILES = 2
_ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2}


def takes(x_mk: Tensor, x_scale: Tensor, weight_nk: Tensor, weight_scale: Tensor, terms: int, *, gated: bool) -> bool:
    """Return whether there is a kernel for such operands that is faster than cuBLAS.

    Args:
        x_mk: Rows [M, K].
        x_scale: Their scales, [M, 1].
        weight_nk: Weight [N, K].
        weight_scale: The scales of its features, [1, N].
        terms: How many of the K columns count.
        gated: Whether the first half of the features gates the second.
    """
    operands, scales, device = (x_mk, weight_nk), (x_scale, weight_scale), x_mk.device
    if not x_mk.is_cuda or any(x.dtype != torch.float8_e4m3fn or x.device != device for x in operands):
        return False
    if any(x.dtype != torch.float32 or x.device != device or not x.is_contiguous() for x in scales):
        return False
    rows, features = len(x_mk), len(weight_nk)
    # Two adjacent scales of features are read at once.
    if (x_scale.numel(), weight_scale.numel()) != (rows, features) or weight_scale.data_ptr() % 8:
        return False
    if features % (16 if gated else 8) or terms % ALIGNED_TO:
        return False
    if not _TERMS <= terms <= min(x_mk.shape[1], weight_nk.shape[1]):
        return False
    if not is_usable(device) or not all(map(is_as_tma_reads, operands)):
        return False
    return is_faster(rows, features, terms, x_mk.shape[1], multiprocessors(device), gated=gated)


def is_faster(rows: int, features: int, terms: int, columns: int, processors: int, *, gated: bool) -> bool:
    """Return whether the kernel is faster than cuBLAS on a card with so many multiprocessors.

    Both are as fast as their tiles fill it: what counts are the tiles of the busiest multiprocessor.

    Args:
        rows: M.
        features: N.
        terms: Columns that count.
        columns: All columns, K.
        processors: Multiprocessors.
        gated: Whether the first half of the features gates the second.
    """
    row_tiles = ceil_div(rows, _ROWS)
    tiles = row_tiles * ceil_div(features, _FEATURES)
    their_rounds = ceil_div(row_tiles * ceil_div(features, _THEIR_TILE), processors)
    their_cost = _THEIR_COST_GATED if gated else _THEIR_COST
    its_time = ceil_div(tiles, processors) * terms
    return tiles >= _FEWEST_TILES * processors and its_time <= their_rounds * columns * their_cost / 2


def product(
    x_mk: Tensor,
    x_scale: Tensor,
    weight_nk: Tensor,
    weight_scale: Tensor,
    terms: int,
    activation: str | None = None,
) -> Tensor:
    """Return the product in bfloat16, [M, N], or [M, N / 2] where one half of the features gates the other.

    Operands are those that `takes` accepts, whichever is faster.

    Args:
        x_mk: float8 rows.
        x_scale: float32 scale of each row, [M, 1].
        weight_nk: float8 weight.
        weight_scale: float32 scale of each feature, [1, N].
        terms: Columns that count: a multiple of 16, at least 128.
        activation: Of the first half of the features, which gates the second: "silu", "gelu", or None.
    """
    (rows, _), features = x_mk.shape, len(weight_nk)
    columns = features // 2 if activation else features
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=x_mk.device)
    if not rows:
        return out
    enter_context(x_mk.device)
    row_tiles, feature_tiles = ceil_div(rows, _ROWS), ceil_div(features, _FEATURES)
    halves = 2 if activation else 1
    pitch = weight_nk.stride(0)
    x, weight = x_mk[:, :terms], weight_nk.as_strided((halves, columns, 1, terms), (columns * pitch, pitch, pitch, 1))
    arguments = (
        tensor_map(x[None, :, None], (_TERMS, 1, _ROWS, 1), _TERMS),
        tensor_map(weight, (_TERMS, 1, _FEATURES // halves, 1), _TERMS),
        tensor_map(x[None, :, None], (_STEP, 1, _ROWS, 1), _STEP),
        tensor_map(weight, (_STEP, 1, _FEATURES // halves, 1), _STEP),
        tensor_map(out[None, :, None], (_PART, 1, 64, 1), 2 * _PART),
        ctypes.c_void_p(x_scale.data_ptr()), ctypes.c_void_p(weight_scale.data_ptr()),
        *map(ctypes.c_int, (rows, columns, terms, row_tiles, feature_tiles)),
    )  # fmt: skip
    kernel = _kernel(_ACTIVATIONS[activation], x_mk.device)
    kernel.launch(min(row_tiles * feature_tiles, multiprocessors(x_mk.device)), _THREADS, arguments)
    return out


def shared_bytes() -> int:
    """Return the shared memory that a thread block takes: factors, results, scales, barriers."""
    return _STAGES * (_ROWS + _FEATURES) * _TERMS + _ROWS * _FEATURES * 2 + 2 * _FEATURES * 4 + _BARRIERS


@functools.cache
def _kernel(activation: int, device: torch.device) -> Kernel:
    return Kernel(compile_source(source_of(activation)).code, "product", shared_bytes(), device)


def source_of(activation: int) -> str:
    """Return the kernel's source, in CUDA C++; the activation is 0 for none, 1 for SiLU, 2 for GELU."""
    tile = {"ROWS": _ROWS, "FEATURES": _FEATURES, "TERMS": _TERMS, "PART": _PART, "STAGES": _STAGES}
    constants = {**tile, "ACTIVATION": activation, "FLOAT8": 0, "FLOAT16": 0}
    defined = (f"#define {name} {value}" for name, value in constants.items())
    multiply = from_shared_memory("multiply", _FEATURES, torch.float8_e4m3fn)
    return "\n".join((*defined, multiply, *sources("shared.cu", "product.cu")))
