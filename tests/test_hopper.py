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
from ernie_accel.kernels.hopper import attention, compiling, product

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
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_every_product_compiles_without_spilling(activation: int) -> None:
    code, log = compiling.compile_source(product.source_of(activation))
    assert code[1:4] == b"ELF"
    assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"]
    assert "serialized" not in log
    assert "setmaxnreg" not in log  # that it is ignored
    assert "warning" not in log
    assert product.shared_bytes() <= 227 * 1024


#: Features, terms, whether one half gates the other, and whether the kernel is the faster one for 4224 rows (H200).
PRODUCTS = [
    (12288, 4096, False, True),  # ERNIE-Image
    (4096, 4096, False, True),
    (24576, 4096, True, True),
    (4096, 12288, False, True),
    (11520, 3840, False, False),  # Z-Image: tiles for 11.25 rounds; cuBLAS' smaller ones take 11.5
    (3840, 3840, False, True),
    (20480, 3840, True, True),
    (3840, 10240, False, True),
]


@pytest.mark.parametrize(("features", "terms", "gated", "faster"), PRODUCTS)
def test_who_multiplies(features: int, terms: int, gated: bool, faster: bool) -> None:
    assert product.is_faster(4224, features, terms, terms, 132, gated=gated) == faster
    assert not product.is_faster(128, features, terms, terms, 132, gated=gated)  # a prompt


def test_leaving_out_columns_counts() -> None:
    """Of 128 spare columns, the kernel reads those that an adapter needs."""
    assert not product.is_faster(4224, 11520, 3840, 3840, 132, gated=False)
    assert product.is_faster(4224, 11520, 3840 + 48, 3840 + 128, 132, gated=False)


@pytest.mark.parametrize(
    ("columns", "features", "pitch", "terms", "gated", "taken"),
    [
        (4096, 24576, 4096, 4096, True, True),
        (4096, 24576, 4224, 4096, True, True),  # a weight that is part of a wider one
        (4224, 24576, 4224, 4112, True, True),
        (4096, 24576, 4104, 4096, True, False),  # rows that TMA cannot read
        (4104, 24576, 4104, 4104, True, False),
        (4096, 4104, 4096, 4096, False, True),
        (4096, 8200, 4096, 4096, True, False),  # halves of which no row is aligned
        (112, 4096, 112, 112, False, False),  # not one full block
        (4096, 4096, 4096, 4112, False, False),  # more terms than there are columns
    ],
)
def test_products_that_the_kernel_can_read(
    columns: int, features: int, pitch: int, terms: int, gated: bool, taken: bool, as_on_hopper: None
) -> None:
    x, x_scale, weight, weight_scale = operands(columns, features, pitch)
    assert product.takes(x, x_scale, weight, weight_scale, terms, gated=gated) == taken


def test_products_that_the_kernel_would_read_as_something_else_are_left_to_torch(as_on_hopper: None) -> None:
    """Which refuses them, or can."""
    x, x_scale, weight, weight_scale = operands(4096, 4096, 4096)

    def taken(**others: torch.Tensor) -> bool:
        given = {"x_mk": x, "x_scale": x_scale, "weight_nk": weight, "weight_scale": weight_scale} | others
        return product.takes(**given, terms=4096, gated=False)

    assert taken()
    assert not taken(x_scale=x_scale[:1])  # one for all rows
    assert not taken(weight_scale=weight_scale[:, :1])
    assert not taken(weight_scale=weight_scale.double())
    assert not taken(x_scale=torch.empty(128, 1)[::2])
    assert not taken(weight_scale=torch.empty(1, 4097)[:, 1:])  # two scales are read at once
    assert not taken(weight_nk=weight.view(torch.float8_e5m2))
    assert not taken(x_mk=x.view(torch.float8_e5m2))


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "is_usable", lambda device: True)
    monkeypatch.setattr(product, "is_faster", lambda *sizes, gated: True)
    monkeypatch.setattr(product, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def operands(columns: int, features: int, pitch: int) -> tuple[torch.Tensor, ...]:
    """Return rows, their scales, a weight that is part of one with `pitch` columns, and its scales."""
    x = torch.empty(64, columns, dtype=torch.float8_e4m3fn)
    weight = torch.empty(features, pitch, dtype=torch.float8_e4m3fn)[:, :columns]
    return x, torch.empty(64, 1), weight, torch.empty(1, features)


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
    monkeypatch.setattr(compiling, "compile_source", lambda *_: compiling.Compiled(b"", ""))
    monkeypatch.setattr(compiling, "driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=object()))
    monkeypatch.setattr(compiling, "Kernel", lambda *_: None)
    is_usable = compiling.is_usable.__wrapped__
    assert is_usable(torch.device("cuda:0")) == (lacks != "capability")

    def missing(*_: object) -> None:
        raise ErnieAccelError("there is none") if lacks == "nvrtc" else OSError("there is none")

    if lacks != "capability":
        monkeypatch.setattr(compiling, "compile_source" if lacks == "nvrtc" else "driver", missing)
        assert not is_usable(torch.device("cuda:0"))
        assert "cuDNN and cuBLAS are used in place of the kernels for Hopper cards: there is none" in caplog.text


def test_who_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA alone, and with heads of 96 and 128; the others are cuDNN's."""
    monkeypatch.setattr(attention, "is_usable", lambda device: True)
    for size, device, expected in ((128, "cuda", True), (96, "cuda", True), (64, "cuda", False), (128, "cpu", False)):
        with FakeTensorMode():
            q = torch.empty(1, 1, 1, size, dtype=torch.bfloat16, device=device)
        assert attention.takes(q) == expected
        assert (ops._attention(q) is attention) == expected
    with FakeTensorMode():  # cuDNN has no kernel for it; `CheckFinite` repeats a picture in it
        assert ops._attention(torch.empty(1, 1, 1, 128, device="cuda")) is reference


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
