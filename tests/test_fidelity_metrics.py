"""The metrics are what everybody else computes, and they do not hide what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ernie_accel.fidelity import metrics


def pictures(height=40, width=56, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 5, 7, generator=generator), (height, width), mode="bicubic"
    )
    baseline = smooth[0].clamp(0, 1)
    return (baseline + noise * torch.randn(baseline.shape, generator=generator)).clamp(0, 1), baseline


@pytest.mark.parametrize("size", [(11, 11), (40, 56), (64, 64)])
@pytest.mark.parametrize("noise", [0.001, 0.03, 0.3])
def test_ssim_is_that_of_scikit_image(size, noise):
    candidate, baseline = pictures(*size, noise=noise)
    expected = structural_similarity(
        candidate.double().numpy(),
        baseline.double().numpy(),
        data_range=1,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert metrics.ssim(candidate, baseline) == pytest.approx(expected, abs=1e-9)


def test_psnr_is_that_of_scikit_image():
    candidate, baseline = pictures()
    expected = peak_signal_noise_ratio(baseline.double().numpy(), candidate.double().numpy(), data_range=1)
    assert metrics.psnr_db(candidate, baseline) == pytest.approx(expected, abs=1e-9)


def test_nmse_and_sqnr_are_two_words_for_one_thing():
    baseline = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    candidate = baseline * 1.1
    assert metrics.nmse(candidate, baseline) == pytest.approx(0.01, rel=1e-6)
    assert metrics.sqnr_db(candidate, baseline) == pytest.approx(20, abs=1e-5)


def test_equal_pictures_are_infinitely_good():
    _, baseline = pictures()
    assert metrics.nmse(baseline, baseline) == 0
    assert metrics.psnr_db(baseline, baseline) == metrics.sqnr_db(baseline, baseline) == math.inf
    assert metrics.ssim(baseline, baseline) == pytest.approx(1)


def test_something_out_of_nothing_is_infinitely_bad():
    zero, one = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)
    assert metrics.nmse(one, zero) == math.inf
    assert metrics.sqnr_db(one, zero) == -math.inf
    assert metrics.nmse(zero, zero) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_a_good_figure(bad):
    candidate, baseline = pictures()
    candidate[0, 20, 20] = bad
    assert not metrics.nmse(candidate, baseline) < 1e6
    assert not metrics.sqnr_db(candidate, baseline) > -1e6
    assert not metrics.psnr_db(candidate, baseline) > -1e6
    assert math.isnan(metrics.ssim(candidate, baseline))


def test_a_picture_below_the_window_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"at least 11x11 pixels, got \(3, 8, 32\)"):
        metrics.ssim(torch.zeros(3, 8, 32), torch.zeros(3, 8, 32))


def test_half_precision_is_measured_in_full():
    _, baseline = pictures()
    assert metrics.nmse(baseline.bfloat16(), baseline) == pytest.approx(
        metrics.nmse(baseline.bfloat16().double(), baseline.double())
    )
