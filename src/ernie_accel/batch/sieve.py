"""Look at pictures: blank, blurred, grid-patterned, or nearly the same as one before.

The measures are classical and cheap: a few milliseconds on one core at 1024 px.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

from ernie_accel.batch.sift import HASH_SIDE, Finding, Sift

_GRID_PERIODS = (8, 16, 32)  # pixels: latent patches of the supported models, and twice that


class Sieve:
    """Looks at pictures one after the other, from any thread, and remembers the hashes of those let through."""

    def __init__(self, sift: Sift, known: Iterable[tuple[str, str]] = ()) -> None:
        """Start with pictures let through by earlier runs, as (hash, path)."""
        self._sift = sift
        self._lock = threading.Lock()
        self._hashes: list[int] = []
        self._paths: list[str] = []
        for digits, path in known:
            self._hashes.append(int(digits, 16))
            self._paths.append(path)

    def look(self, picture: Image.Image, path: str) -> Finding:
        """Return what is found; `path` is how later near-duplicates of this picture name it."""
        grey = np.asarray(picture.convert("L"), dtype=np.float32)
        if reason := self._flaw(grey):
            return Finding(None, reason)
        if self._sift.duplicate_bits is None:
            return Finding()
        digest = difference_hash(picture)
        with self._lock:
            reason = self._duplicate(digest, path)
            if reason is None:
                self._hashes.append(digest)
                self._paths.append(path)
        return Finding(f"{digest:016x}", reason)

    def _flaw(self, grey: npt.NDArray[np.float32]) -> str | None:
        sift = self._sift
        if sift.blank_std is not None and (std := float(grey.std())) < sift.blank_std:
            return f"blank: grey values deviate by {std:.2f}, less than {sift.blank_std:g}"
        if sift.blur_variance is not None and (variance := sharpness(grey)) < sift.blur_variance:
            return f"blurred: Laplacian variance {variance:.1f}, less than {sift.blur_variance:g}"
        if sift.grid_ratio is not None:
            ratio, period = grid_strength(grey)
            if ratio > sift.grid_ratio:
                return f"grid: steps every {period} px are {ratio:.1f} times the others, more than {sift.grid_ratio:g}"
        return None

    def _duplicate(self, digest: int, path: str) -> str | None:
        if not self._hashes:
            return None
        difference = np.array(self._hashes, dtype=np.uint64) ^ np.uint64(digest)
        bits = np.unpackbits(difference.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
        nearest = int(bits.argmin())
        limit = self._sift.duplicate_bits
        if limit is None or bits[nearest] > limit or self._paths[nearest] == path:
            return None
        return f"near-duplicate of {self._paths[nearest]}: {bits[nearest]} of 64 bits differ, no more than {limit}"


def difference_hash(picture: Image.Image) -> int:
    """Return 64 bits that say, for each cell of a 9x8 thumbnail, whether it is brighter than its right neighbour."""
    small = picture.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(small, dtype=np.int16)
    bits = (cells[:, :-1] > cells[:, 1:]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def sharpness(grey: npt.NDArray[np.float32]) -> float:
    """Return the variance of the Laplacian of a grey picture [H, W], its longer side scaled to at most 256 px."""
    longer = max(grey.shape)
    if longer > 256:
        height, width = (max(3, round(side * 256 / longer)) for side in grey.shape)
        grey = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BOX))
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return float(laplacian.var()) if laplacian.size else 0.0


def grid_strength(grey: npt.NDArray[np.float32]) -> tuple[float, int]:
    """Return how many times larger than elsewhere steps at a grid's lines are, and that grid's period in pixels.

    Medians along each line, so that an object's edge that happens to lie on the grid counts for little: only lines
    that run through most of the picture raise it.
    """
    best, best_period = 1.0, _GRID_PERIODS[0]
    profiles = [np.median(np.abs(np.diff(grey, axis=axis)), axis=1 - axis) for axis in (0, 1)]
    for period in _GRID_PERIODS:
        ratios = []
        for profile in profiles:
            on_grid = np.arange(1, profile.size + 1) % period == 0
            if on_grid.sum() < 2 or on_grid.all():
                break
            # The weakest of several lines: a grid has all of them. Half a grey value keeps flat pictures at 1.
            on, off = float(np.median(profile[on_grid])), float(profile[~on_grid].mean())
            ratios.append((on + 0.5) / (off + 0.5))
        if len(ratios) == 2 and min(ratios) > best:
            best, best_period = min(ratios), period
    return best, best_period
