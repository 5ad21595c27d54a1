"""Say which pictures are sifted out: the thresholds, in plain sight, and what a look at a picture found.

The measures themselves are in `sieve`. They find pictures in which something went wrong, not pictures that are not
beautiful.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ernie_accel.batch.input.options import check_arguments
from ernie_accel.core.errors import ErnieAccelError

HASH_SIDE = 8
"""A difference hash has 8x8 bits."""


@dataclass(frozen=True, kw_only=True)
class Sift:
    """What is sifted out; a threshold of None turns its measure off. The defaults let only clear cases through it.

    Attributes:
        blank_std: Standard deviation of grey values, 0 to 255, below which a picture is blank.
        blur_variance: Variance of the Laplacian of grey values at 256 px below which it is blurred. Off unless given:
            flat graphics and soft backgrounds are legitimate.
        grid_ratio: How much larger, on the average, grey steps are at multiples of 8, 16 or 32 px than elsewhere, above
            which it shows a grid (broken tiling, a corrupt patch embedding).
        grid_score: The `fidelity.grid_score` above which a picture shows the faint grid of distilled checkpoints; 0.5
            is visible. Off unless given: a checked cloth has such a pattern too. Below 96 px nothing is looked for.
        refine: Whether a picture with such a grid is drawn once more from itself (strength 0.3, 20 steps) before it
            counts as rejected; for engines that draw from pictures.
        duplicate_bits: Differing bits of 64, up to which two pictures' difference hashes make them near-duplicates.
            Off unless given: product pictures on one background are alike.
        reroll: How often a row whose picture is sifted out is tried with another seed.
    """

    blank_std: float | None = 2.0
    blur_variance: float | None = None
    grid_ratio: float | None = 3.0
    grid_score: float | None = None
    refine: bool = False
    duplicate_bits: int | None = None
    reroll: int = 0

    def __post_init__(self) -> None:
        check_arguments("Sift", vars(self))
        if self.refine and self.grid_score is None:
            raise ErnieAccelError("refine has no effect without grid_score; give its threshold, such as 0.5")
        for name, low, high in (("blank_std", 0, 255), ("grid_ratio", 1, 1e6)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ErnieAccelError(f"{name} is {value}; expected {low} to {high:g}")

    def __str__(self) -> str:
        """Return the thresholds in use, as the ledger keeps them."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        # What is off is not named, or jobs from before it was there would count as changed.
        return ", ".join(f"{name}={value:g}" for name, value in given if value is not None and value is not False)


@dataclass(frozen=True)
class Finding:
    """What looking at a picture found.

    Attributes:
        hash: 16 hexadecimal digits; None where near-duplicates are not looked for.
        reason: Why it is rejected; None: it is not.
        grid_score: Its `fidelity.grid_score`; None where that was not asked for, or something else is wrong with it.
        gridded: Whether it is rejected for that.
    """

    hash: str | None = None
    reason: str | None = None
    grid_score: float | None = None
    gridded: bool = False
