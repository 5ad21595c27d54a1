"""Find the faint grid that distilled checkpoints can leave on a picture: a pattern that repeats every 8 or 16 pixels.

A pattern with the period of a patch has its energy at multiples of one frequency, in both directions. What a picture
shows has it everywhere, most of it at edges. So what lies in busy places counts less, each of these frequencies is held
against its surroundings, and what stands out is summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from ernie_accel.editing.pictures import Picture

Grey: TypeAlias = npt.NDArray[np.floating[Any]]

STRIDE = 16
"""Pixels of a patch of the supported models: two latents of the VAE of 8 pixels, whose pattern repeats in it."""

LEAST_SIDE = 96
"""Pixels; in a smaller picture, the frequencies of a grid have no surroundings to be held against."""

VISIBLE = 0.5
"""A `grid_score` above this is a grid; ``benchmarks/grid_score.py`` measures what that finds and misses."""

# Chosen on one half of the pictures of the benchmark, which reports the other.
_CLIP = 12.0  # grey levels: an edge or a strong texture counts no more than this
_BLUR = 8  # pixels to each side: what is taken off first, so that a slope is not clipped
_BUSY = 4  # pixels to each side: how far around a pixel it is looked how much happens there
_CALM = 2.5  # grey levels, root mean square: places where no more happens count fully
_USUAL = 0.3  # the part of a picture that is calm whatever happens there, as a texture or the grid itself is everywhere
_AROUND = 10  # how far the surroundings of a frequency reach, in its spectrum's steps
_TIMES = 6.0  # how often its surroundings' power a frequency must have; what is above counts
_ALONE = 6.0  # how much more than the second the strongest frequency counts at most
_NOISE = 0.15  # power of rounding to whole grey levels, and a little more


def grid_score(image: Picture, *, scale: float = 1.0) -> float:
    """Return how strong a grid of 8 or 16 pixels a picture shows: in grey levels of 255, root mean square; 0 for none.

    Clean pictures score below 0.5, JPEG's blocks included; above `VISIBLE` (0.5) there is a grid. A texture of the
    picture that repeats every 8 or 16 pixels, such as a checked cloth drawn so, is a grid as well.

    Args:
        image: As for `image_to_image`: a file, a PIL picture, an array [H, W, 3] or a tensor [3, H, W]. Both sides have
            at least 96 pixels.
        scale: How much larger the picture is than when it was drawn, if it was resized.

    Raises:
        PictureError: The picture cannot be used.
        ValueError: It is too small, or the scale is not a number above 0.
    """
    from ernie_accel.editing.pictures import as_pictures  # here, because it loads torch

    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a number above 0, got {scale!r}")
    pixels = as_pictures(image)[0].permute(1, 2, 0).numpy()
    grey = (pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)) * 255
    if scale != 1:
        size = tuple(max(1, round(side / scale)) for side in grey.shape[::-1])
        grey = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.LANCZOS))
    if min(grey.shape) < LEAST_SIDE:
        height, width = grey.shape
        raise ValueError(f"a grid shows from {LEAST_SIDE} x {LEAST_SIDE} pixels on; got {width} x {height}")
    return grid_of(grey)


def grid_of(grey: Grey) -> float:
    """Return the `grid_score` of grey values [H, W], 0 to 255, both sides at least `LEAST_SIDE`."""
    height, width = (side // STRIDE * STRIDE for side in grey.shape)  # so that a grid falls on whole frequencies
    grey = np.asarray(grey[:height, :width], dtype=np.float64)
    detail = np.clip(grey - _blurred(_blurred(grey, _BLUR), _BLUR), -_CLIP, _CLIP)
    weights = np.outer(_hann(height), _hann(width)) * _calmness(detail)
    # A pattern that is the same everywhere keeps its strength, wherever the weights are.
    power = np.abs(np.fft.fft2(detail * (weights / weights.mean()))) ** 2 / detail.size
    standing_out: list[float] = []
    for down in range(STRIDE // 2 + 1):
        for across in range(-STRIDE // 2 + 1, STRIDE // 2 + 1):
            # The other half of the spectrum of real values repeats this one.
            if down in (0, STRIDE // 2) and across <= 0 and (down, across) != (STRIDE // 2, 0):
                continue
            peak, around = _held_against(power, down * (height // STRIDE), across * (width // STRIDE))
            standing_out.append(max(0.0, peak - _TIMES * around))
    first, second = sorted(standing_out)[-1:-3:-1]
    # A wall of bricks may meet one of these frequencies by chance; a grid has several.
    energy = sum(standing_out) - first + min(first, _ALONE * second)
    return float(np.sqrt(2 * energy / detail.size))


def _calmness(detail: Grey) -> Grey:
    """Return how much each pixel counts, from 0 to 1: little near edges, also because JPEG leaves its blocks there."""
    happening = _blurred(detail**2, _BUSY)
    usual = _CALM**2 + float(np.quantile(happening, _USUAL))
    return usual / (usual + happening)


def _held_against(power: Grey, row: int, column: int) -> tuple[float, float]:
    """Return the power at a frequency, and what it would be there if it were as around it."""
    height, width = power.shape
    reach_y, reach_x = (min(_AROUND, side // STRIDE // 2) for side in (height, width))
    y, x = np.arange(-reach_y, reach_y + 1), np.arange(-reach_x, reach_x + 1)
    near = power[np.ix_((row + y) % height, (column + x) % width)]
    # The window spreads a frequency over its neighbours. Straight edges have their power along one line of the
    # spectrum, so the lines through the frequency are looked at by themselves.
    middle_y, middle_x = abs(y) <= 1, abs(x) <= 1
    beside, above = near[np.ix_(middle_y, abs(x) > 2)], near[np.ix_(abs(y) > 2, middle_x)]
    outside = near[(abs(y)[:, None] > 2) | (abs(x)[None] > 2)]
    return float(near[reach_y, reach_x]), max(beside.mean(), above.mean(), outside.mean()) + _NOISE


def _blurred(values: Grey, reach: int) -> Grey:
    """Return means over squares of `reach` pixels to each side, the picture mirrored at its edges."""
    size = 2 * reach + 1
    for _ in range(2):  # each time over the rows, which are columns the second time
        sums = np.pad(values, ((reach + 1, reach), (0, 0)), mode="reflect").cumsum(0)
        values = (sums[size:] - sums[:-size]).T / size
    return values


def _hann(size: int) -> Grey:
    return np.hanning(size + 1)[:size]
