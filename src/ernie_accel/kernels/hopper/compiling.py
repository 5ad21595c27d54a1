"""CUDA C++ to a kernel that can be launched, through the libraries that torch and the driver bring: NVRTC and libcuda.

Torch's builds for CUDA depend on NVRTC, so nothing has to be installed, and compiling takes half a second.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ernie_accel.core.errors import ErnieAccelError

_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.cache
def driver() -> ctypes.CDLL:
    """Return the driver's library."""
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Return NVRTC of the CUDA version that torch was built for.

    Raises:
        ErnieAccelError: It is not there.
    """
    for name in _names_of_nvrtc():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ErnieAccelError("NVRTC was not found. Torch's builds for CUDA bring it as nvidia-cuda-nvrtc.")


def _names_of_nvrtc() -> Iterator[str]:
    major = (torch.version.cuda or "").split(".")[0]
    yield f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        yield from (str(path) for path in sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}*")))


def check(result: int, what: str) -> None:
    """Raise if a call of the driver or NVRTC did not succeed."""
    if result != 0:
        raise ErnieAccelError(f"{what} failed with code {result}.")


def compile_for(architecture: str, source: str) -> bytes:
    """Return the machine code of `source`.

    Args:
        architecture: As NVRTC names it: "sm_90a".
        source: CUDA C++, without includes.

    Raises:
        ErnieAccelError: It does not compile; the message has the compiler's.
    """
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None),
        "nvrtcCreateProgram",
    )
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"--use_fast_math"]
        result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if result != 0:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise ErnieAccelError(f"NVRTC: {log.value.decode(errors='replace')[:2000]}")
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """A kernel on the current device."""

    def __init__(self, code: bytes, name: str, shared_bytes: int) -> None:
        """Load it.

        Args:
            code: Machine code.
            name: Of the function.
            shared_bytes: Of shared memory that each program takes.
        """
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        check(driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        check(driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), "cuModuleGetFunction")
        check(driver().cuFuncSetAttribute(self._function, _SHARED_MEMORY, shared_bytes), "cuFuncSetAttribute")
        self._shared_bytes = shared_bytes

    def launch(self, programs: int, threads: int, arguments: Sequence[object]) -> None:
        """Launch `programs` of `threads` each on the current stream.

        Args:
            programs: How many.
            threads: Of each.
            arguments: As ctypes has them.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))  # type: ignore[arg-type]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        result = driver().cuLaunchKernel(
            self._function, programs, 1, 1, threads, 1, 1, self._shared_bytes, stream, pointers, None
        )
        check(result, "cuLaunchKernel")
