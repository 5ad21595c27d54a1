"""What is faster is said only where the times allow it."""

from __future__ import annotations

import pytest

from ernie_accel.core.timing import BUSY_SPREAD, Race, spread
from ernie_accel.demo.show import _labels, bfloat16_pays


def race(first, second):
    return Race(tuple(map(float, first)), tuple(map(float, second)))


CALM = (100, 101, 103, 102, 104, 100, 101, 102)
BUSY = (100, 7800, 101, 7700, 7900, 7800, 102, 7800)


def times(factor, series=CALM):
    return tuple(factor * each for each in series)


def test_on_a_calm_machine_the_ratio_is_that_of_the_medians_and_the_quartiles_decide():
    found = race(times(2), CALM)
    assert found.ratio == 2.0
    assert found.verdict == "faster"
    assert str(found).startswith("2.00 x  faster")
    assert race(CALM, times(2)).verdict == "slower on this machine"
    assert race(CALM, CALM[::-1]).verdict == "no measurable difference"


@pytest.mark.parametrize("busy", [race(BUSY, CALM), race(CALM, BUSY), race(times(1.19, BUSY), BUSY)])
def test_a_busy_machine_is_said_to_be_too_busy_whatever_the_ratio(busy):
    assert busy.too_busy
    assert busy.verdict == "this machine is too busy to tell"
    assert "faster (" not in str(busy) and " x " not in str(busy)
    assert "77.5 times as long" in str(busy) or "78" in str(busy)


def test_the_limit_is_the_median_over_the_minimum():
    assert spread((100, 150, 151)) == BUSY_SPREAD
    assert not race((100, 150, 151), (100, 100, 100)).too_busy
    assert race((100, 151, 152), (100, 100, 100)).too_busy


def test_the_sheet_shows_the_very_ratio_of_the_text():
    calm = race(times(1.19), CALM)
    assert _labels(calm)[1].splitlines()[2] == str(calm).partition("  ")[0] == "1.19 x"
    assert _labels(race(BUSY, CALM))[1].splitlines()[2] == "too busy to tell"


@pytest.mark.parametrize(
    ("float32", "bfloat16", "pays"),
    [
        (times(1.73), CALM, True),
        (times(1.05), CALM, False),  # not worth the rounding
        (CALM, times(1.5), False),
        (times(2, BUSY), CALM, False),
    ],
)
def test_bfloat16_is_taken_where_it_is_faster_without_doubt(float32, bfloat16, pays):
    assert bfloat16_pays(race(float32, bfloat16)) == pays
