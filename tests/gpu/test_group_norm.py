"""Group norm of channels-last pictures against its plain-torch twin: on a GPU, or interpreted (TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ernie_accel.kernels import reference
from tests.gpu.test_kernels import DEVICE, close, rand

EPS = 1e-6
#: Batch, channels, height, width, groups: also channels and groups that are no powers of two, one pixel, groups of one
#: channel and of more than the 16 that the first kernel has room for. Small: the interpreter takes 5 ms for a program.
SIZES = [(1, 16, 5, 7, 16), (2, 48, 5, 13, 6), (2, 160, 1, 1, 4), (1, 64, 9, 13, 4)]
#: Of the real decoder, cut into parts as they are there: in a part of a million pixels sums would lose their last bits.
LARGE = [(1, 128, 1024, 1024, 32), (2, 512, 128, 96, 32)] if DEVICE == "cuda" else []
#: (programs, tile) that cut small pictures into one part of many tiles, a few of several, and as many parts as tiles.
SPLITS = ((1, 512), (3, 512), (512, 128))


@pytest.fixture
def kernels() -> object:
    pytest.importorskip("triton")
    from ernie_accel.kernels import group_norm

    return group_norm


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return rand(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def made(size: tuple[int, ...]):
    b, c, h, w, groups = size
    return picture(b, c, h, w), picture(b, c, h, w, seed=1), rand(c, seed=2), (rand(c, seed=3), rand(c, seed=4), groups)


CASES = [(size, None) for size in SIZES + LARGE]  # None: as they are cut
CASES += [(size, split) for size in SIZES if size[2:4] != (1, 1) for split in SPLITS]


@pytest.fixture(params=CASES, ids=str)
def case(request, kernels, monkeypatch: pytest.MonkeyPatch):
    size, split = request.param
    if split is not None:
        for name, value in zip(("_PROGRAMS", "_TILE"), split, strict=True):
            monkeypatch.setattr(kernels, name, value)
    return made(size)


def close_affine(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_add", [False, True])
def test_group_norm_affine(kernels, case, with_add: bool) -> None:
    x, _, add, norm = case
    add = add if with_add else None
    close_affine(kernels.group_norm_affine(x, add, *norm, EPS), reference.group_norm_affine(x, add, *norm, EPS))


@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_group_norm_affine(kernels, case, with_residual: bool, with_add: bool) -> None:
    x, residual, add, norm = case
    arguments = (x, residual if with_residual else None, add if with_add else None, *norm, EPS)
    y, affine = kernels.add_group_norm_affine(*arguments)
    expected_y, expected_affine = reference.add_group_norm_affine(*arguments)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, expected_y)
    close_affine(affine, expected_affine)


@pytest.mark.parametrize("size", [*SIZES, *LARGE], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_affine(kernels, size: tuple[int, ...], silu: bool) -> None:
    x, _, _, norm = made(size)
    affine = reference.group_norm_affine(x, None, *norm, EPS)
    y = kernels.affine(x, affine, silu)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, reference.affine(x, affine, silu))
    weight, bias, groups = norm
    normed = F.group_norm(x.float(), groups, weight.float(), bias.float(), EPS)
    close(y, (F.silu(normed) if silu else normed).to(y.dtype))


def test_a_mean_far_above_the_spread_costs_no_digits(kernels) -> None:
    """The trap of E[x^2] - E[x]^2: in float32 nothing is left of a variance a millionth of the squared mean."""
    x = 3000 + picture(1, 32, 30, 30).float()
    norm = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE), 8
    affine = kernels.group_norm_affine(x, None, *norm, EPS)
    expected = F.group_norm(x.double(), 8, eps=EPS)
    assert (reference.affine(x, affine, False) - expected).abs().max() < 2e-3  # 3000 has a float32 unit of 2e-4


def test_other_pictures_are_not_touched_by_nan_or_infinity(kernels) -> None:
    x = picture(3, 32, 6, 6)
    x[0, 1, 2, 3], x[2, 4, 0, 0] = float("nan"), float("inf")
    norm = rand(32), rand(32), 8
    y = kernels.affine(x, kernels.group_norm_affine(x, None, *norm, EPS), True)
    assert y[1].isfinite().all()
    assert y[0, :4].isnan().all()
    assert y[0, 4:].isfinite().all()  # other groups neither
    assert not y[2, 4:8].isfinite().any()


def test_a_layout_that_is_not_channels_last_is_taken_too(kernels) -> None:
    x, norm = rand(2, 32, 4, 5), (rand(32), rand(32), 8)
    close_affine(kernels.group_norm_affine(x, None, *norm, EPS), reference.group_norm_affine(x, None, *norm, EPS))


@pytest.mark.skipif(DEVICE == "cpu", reason="operators run their twin on the CPU")
def test_the_statistics_of_two_runs_are_the_same_bits(kernels) -> None:
    x, norm = picture(1, 128, 512, 512), (rand(128), rand(128), 32)
    first, second = (kernels.group_norm_affine(x, None, *norm, EPS) for _ in range(2))
    assert torch.equal(first, second)
