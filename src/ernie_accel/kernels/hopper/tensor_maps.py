"""Descriptions of tiles in memory, by which the tensor memory accelerator (TMA) of Hopper cards copies them."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ernie_accel.kernels.hopper.compiling import check, driver

#: Bytes: what TMA asks of addresses and strides.
ALIGNED_TO = 16
#: CU_TENSOR_MAP_DATA_TYPE_...
MAP_TYPES = {torch.float8_e4m3fn: 0, torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_..., by bytes
_L2_PROMOTION_256_BYTES = 3  # CU_TENSOR_MAP_L2_PROMOTION_...


def is_as_tma_reads(x: Tensor) -> bool:
    """Return whether the last dimension of `x` is dense, and its address and all strides are aligned."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and x.data_ptr() % ALIGNED_TO == 0 and all(i and i % ALIGNED_TO == 0 for i in strides)


def as_tma_reads(x: Tensor) -> Tensor:
    """Return `x`, or a copy if its last dimension is not dense, or an address or a stride not aligned."""
    return x if is_as_tma_reads(x) else x.clone(memory_format=torch.contiguous_format)


def tensor_map(x: Tensor, box: tuple[int, int, int, int], chunk: int) -> ctypes.Array[ctypes.c_char]:
    """Return a description of tiles for TMA (CUtensorMap), which a kernel gets by value.

    Args:
        x: Of four dimensions, the last one dense; its address and the strides of the others are multiples of 16 bytes.
        box: Sizes of a tile, the last dimension first. What of it lies outside `x` is read as zeros, and not written.
        chunk: Bytes of a row of a tile, as wide as the swizzle: 32, 64 or 128.
    """
    return _encoded(x.data_ptr(), x.dtype, x.shape, x.stride(), box, chunk)


# Torch's allocator gives a step the memory of the step before. Encoding anew would take most of a call's time. A step
# of the largest model has 400.
@functools.lru_cache(1024)
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
        ctypes.byref(aligned), MAP_TYPES[dtype], 4, ctypes.c_void_p(address), (ctypes.c_uint64 * 4)(*shape[::-1]),
        (ctypes.c_uint64 * 3)(*(stride * dtype.itemsize for stride in strides[2::-1])), (ctypes.c_uint32 * 4)(*box),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1), 0, _SWIZZLES[chunk], _L2_PROMOTION_256_BYTES, 0,
    )  # fmt: skip
    check(result, f"cuTensorMapEncodeTiled for {tuple(shape)} with strides {strides}")
    return aligned
