"""Kernels in CUDA C++ for Hopper cards, as far as there is no such card: they compile, and where they do not run."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.kernels import ops, reference
from ernie_accel.kernels.hopper import attention, compiling

TILINGS = [(size, element, tiling) for (size, element), tilings in attention.TILINGS.items() for tiling in tilings]
KINDS = {1: (torch.float8_e4m3fn,), 2: (torch.bfloat16, torch.float16)}
with_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or not list(compiling._paths_of_nvrtc()), reason="there is no NVRTC"
)


@with_nvrtc
@pytest.mark.parametrize(("size", "element", "tiling"), TILINGS)
def test_every_tiling_compiles_without_spilling(size: int, element: int, tiling: attention.Tiling) -> None:
    """Products whose registers are spilled or shared would wait for each other; ptxas remarks on both."""
    for dtype in KINDS[element]:
        code, log = compiling.compile_source(attention.source_of(tiling, size, dtype))
        assert code[1:4] == b"ELF"
        assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"]
        assert "serialized" not in log
        assert "setmaxnreg" not in log  # that it is ignored


@pytest.mark.parametrize(("size", "element", "tiling"), TILINGS)
def test_a_tile_fits_into_shared_memory_and_its_swizzles(size: int, element: int, tiling: attention.Tiling) -> None:
    """A Hopper card has 227 KiB for a program; a swizzle repeats after eight rows."""
    assert tiling.shared_bytes(size, element) <= 227 * 1024
    rows_of_values, row_of_values = (size, tiling.keys) if element == 1 else (tiling.keys, size * element)
    assert row_of_values % tiling.v_chunk == 0
    assert rows_of_values % 8 == 0
    assert tiling.keys % (32 // element) == 0
    assert max(tiling.keys, tiling.queries) <= 256  # rows of one tile of TMA


@with_nvrtc
def test_an_error_of_the_compiler_is_told() -> None:
    with pytest.raises(ErnieAccelError, match=r"NVRTC failed with code \d+: kernel.cu\(1\): error"):
        compiling.compile_source("not CUDA")


@pytest.mark.parametrize("lacks", ["nvrtc", "driver", "capability"])
def test_without_what_it_needs_it_takes_nothing_and_says_why(
    lacks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capability = (10, 0) if lacks == "capability" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "compile_source", lambda *_: compiling.Compiled(b"", ""))
    monkeypatch.setattr(attention, "driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=object()))
    monkeypatch.setattr(attention, "Kernel", lambda *_: None)
    is_usable = attention._is_usable.__wrapped__
    assert is_usable(torch.device("cuda:0")) == (lacks != "capability")

    def missing(*_: object) -> None:
        raise ErnieAccelError("there is none") if lacks == "nvrtc" else OSError("there is none")

    if lacks != "capability":
        monkeypatch.setattr(attention, "compile_source" if lacks == "nvrtc" else "driver", missing)
        assert not is_usable(torch.device("cuda:0"))
        assert "cuDNN attends in place of the kernel for Hopper cards: there is none" in caplog.text


def test_who_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA alone, and with heads of 96 and 128; the others are cuDNN's."""
    monkeypatch.setattr(attention, "_is_usable", lambda device: True)
    for size, device, expected in ((128, "cuda", True), (96, "cuda", True), (64, "cuda", False), (128, "cpu", False)):
        with FakeTensorMode():
            q = torch.empty(1, 1, 1, size, dtype=torch.bfloat16, device=device)
        assert attention.takes(q) == expected
        assert (ops._attention(q) is attention) == expected


def test_queries_of_a_symbolic_size_are_traced() -> None:
    """A size that torch.compile leaves open cannot be looked up."""
    traced = torch.compile(
        lambda qkv, rope, w: ops.qkv_fp8_pairs(qkv, w, w, rope, 2, 1e-6), dynamic=True, backend="eager"
    )
    for size in (16, 32):
        qkv, weight = torch.randn(1, 3, 6 * size).bfloat16(), torch.ones(size).bfloat16()
        rope = torch.stack((torch.ones(1, 3, 1, size // 2), torch.zeros(1, 3, 1, size // 2)))
        got, expected = traced(qkv, rope, weight), reference.qkv_fp8_pairs(qkv, weight, weight, rope, 2, 1e-6)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True))


def test_what_is_not_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_paths_of_nvrtc", lambda: iter(()))
    with pytest.raises(ErnieAccelError, match="nvidia-cuda-nvrtc"):
        compiling._nvrtc.__wrapped__()
    monkeypatch.setattr(compiling, "driver", lambda: SimpleNamespace(cuGetErrorName=lambda result, name: None))
    with pytest.raises(ErnieAccelError, match=r"cuLaunchKernel failed with an unknown error \(700\)"):
        compiling.check(700, "cuLaunchKernel")
