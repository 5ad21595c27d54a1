"""Attention for Hopper cards; the kernel, and how it works, is in ``attention.cu``.

It reads on the device how many tokens of each row are real, at no cost, and needs no plan for a number of tokens.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.kernels.hopper.compiling import Kernel, check, compile_source, driver, enter_context
from ernie_accel.kernels.reference import ROOM
from ernie_accel.kernels.sizes import ceil_div

_log = logging.getLogger(__name__)
#: Float8 values lie in groups of so many keys.
GROUP = 16
_CAPABILITY = (9, 0)
_BARRIERS = 1024  # bytes behind the tiles, for the barriers: 31 stages and two parts of the queries
#: CU_TENSOR_MAP_DATA_TYPE_...
_MAP_TYPES = {torch.float8_e4m3fn: 0, torch.float16: 6, torch.bfloat16: 9}
_INSTRUCTION_TYPES = {torch.float8_e4m3fn: "e4m3", torch.float16: "f16", torch.bfloat16: "bf16"}
_SWIZZLES = {32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_..., by bytes
_L2_PROMOTION_256_BYTES = 3  # CU_TENSOR_MAP_L2_PROMOTION_...
_ALIGNED_TO = 16  # bytes: what TMA asks of addresses and strides


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
    if not q_bsnd.is_cuda or q_bsnd.dtype not in _MAP_TYPES:
        return False
    # Under torch.compile a size may be a symbol, which cannot be looked up.
    known = any(q_bsnd.shape[-1] == size and q_bsnd.element_size() == element for size, element in TILINGS)
    return known and _is_usable(q_bsnd.device)


@functools.cache
def _is_usable(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) != _CAPABILITY or torch.version.hip is not None:
        return False
    try:
        Kernel(compile_source('extern "C" __global__ void nothing() {}').code, "nothing", 0, device)
        return bool(driver().cuTensorMapEncodeTiled)
    except (ErnieAccelError, OSError, AttributeError) as error:  # the last for a driver without that function
        _log.warning("cuDNN attends in place of the kernel for Hopper cards: %s", error)
        return False


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
    if spare % _ALIGNED_TO:
        raise ErnieAccelError(f"Spare columns come in multiples of {_ALIGNED_TO}, found {spare}.")
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
    multiprocessors = _multiprocessors(q_bsnd.device)
    tiling = cheapest(TILINGS[size, q_bsnd.element_size()], tokens, batch * heads, multiprocessors)
    return run(tiling, multiprocessors, q_bsnd, k_bsnd, v, lengths_b, spare, out_scale)


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
    q_bsnd, k_bsnd, v = (_as_tma_reads(each) for each in (q_bsnd, k_bsnd, v))
    per_qk, per_v = tiling.qk_chunk // element, tiling.v_chunk // element
    queries_at_once = tiling.queries // tiling.query_parts(element)
    integers = tokens, heads, heads // k_bsnd.shape[2], tiles_of_queries, tiles, pitch
    arguments = (
        _map_of(q_bsnd, (per_qk, 1, queries_at_once, 1), tiling.qk_chunk),
        _map_of(k_bsnd, (per_qk, 1, tiling.keys, 1), tiling.qk_chunk),
        _map_of(v, (per_v, size, 1, 1) if element == 1 else (per_v, 1, tiling.keys, 1), tiling.v_chunk),
        ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(0 if lengths_b is None else lengths_b.data_ptr()),
        *map(ctypes.c_int, integers), ctypes.c_float(size**-0.5 * math.log2(math.e)), ctypes.c_float(out_scale),
    )  # fmt: skip
    kernel = _kernel(tiling, size, q_bsnd.dtype, q_bsnd.device)
    kernel.launch(min(tiles, most_blocks), 128 * (tiling.groups + 1), arguments)
    return out


def _as_tma_reads(x: Tensor) -> Tensor:
    """Return `x`, or a copy if its last dimension is not dense, or an address or a stride not aligned."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    if x.stride(-1) == 1 and x.data_ptr() % _ALIGNED_TO == 0 and all(i and i % _ALIGNED_TO == 0 for i in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def cheapest(tilings: tuple[Tiling, ...], tokens: int, heads: int, multiprocessors: int) -> Tiling:
    """Return the tiling by which the busiest multiprocessor has least to do; `heads` are those of all rows."""
    return min(
        tilings,
        key=lambda tiling: ceil_div(ceil_div(tokens, tiling.queries) * heads, multiprocessors) * tiling.cost,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _map_of(x: Tensor, box: tuple[int, int, int, int], chunk: int) -> ctypes.Array[ctypes.c_char]:
    """Return a description of tiles for TMA (CUtensorMap), which the kernel gets by value.

    Args:
        x: Of [B, S, N, D] or [B, N, D, S], dense in the last dimension; its address and the strides of the others are
            multiples of 16 bytes.
        box: Sizes of a tile, the last dimension first. What of it lies outside `x` is read as zeros.
        chunk: Bytes of a row of a tile.
    """
    return _encoded(x.data_ptr(), x.dtype, x.shape, x.stride(), box, chunk)


# Torch's allocator gives a step the memory of the step before. Encoding anew would take most of a call's time.
@functools.lru_cache(256)
def _encoded(
    address: int,
    dtype: torch.dtype,
    shape: torch.Size,
    strides: tuple[int, ...],
    box: tuple[int, int, int, int],
    chunk: int,
) -> ctypes.Array[ctypes.c_char]:
    memory = ctypes.create_string_buffer(128 + 64)
    aligned = (ctypes.c_char * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
    # Sizes and strides have 64 bits, boxes 32; the first dimension is the dense one.
    result = driver().cuTensorMapEncodeTiled(
        ctypes.byref(aligned), _MAP_TYPES[dtype], 4, ctypes.c_void_p(address), (ctypes.c_uint64 * 4)(*shape[::-1]),
        (ctypes.c_uint64 * 3)(*(stride * dtype.itemsize for stride in strides[2::-1])), (ctypes.c_uint32 * 4)(*box),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1), 0, _SWIZZLES[chunk], _L2_PROMOTION_256_BYTES, 0,
    )  # fmt: skip
    check(result, f"cuTensorMapEncodeTiled for {tuple(shape)} with strides {strides}")
    return aligned


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
    instructions = _instructions(tiling.keys, size + 8 if is_fp8 else size, _INSTRUCTION_TYPES[dtype])
    body = Path(__file__).with_name("attention.cu").read_text(encoding="utf-8")
    return "\n".join((*defined, *instructions, body))


def _instructions(keys: int, outputs: int, kind: str) -> Iterator[str]:
    """Yield functions around wgmma, which has to be given each register of a thread by name."""
    sums, transposed = (32, "") if kind == "e4m3" else (16, ", 1")
    names, registers = ", ".join(f"%{i}" for i in range(keys // 2)), keys // 2
    yield f"""\
__device__ __forceinline__ void multiply_scores(
    float (&x)[{registers}], unsigned long long a, unsigned long long b, int adds) {{
  asm volatile(
      "{{\\n"
      ".reg .pred adds;\\n"
      "setp.ne.b32 adds, %{registers + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{keys}k{sums}.f32.{kind}.{kind} {{{names}}}, "
      "%{registers}, %{registers + 1}, adds, 1, 1{transposed.replace("1", "0") * 2};\\n"
      "}}\\n" : {", ".join(f'"+f"(x[{i}])' for i in range(registers))} : "l"(a), "l"(b), "r"(adds));
}}"""
    names, registers = ", ".join(f"%{i}" for i in range(outputs // 2)), outputs // 2
    a = ", ".join(f"%{registers + i}" for i in range(4))
    yield f"""\
__device__ __forceinline__ void multiply_values(
    float (&x)[{registers}], const unsigned* a, unsigned long long b) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{outputs}k{sums}.f32.{kind}.{kind} {{{names}}}, "
      "{{{a}}}, %{registers + 4}, 1, 1, 1{transposed};\\n"
      : {", ".join(f'"+f"(x[{i}])' for i in range(registers))}
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}"""
