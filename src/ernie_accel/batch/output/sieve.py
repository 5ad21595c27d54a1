"""Look at pictures: blank, blurred, grid-patterned, or nearly the same as one before.

The measures are classical and cheap: a few milliseconds on one core at 1024 px.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

from ernie_accel.batch.input.sift import HASH_SIDE, Finding, Sift
from ernie_accel.fidelity.grid import LEAST_SIDE, grid_of

_GRID_PERIODS = (8, 16, 32)  # pixels: latent patches of the supported models, and twice that


class Sieve:
    """Looks at pictures one after the other, from any thread, and remembers the hashes of those let through."""

    def __init__(self, sift: Sift, known: Iterable[tuple[str, str]] = ()) -> None:
        """Start with pictures let through by earlier runs, as (hash, path)."""
        self._sift = sift
        self._lock = threading.Lock()
        self._hashes = np.zeros(1024, dtype=np.uint64)  # doubled when full; the first len(_paths) count
        self._paths: list[str] = []
        for digits, path in known:
            self._remember(int(digits, 16), path)

    def look(self, picture: Image.Image, path: str) -> Finding:
        """Return what is found; `path` is how later near-duplicates of this picture name it."""
        grey = np.asarray(picture.convert("L"), dtype=np.float32)
        if reason := self._flaw(grey):
            return Finding(None, reason)
        score, limit = None, self._sift.grid_score
        if limit is not None and min(grey.shape) >= LEAST_SIDE:
            score = grid_of(grey)
            if score > limit:  # before the look at edges, which strong grids have, too: these are the ones to refine
                return Finding(None, f"faint grid: its score is {score:.2f}, more than {limit:g}", score, gridded=True)
        if reason := self._edges(grey):
            return Finding(None, reason)
        if self._sift.duplicate_bits is None:
            return Finding(grid_score=score)
        digest = difference_hash(picture)
        with self._lock:
            reason = self._duplicate(digest, path)
            if reason is None:
                self._remember(digest, path)
        return Finding(f"{digest:016x}", reason, score)

    def _flaw(self, grey: npt.NDArray[np.float32]) -> str | None:
        sift = self._sift
        if sift.blank_std is not None and (std := float(grey.std())) < sift.blank_std:
            return f"blank: the standard deviation of its grey values is {std:.2f}, less than {sift.blank_std:g}"
        if sift.blur_variance is not None and (variance := sharpness(grey)) < sift.blur_variance:
            return f"blurred: its Laplacian variance is {variance:.1f}, less than {sift.blur_variance:g}"
        return None

    def _edges(self, grey: npt.NDArray[np.float32]) -> str | None:
        limit = self._sift.grid_ratio
        if limit is not None:
            ratio, period = grid_strength(grey)
            if ratio > limit:
                return f"grid: edges every {period} px are {ratio:.1f} times as strong as others, more than {limit:g}"
        return None

    def _remember(self, digest: int, path: str) -> None:
        if len(self._paths) == self._hashes.size:
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
        self._hashes[len(self._paths)] = digest
        self._paths.append(path)

    def _duplicate(self, digest: int, path: str) -> str | None:
        limit = self._sift.duplicate_bits
        if limit is None:
            return None
        bits = bits_set(self._hashes[: len(self._paths)] ^ np.uint64(digest))
        others = [place for place in np.flatnonzero(bits <= limit) if self._paths[place] != path]
        if not others:  # or only what this very picture was before it was made again
            return None
        nearest = min(others, key=lambda place: int(bits[place]))
        return f"near-duplicate of {self._paths[nearest]}: {bits[nearest]} of 64 bits differ, no more than {limit}"


def bits_set(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """Return how many bits of each number are 1."""
    # In place of numpy 2's bitwise_count: 64 bits are summed in pairs, fours and bytes, then the bytes by a product.
    pairs = numbers - ((numbers >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    octets = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    counts: npt.NDArray[np.uint8] = ((octets * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)
    return counts


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
