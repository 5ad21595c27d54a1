"""Tables line up, also with wide characters, and long lists are told in few words."""

from __future__ import annotations

import pytest

from ernie_accel.common.text import human_bytes, summarise, table, width


def test_columns_line_up():
    assert table(("#", "name"), [("1", "a"), ("12", "红圆"), ("3", "bc")], right=frozenset({0})) == (
        " #  name\n 1  a\n12  红圆\n 3  bc"
    )
    assert width("红圆") == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (15_000_000_000, "15.0 GB"), (3_600_000, "3.6 MB")],
)
def test_bytes_are_decimal(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["vae"], "vae"),
        (["t.layers.0", "t.layers.1", "vae"], "t.layers.* (2), vae"),
        (["t.a.0.x", "t.b", "t.c", "u.d"], "3 in t, 1 in u"),
        (["steps 50 -> 8", "b 1 -> 2", "c 1 -> 2", "d.e 1 -> 2"], "steps 50 -> 8, b 1 -> 2, c 1 -> 2, d.e 1 -> 2"),
    ],
)
def test_many_names_are_folded(names, text):
    assert summarise(names) == text
