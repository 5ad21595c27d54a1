"""Distances between a picture, or its latents, and the reference. All in float64, all NaN where a value is NaN."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def error_energy(candidate: torch.Tensor, baseline: torch.Tensor) -> float:
    """Return the sum of squared differences of two tensors of one shape."""
    return (candidate.double() - baseline.double()).square().sum().item()


def energy(tensor: torch.Tensor) -> float:
    """Return the sum of squares."""
    return tensor.double().square().sum().item()


def ratio(error: float, signal: float) -> float:
    """Return `error` / `signal`; 0 for nothing out of nothing, infinite for something out of nothing."""
    if signal == 0:
        return 0.0 if error == 0 else math.nan if math.isnan(error) else math.inf
    return error / signal


def decibels(power_ratio: float) -> float:
    """Return ``10 log10`` of a signal-to-error power ratio given as error-to-signal: infinite for no error at all."""
    if math.isnan(power_ratio):
        return math.nan
    return math.inf if power_ratio == 0 else -math.inf if math.isinf(power_ratio) else -10 * math.log10(power_ratio)


def nmse(candidate: torch.Tensor, baseline: torch.Tensor) -> float:
    """Return the mean squared error divided by the baseline's mean square, >= 0; 0.01 is 20 dB."""
    return ratio(error_energy(candidate, baseline), energy(baseline))


def sqnr_db(candidate: torch.Tensor, baseline: torch.Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB: the baseline's energy over that of the difference."""
    return decibels(nmse(candidate, baseline))


def psnr_db(candidate: torch.Tensor, baseline: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return decibels(error_energy(candidate, baseline) / baseline.numel())


def ssim(candidate: torch.Tensor, baseline: torch.Tensor) -> float:
    """Return the structural similarity of two pictures [C, H, W] in [0, 1], at most 1; H and W >= 11 pixels.

    As Wang et al. 2004 have it: Gaussian window of sigma 1.5 and 11 taps, K1 0.01, K2 0.03, the mean over channels and
    over all pixels whose window lies within the picture. Equal to ``skimage.metrics.structural_similarity`` with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1``.

    Raises:
        ValueError: The pictures are smaller than the window.
    """
    if min(baseline.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11x11 pixels, got {tuple(baseline.shape)}")
    a, b = candidate.double()[:, None], baseline.double()[:, None]
    distance = torch.arange(-5, 6, dtype=torch.float64)
    taps = torch.exp(-(distance**2) / (2 * 1.5**2))
    taps = taps / taps.sum()

    def local_mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(x, taps.view(1, 1, 11, 1)), taps.view(1, 1, 1, 11))

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item()
