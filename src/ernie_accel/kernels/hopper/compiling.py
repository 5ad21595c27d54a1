"""CUDA C++ to a kernel that can be launched, through the libraries that torch and the driver bring: NVRTC and libcuda.

Torch's builds for CUDA depend on NVRTC, so nothing has to be installed, and compiling takes half a second.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ernie_accel.core.errors import ErnieAccelError

_log = logging.getLogger(__name__)
_CAPABILITY = (9, 0)
#: As NVRTC names a Hopper card with all its instructions.
_ARCHITECTURE = "sm_90a"
_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Compiled(NamedTuple):
    """What a compiler made of a source.

    Attributes:
        code: Machine code.
        log: Its remarks, with the registers of each function and what was spilled from them.
    """

    code: bytes
    log: str


@functools.cache
def driver() -> ctypes.CDLL:
    """Return the driver's library.

    Raises:
        OSError: There is none.
    """
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Return NVRTC of the CUDA version that torch was built for; without CUDA, any that is installed."""
    for path in _paths_of_nvrtc():
        try:
            if path.is_absolute():
                for beside in sorted(path.parent.glob("libnvrtc-builtins.so*")):
                    ctypes.CDLL(str(beside))  # NVRTC loads it by name, and may not look in its own folder
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise ErnieAccelError("NVRTC was not found. Torch's builds for CUDA bring it, in the package nvidia-cuda-nvrtc.")


def _paths_of_nvrtc() -> Iterator[Path]:
    version = (torch.version.cuda or "*").split(".")[0]
    if torch.version.cuda:
        yield Path(f"libnvrtc.so.{version}")  # torch has loaded it, from wherever it lies
    spec = importlib.util.find_spec("nvidia")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        yield from sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{version}"))


def check(result: int, what: str) -> None:
    """Raise an `ErnieAccelError` if a call of the driver did not succeed."""
    if result != 0:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(result, ctypes.byref(name))
        raise ErnieAccelError(f"{what} failed with {(name.value or b'an unknown error').decode()} ({result}).")


def _check_nvrtc(result: int, what: str) -> None:
    if result != 0:
        raise ErnieAccelError(f"NVRTC: {what} failed with code {result}.")


def compile_source(source: str) -> Compiled:
    """Compile CUDA C++, without includes, for Hopper cards.

    Raises:
        ErnieAccelError: There is no NVRTC, or it cannot compile this; the message has the compiler's.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    _check_nvrtc(created, "nvrtcCreateProgram")
    try:
        options = [f"--gpu-architecture={_ARCHITECTURE}".encode(), b"--std=c++17", b"--use_fast_math"]
        options.append(b"--ptxas-options=-v")
        result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
        if result != 0:
            raise ErnieAccelError(f"NVRTC failed with code {result}: {log[:2000]}")
        return Compiled(_read("CUBIN", program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def sources(*names: str) -> Iterator[str]:
    """Yield the texts of files in this folder."""
    for name in names:
        yield Path(__file__).with_name(name).read_text(encoding="utf-8")


def _read(what: str, program: ctypes.c_void_p) -> bytes:
    """Return a result of the compiler: "CUBIN" or "ProgramLog"."""
    nvrtc, size = _nvrtc(), ctypes.c_size_t()
    _check_nvrtc(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    data = ctypes.create_string_buffer(size.value)
    _check_nvrtc(getattr(nvrtc, f"nvrtcGet{what}")(program, data), f"nvrtcGet{what}")
    return data.raw


def enter_context(device: torch.device) -> None:
    """Make a CUDA device's context current if there is none: a thread has none before its first call of the runtime."""
    context, handle = ctypes.c_void_p(), ctypes.c_int()
    check(driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if context.value is None:
        check(driver().cuDeviceGet(ctypes.byref(handle), device.index), "cuDeviceGet")
        check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
        check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


@functools.cache
def is_usable(device: torch.device) -> bool:
    """Return whether a CUDA device is a Hopper card, and there is all that kernels for it need."""
    if torch.cuda.get_device_capability(device) != _CAPABILITY or torch.version.hip is not None:
        return False
    try:
        Kernel(compile_source('extern "C" __global__ void nothing() {}').code, "nothing", 0, device)
        return bool(driver().cuTensorMapEncodeTiled)
    except (ErnieAccelError, OSError, AttributeError) as error:  # the last for a driver without that function
        _log.warning("cuDNN and cuBLAS are used in place of the kernels for Hopper cards: %s", error)
        return False


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class Kernel:
    """A kernel that is loaded on a CUDA device."""

    def __init__(self, code: bytes, name: str, shared_bytes: int, device: torch.device) -> None:
        """Load it.

        Args:
            code: Machine code.
            name: Name of the function in it.
            shared_bytes: Dynamic shared memory of each thread block, in bytes.
            device: CUDA device, with its number.
        """
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._shared_bytes, self._device = shared_bytes, device
        with torch.cuda.device(device):
            enter_context(device)
            check(driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
            found = driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode())
            check(found, f"cuModuleGetFunction for {name}")
            check(driver().cuFuncSetAttribute(self._function, _SHARED_MEMORY, shared_bytes), "cuFuncSetAttribute")

    def launch(self, blocks: int, threads: int, arguments: Sequence[object]) -> None:
        """Launch it on the device's current stream, in the device's context (`enter_context`).

        Args:
            blocks: Number of thread blocks.
            threads: Threads of each block.
            arguments: The kernel's arguments, as ctypes has them.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))  # type: ignore[arg-type]
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        result = driver().cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream, pointers, None
        )
        check(result, "cuLaunchKernel")
