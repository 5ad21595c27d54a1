"""The products of the tensor cores of Hopper cards (the instruction wgmma) as functions in CUDA C++.

An instruction names each register of a thread, so the functions are written out for a number of columns. They multiply
64 rows, by a warpgroup (128 threads), and sum over 32 bytes of each.
"""

from __future__ import annotations

import torch

_TYPES = {torch.float8_e4m3fn: "e4m3", torch.float16: "f16", torch.bfloat16: "bf16"}


def from_shared_memory(name: str, columns: int, dtype: torch.dtype) -> str:
    """Return the function ``name(x, a, b, adds)``: x (+)= a b, of two matrices that shared memory has row by row.

    Args:
        name: Its name.
        columns: Columns of the result, rows of b: a multiple of 8, at most 256.
        dtype: Of a and b; x is float32.
    """
    kind, sums, registers = _TYPES[dtype], 32 // dtype.itemsize, columns // 2
    transposed = "" if dtype.itemsize == 1 else ", 0, 0"
    return f"""\
__device__ __forceinline__ void {name}(
    float (&x)[{registers}], unsigned long long a, unsigned long long b, int adds) {{
  asm volatile(
      "{{\\n"
      ".reg .pred adds;\\n"
      "setp.ne.b32 adds, %{registers + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{columns}k{sums}.f32.{kind}.{kind} {{{_names(registers)}}}, "
      "%{registers}, %{registers + 1}, adds, 1, 1{transposed};\\n"
      "}}\\n" : {_operands(registers)} : "l"(a), "l"(b), "r"(adds));
}}"""


def from_registers(name: str, columns: int, dtype: torch.dtype) -> str:
    """Return the function ``name(x, a, b)``: x += a b, of what a thread has of a, and a matrix in shared memory.

    Args:
        name: Its name.
        columns: Columns of the result and of b: a multiple of 8, at most 256. In float8, b is there column by column.
        dtype: Of a and b; x is float32.
    """
    kind, sums, registers = _TYPES[dtype], 32 // dtype.itemsize, columns // 2
    transposed = "" if dtype.itemsize == 1 else ", 1"
    a = ", ".join(f"%{registers + i}" for i in range(4))
    return f"""\
__device__ __forceinline__ void {name}(
    float (&x)[{registers}], const unsigned* a, unsigned long long b) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{columns}k{sums}.f32.{kind}.{kind} {{{_names(registers)}}}, "
      "{{{a}}}, %{registers + 4}, 1, 1, 1{transposed};\\n"
      : {_operands(registers)}
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}"""


def _names(registers: int) -> str:
    return ", ".join(f"%{i}" for i in range(registers))


def _operands(registers: int) -> str:
    return ", ".join(f'"+f"(x[{i}])' for i in range(registers))
