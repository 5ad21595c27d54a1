"""Kernels in CUDA C++ for Hopper cards, as far as there is no such card: they compile, and where they do not run."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.kernels.hopper import attention, compiling

CUTS = [(size, element, cut) for (size, element), cuts in attention.CUTS.items() for cut in cuts]
KINDS = {1: (torch.float8_e4m3fn,), 2: (torch.bfloat16, torch.float16)}
with_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or not list(compiling._paths_of_nvrtc()), reason="there is no NVRTC"
)


@with_nvrtc
@pytest.mark.parametrize(("size", "element", "cut"), CUTS)
def test_every_cut_compiles_without_spilling(size: int, element: int, cut: attention.Cut) -> None:
    """Products whose registers are spilled or shared would wait for each other; ptxas remarks on both."""
    for dtype in KINDS[element]:
        code, log = compiling.compile_for(attention.ARCHITECTURE, attention.source_of(cut, size, dtype))
        assert code[1:4] == b"ELF"
        assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"]
        assert "serialized" not in log


@pytest.mark.parametrize(("size", "element", "cut"), CUTS)
def test_a_tile_fits_into_shared_memory_and_its_swizzles(size: int, element: int, cut: attention.Cut) -> None:
    """A Hopper card has 227 KiB for a program; a swizzle repeats after eight rows."""
    assert cut.shared_bytes(size, element) <= 227 * 1024
    rows_of_values, row_of_values = (size, cut.keys) if element == 1 else (cut.keys, size * element)
    assert row_of_values % cut.v_chunk == 0
    assert rows_of_values * cut.v_chunk % (8 * cut.v_chunk) == 0
    assert cut.keys % (32 // element) == 0
    assert max(cut.keys, cut.queries) <= 256  # rows of one tile of TMA


@with_nvrtc
def test_an_error_of_the_compiler_is_told() -> None:
    with pytest.raises(ErnieAccelError, match=r"NVRTC failed with code \d+: kernel.cu\(1\): error"):
        compiling.compile_for("sm_90a", "not CUDA")


@pytest.mark.parametrize("lacks", ["nvrtc", "driver", "capability"])
def test_without_what_it_needs_others_attend(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (10, 0) if lacks == "capability" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "compile_for", lambda *_: compiling.Compiled(b"", ""))
    monkeypatch.setattr(attention, "driver", lambda: object())
    is_usable = attention._is_usable.__wrapped__
    assert is_usable(torch.device("cuda:0")) == (lacks != "capability")

    def missing(*_: object) -> None:
        raise ErnieAccelError("there is none") if lacks == "nvrtc" else OSError("there is none")

    if lacks != "capability":
        monkeypatch.setattr(attention, "compile_for" if lacks == "nvrtc" else "driver", missing)
        assert not is_usable(torch.device("cuda:0"))


def test_it_takes_nothing_on_the_cpu_and_no_other_heads() -> None:
    assert not attention.takes(torch.empty(1, 1, 1, 128, dtype=torch.bfloat16))
    assert (64, 2) not in attention.CUTS


def test_what_is_not_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_paths_of_nvrtc", lambda: iter(()))
    with pytest.raises(ErnieAccelError, match="nvidia-cuda-nvrtc"):
        compiling._nvrtc.__wrapped__()
    with pytest.raises(ErnieAccelError, match="cuLaunchKernel failed with code 700"):
        compiling.check(700, "cuLaunchKernel")
