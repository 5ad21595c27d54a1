"""Attention for Hopper cards; the kernel, and how it works, is in ``attention.cu``.

It reads on the device how many tokens of each row are real, at no cost, and needs no plan for a number of tokens.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.kernels.hopper.compiling import (
    Kernel,
    compile_source,
    enter_context,
    is_usable,
    multiprocessors,
    sources,
)
from ernie_accel.kernels.hopper.instructions import from_registers, from_shared_memory
from ernie_accel.kernels.hopper.tensor_maps import ALIGNED_TO, MAP_TYPES, as_tma_reads, tensor_map
from ernie_accel.kernels.reference import ROOM
from ernie_accel.kernels.sizes import ceil_div

#: Float8 values lie in groups of so many keys.
GROUP = 16
_BARRIERS = 1024  # bytes behind the tiles, for the barriers: 31 stages and two parts of the queries


@dataclass(frozen=True)
class Tiling:
    """The shape of a thread block's tiles, and how they go through shared memory.

    Attributes:
        keys: Keys of a block, the step of the loop.
        groups: Warpgroups that multiply; each has 64 queries.
        stages: Blocks of keys and values that shared memory holds.
        qk_chunk: Bytes of a row of queries or keys that lie together in shared memory: 32, 64 or 128.
        v_chunk: The same of a row of values; in float8 a row is one dimension of all keys.
        takes_turns: Whether warpgroups multiply in turns, so that one multiplies while another computes exponentials.
        cost: Time of a tile, in units of the first tiling for such heads.
    """

    keys: int
    groups: int
    stages: int
    qk_chunk: int
    v_chunk: int
    takes_turns: bool
    cost: float = 1.0

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return 64 * self.groups

    def query_parts(self, element: int) -> int:
        """Return in how many parts queries are loaded, for elements of so many bytes.

        In float8, two groups load theirs separately, each as soon as it is done with those before: 318 us instead of
        330 (ERNIE-Image, H200). Three would drift apart and wait for each other's keys: 314 us instead of 300
        (Z-Image).
        """
        return 2 if element == 1 and self.groups == 2 else 1

    def shared_bytes(self, size: int, element: int) -> int:
        """Return the shared memory that a thread block takes, for heads of `size` elements of so many bytes."""
        row = ceil_div(size * element, self.qk_chunk) * self.qk_chunk
        outputs = size + 8 if element == 1 else size  # in float8, with the sums of probabilities
        kept = 4 * self.queries * outputs if element == 1 else 0
        return self.queries * row + self.stages * self.keys * (row + outputs * element) + kept + _BARRIERS


#: By dimensions of a head and bytes of an element: the fastest of those tried (5 to 14) on an H200 with 4224 tokens,
#: for NewBie-image (2 x 24 heads of 96) and Z-Image (30 of 128). Which of two it is depends on how many tiles there are
#: for each multiprocessor.
TILINGS = {
    (96, 1): (Tiling(128, 3, 2, 128, 128, takes_turns=False), Tiling(192, 2, 2, 128, 64, takes_turns=False, cost=0.72)),
    (96, 2): (Tiling(112, 3, 2, 64, 64, takes_turns=True), Tiling(176, 2, 2, 64, 64, takes_turns=True, cost=0.7)),
    (128, 1): (Tiling(192, 2, 2, 128, 64, takes_turns=True), Tiling(96, 3, 3, 128, 32, takes_turns=False, cost=1.5)),
    (128, 2): (Tiling(176, 2, 2, 128, 128, takes_turns=True), Tiling(80, 3, 2, 128, 128, takes_turns=False, cost=1.45)),
}


def takes(q_bsnd: Tensor) -> bool:
    """Return whether there is a kernel for such queries on their device."""
    if not q_bsnd.is_cuda or q_bsnd.dtype not in MAP_TYPES:
        return False
    # Under torch.compile a size may be a symbol, which cannot be looked up.
    known = any(q_bsnd.shape[-1] == size and q_bsnd.element_size() == element for size, element in TILINGS)
    return known and is_usable(q_bsnd.device)


def shape_of_values(shape_bsnd: torch.Size) -> tuple[int, int, int, int]:
    """Return the shape [B, N, D, S'] of laid-out values; S' is S up to a multiple of GROUP."""
    batch, tokens, heads, size = shape_bsnd
    return batch, heads, size, ceil_div(tokens, GROUP) * GROUP


def laid_out(v_bsnd: Tensor) -> Tensor:
    """Return float8 values as the kernel reads them [B, N, D, S'], in plain torch; padding is zero.

    A thread holds the probabilities of keys 2 i, 2 i + 1, 2 i + 8 and 2 i + 9 of a group; as an operand of the next
    product they have to be adjacent. So the values are put in that order, and no thread has to exchange anything.
    """
    batch, tokens, heads, size = v_bsnd.shape
    position = torch.arange(ceil_div(tokens, GROUP) * GROUP, device=v_bsnd.device)
    within = position % GROUP
    token = position - within + 2 * (within // 4) + within % 2 + 8 * (within % 4 // 2)
    padded = v_bsnd.new_zeros(batch, len(position), heads, size, dtype=torch.uint8)
    padded[:, :tokens] = v_bsnd.view(torch.uint8)
    return padded[:, token].permute(0, 2, 3, 1).contiguous().view(v_bsnd.dtype)


def attention(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, lengths_b: Tensor | None) -> Tensor:
    """Return the attention output [B, S, N * D]; see `cudnn_attention.attention`.

    Lengths are taken as at least 1 and at most S.

    Raises:
        ErnieAccelError: The arguments do not go together.
    """
    _check(q_bsnd, k_bsnd, v_bsnd, k_bsnd.shape, lengths_b)
    return _run(q_bsnd, k_bsnd, v_bsnd, lengths_b)


def attention_fp8(
    q_bsnd: Tensor, k_bsnd: Tensor, v_bnds: Tensor, scale: Tensor, lengths_b: Tensor | None, spare: int = 0
) -> Tensor:
    """Return the attention output [B, S, N * D + spare] in float8; see `cudnn_attention.attention_fp8`.

    Values are as `laid_out` makes them. Lengths are taken as at least 1 and at most S.

    Raises:
        ErnieAccelError: The arguments do not go together.
    """
    _check(q_bsnd, k_bsnd, v_bnds, shape_of_values(k_bsnd.shape), lengths_b, spare)
    return _run(q_bsnd, k_bsnd, v_bnds, lengths_b, spare, 1 / ROOM if spare else 1.0)


def _check(
    q_bsnd: Tensor,
    k_bsnd: Tensor,
    v: Tensor,
    shape_of_v: tuple[int, ...],
    lengths_b: Tensor | None,
    spare: int = 0,
) -> None:
    """Refuse what the kernel would read as something else."""
    batch, tokens, heads, size = q_bsnd.shape
    given = f"queries {tuple(q_bsnd.shape)}, keys {tuple(k_bsnd.shape)}, values {tuple(v.shape)}"
    if not q_bsnd.dtype == k_bsnd.dtype == v.dtype or not q_bsnd.device == k_bsnd.device == v.device:
        raise ErnieAccelError(f"Queries, keys and values need the same dtype and device: {given}.")
    if k_bsnd.shape != (batch, tokens, k_bsnd.shape[2], size) or tuple(v.shape) != tuple(shape_of_v):
        raise ErnieAccelError(f"These shapes do not go together: {given}; expected values {tuple(shape_of_v)}.")
    if heads % k_bsnd.shape[2]:
        raise ErnieAccelError(f"{heads} heads of queries cannot share {k_bsnd.shape[2]} heads of keys.")
    if spare % ALIGNED_TO:
        raise ErnieAccelError(f"Spare columns come in multiples of {ALIGNED_TO}, found {spare}.")
    if lengths_b is not None and (
        lengths_b.dtype != torch.int32
        or lengths_b.shape != (batch,)
        or not lengths_b.is_contiguous()
        or lengths_b.device != q_bsnd.device
    ):
        raise ErnieAccelError(
            f"Lengths are {batch} adjacent int32 on {q_bsnd.device}, found {lengths_b.dtype} "
            f"{tuple(lengths_b.shape)} on {lengths_b.device}."
        )


def _run(
    q_bsnd: Tensor, k_bsnd: Tensor, v: Tensor, lengths_b: Tensor | None, spare: int = 0, out_scale: float = 1.0
) -> Tensor:
    batch, tokens, heads, size = q_bsnd.shape
    blocks = multiprocessors(q_bsnd.device)
    tiling = cheapest(TILINGS[size, q_bsnd.element_size()], tokens, batch * heads, blocks)
    return run(tiling, blocks, q_bsnd, k_bsnd, v, lengths_b, spare, out_scale)


def run(
    tiling: Tiling,
    most_blocks: int,
    q_bsnd: Tensor,
    k_bsnd: Tensor,
    v: Tensor,
    lengths_b: Tensor | None,
    spare: int,
    out_scale: float,
) -> Tensor:
    """Return the output [B, S, N * D + spare], times `out_scale`, by this tiling and at most so many thread blocks.

    The tensors are those of `attention` or `attention_fp8`.
    """
    (batch, tokens, heads, size), element = q_bsnd.shape, q_bsnd.element_size()
    pitch, tiles_of_queries = heads * size + spare, ceil_div(tokens, tiling.queries)
    out, tiles = q_bsnd.new_empty(batch, tokens, pitch), tiles_of_queries * heads * batch
    if not tiles:
        return out
    enter_context(q_bsnd.device)
    q_bsnd, k_bsnd, v = (as_tma_reads(each) for each in (q_bsnd, k_bsnd, v))
    per_qk, per_v = tiling.qk_chunk // element, tiling.v_chunk // element
    queries_at_once = tiling.queries // tiling.query_parts(element)
    integers = tokens, heads, heads // k_bsnd.shape[2], tiles_of_queries, tiles, pitch
    arguments = (
        tensor_map(q_bsnd, (per_qk, 1, queries_at_once, 1), tiling.qk_chunk),
        tensor_map(k_bsnd, (per_qk, 1, tiling.keys, 1), tiling.qk_chunk),
        tensor_map(v, (per_v, size, 1, 1) if element == 1 else (per_v, 1, tiling.keys, 1), tiling.v_chunk),
        ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(0 if lengths_b is None else lengths_b.data_ptr()),
        *map(ctypes.c_int, integers), ctypes.c_float(size**-0.5 * math.log2(math.e)), ctypes.c_float(out_scale),
    )  # fmt: skip
    kernel = _kernel(tiling, size, q_bsnd.dtype, q_bsnd.device)
    kernel.launch(min(tiles, most_blocks), 128 * (tiling.groups + 1), arguments)
    return out


def cheapest(tilings: tuple[Tiling, ...], tokens: int, heads: int, multiprocessors: int) -> Tiling:
    """Return the tiling by which the busiest multiprocessor has least to do; `heads` are those of all rows."""
    return min(
        tilings,
        key=lambda tiling: ceil_div(ceil_div(tokens, tiling.queries) * heads, multiprocessors) * tiling.cost,
    )


@functools.cache
def _kernel(tiling: Tiling, size: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    compiled = compile_source(source_of(tiling, size, dtype))
    return Kernel(compiled.code, "attention", tiling.shared_bytes(size, dtype.itemsize), device)


def source_of(tiling: Tiling, size: int, dtype: torch.dtype) -> str:
    """Return the kernel's source, in CUDA C++, for heads of `size` dimensions."""
    is_fp8 = dtype is torch.float8_e4m3fn
    constants = {
        "HEAD": size, "KEYS": tiling.keys, "GROUPS": tiling.groups, "STAGES": tiling.stages,
        "QK_CHUNK": tiling.qk_chunk, "V_CHUNK": tiling.v_chunk, "TAKES_TURNS": int(tiling.takes_turns),
        "Q_PARTS": tiling.query_parts(dtype.itemsize), "FLOAT8": int(is_fp8), "FLOAT16": int(dtype is torch.float16),
    }  # fmt: skip
    defined = (f"#define {name} {value}" for name, value in constants.items())
    instructions = (
        from_shared_memory("multiply_scores", tiling.keys, dtype),
        from_registers("multiply_values", size + 8 if is_fp8 else size, dtype),
    )
    return "\n".join((*defined, *instructions, *sources("shared.cu", "attention.cu")))
