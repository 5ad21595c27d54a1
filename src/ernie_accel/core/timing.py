"""Compare two series of times measured alternately, and say if the machine is too busy to tell."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ernie_accel.common.language import said

#: Above this ratio of median to minimum, something else was using the machine; on an idle one it is 1.0 to 1.2.
BUSY_SPREAD = 1.5


def spread(times: Sequence[float]) -> float:
    """Return the median over the minimum: 1 on a machine that does nothing else."""
    return statistics.median(times) / min(times)


@dataclass(frozen=True)
class Race:
    """The times of two ways to make the same pictures, measured alternately.

    Attributes:
        first_ms: Milliseconds of each picture, the one way.
        second_ms: The other way, as many.
    """

    first_ms: tuple[float, ...]
    second_ms: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times as fast the second way is: by the medians, as they are shown."""
        return statistics.median(self.first_ms) / statistics.median(self.second_ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile of the ratios of all pairs."""
        ratios = [first / second for first, second in zip(self.first_ms, self.second_ms, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return low, high

    @property
    def spread(self) -> float:
        """The larger `spread` of the two."""
        return max(spread(self.first_ms), spread(self.second_ms))

    @property
    def too_busy(self) -> bool:
        """Whether the times differ too much among themselves to say which way is faster."""
        return self.spread > BUSY_SPREAD

    @property
    def verdict(self) -> str:
        """Which is faster, in words."""
        low, high = self.quartiles
        if self.too_busy:
            return said("this machine is too busy to tell")
        return (
            said("faster")
            if low > 1
            else said("slower on this machine")
            if high < 1
            else said("no measurable difference")
        )

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        """The ratio and the verdict, or why there is none, for a message."""
        if self.too_busy:
            return said(
                "{verdict}: the median picture took {spread:.1f} times as long as the fastest one (alone, a machine "
                "stays below {limit:g}); run again when it is idle",
                verdict=self.verdict,
                spread=self.spread,
                limit=BUSY_SPREAD,
            )
        low, high = self.quartiles
        return said(
            "{ratio:.2f} x  {verdict} (of the medians; quartiles of the pairs {low:.2f} to {high:.2f})",
            ratio=self.ratio,
            verdict=self.verdict,
            low=low,
            high=high,
        )
