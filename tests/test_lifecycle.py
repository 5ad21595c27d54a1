"""A sample of the lifecycle matrix in which every action and every row appears; ``nox -s lifecycle`` runs it all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import ernie_accel
from ernie_accel.transforms import TRANSFORMS
from tests.lifecycle.actions import ACTIONS, GROUPS
from tests.lifecycle.cells import ABSENT, EQUAL, FAULT, Cell, Effect, cell, is_known, not_applicable
from tests.lifecycle.page import MARKER, PAGE, kept_text, page
from tests.lifecycle.subjects import PIPES, ROWS, Row

#: Rows whose cells take long: they trace, or draw many steps. Each is there once, and presets are left to the whole.
SLOW = ("CacheSteps", "Compile", "RewriteEnhancer")


def sample() -> Iterator[tuple[str, str, str]]:
    """Yield (family, row, action), so that every transform that runs here and every action is there at least once."""
    rows = [row for row in ROWS.values() if not row.gpu and not row.preset]
    quick = [row for row in rows if not row.name.startswith(SLOW)]
    for number, action in enumerate(ACTIONS):
        row = quick[number % len(quick)]
        able = [family for family in PIPES if not_applicable(row, family) is None]
        yield able[number % len(able)], row.name, action
    for row in rows:
        if row not in quick:
            yield "ernie", row.name, "`restore`"


def marked() -> Iterator[object]:
    """Yield the sample; all but one in six is left to the slow tests."""
    for number, each in enumerate(sample()):
        slow = number % 6 or each[1].startswith(SLOW)
        yield pytest.param(*each, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("family", "row", "action"), marked())
def test_what_a_script_does_to_an_optimized_pipe_is_right_or_refused(family, row, action):
    found = cell(family, ROWS[row], action)
    assert (FAULT in (found.verdict, found.restored)) == is_known(found), found


def test_every_transform_and_preset_has_a_row_and_every_action_a_column():
    rows = list(ROWS.values())
    assert {type(each).__name__ for row in rows for each in row.all_transforms} == set(TRANSFORMS)
    assert all(any(name in row.name.split() or f"{name}," in row.name for row in rows) for name in ernie_accel.presets)
    assert {action.group for action in ACTIONS.values()} == set(GROUPS)


def test_the_page_has_every_row_and_every_action():
    text = PAGE.read_text(encoding="utf-8")
    section = text.partition("## Transforms and presets")[2].partition("\n## ")[0]
    table = [line.split(" | ")[0].strip("| `") for line in section.splitlines() if line.startswith("| `")]
    assert table == list(ROWS), "run: python -m tests.lifecycle"
    listed = {
        name
        for line in text.splitlines()
        for title in GROUPS.values()
        if line.startswith(f"| {title} |")
        for name in line.split(" | ")[1].removesuffix(" |").split("; ")
    }
    assert listed == set(ACTIONS), "run: python -m tests.lifecycle"


def test_the_page_keeps_what_others_have_written():
    made = page([], "\n\n## Counts\n")
    assert made.endswith(f"{MARKER}\n\n## Counts\n")
    assert page([], kept_text(made)) == made


@pytest.mark.slow
def test_a_fault_is_seen(monkeypatch):
    """An undo that does nothing, an effect that is declared too small: the matrix can fail."""
    row = Row("casts", (ernie_accel.CastDtype("bfloat16"),))
    assert isinstance(found := cell("flux", row, "scheduler"), Cell)
    assert found.restored == EQUAL
    monkeypatch.setattr(ernie_accel, "restore", lambda pipe: pipe)
    assert cell("flux", row, "scheduler").restored == FAULT
    monkeypatch.setattr(ernie_accel.CastDtype, "effect", Effect.EXACT)
    monkeypatch.setattr(ernie_accel.CastDtype, "floor_db", None)
    exact = Row("casts exactly", row.transforms)
    assert cell("flux", exact, "scheduler").verdict == FAULT


def test_what_stock_cannot_do_is_no_fault():
    assert cell("flux", ROWS["SliceVae()"], "text encoder").verdict == ABSENT
