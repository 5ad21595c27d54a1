"""What an optimized pipe carries: a report that is its own, and in copies and pickles one without a way back."""

from __future__ import annotations

import copy
import pickle

import pytest

import ernie_accel
from ernie_accel import CallDefaults, CastDtype, Compile, SetAttention, SliceVae, SwapScheduler, TileVae
from ernie_accel.core.carried import Carried, carried_report, carry, drop
from ernie_accel.core.planned import CARRIED, PlannedPipe
from ernie_accel.core.transform import Applied
from tests.examples import differences, snapshot

LOSES = CastDtype("bfloat16", keep_originals=False)


@pytest.fixture
def report(ernie):
    """A report with what can be undone, what had nothing to do, and what cannot be undone."""
    ernie_accel.optimize(ernie, SliceVae(), CallDefaults("turbo"), LOSES)
    report = ernie_accel.report(ernie)
    assert [entry.applied.undo is None for entry in report.entries] == [True, False, False]
    return report


def test_nothing_is_carried_at_first_or_after_it_was_dropped(ernie):
    assert carried_report(ernie) is None
    drop(ernie)  # nothing to drop is no mistake
    ernie_accel.optimize(ernie, SliceVae())
    assert carried_report(ernie) is ernie_accel.report(ernie)
    drop(ernie)
    assert carried_report(ernie) is None
    assert CARRIED.of(ernie) is None


def test_a_request_for_nothing_leaves_nothing_carried(ernie):
    ernie_accel.optimize(ernie, SliceVae())
    ernie_accel.optimize(ernie)
    assert CARRIED.of(ernie) is None


def test_carrying_is_no_part_of_the_config(ernie, report):
    config = dict(ernie.config)
    drop(ernie)
    carry(ernie, report)
    assert carried_report(ernie) is report
    assert dict(ernie.config) == config


def test_what_somebody_else_keeps_under_that_name_is_no_report(ernie):
    object.__setattr__(ernie, CARRIED.attribute, "theirs")
    assert carried_report(ernie) is None
    assert PlannedPipe.of(ernie) == PlannedPipe.seen(ernie, None)


@pytest.mark.parametrize(
    ("another", "reason"),
    [
        (copy.deepcopy, "this pipe is a copy; restore the pipe it was copied from"),
        (lambda pipe: pickle.loads(pickle.dumps(pipe)), "this pipe came out of a pickle, and its undo stayed behind"),
    ],
    ids=["copy", "pickle"],
)
def test_another_pipe_has_the_whole_report_without_a_way_back(ernie, report, another, reason):
    theirs = ernie_accel.report(another(ernie))
    assert [entry.step for entry in theirs.entries] == [entry.step for entry in report.entries]
    assert [entry.status for entry in theirs.entries] == ["applied"] * 3
    cast, *others = theirs.entries
    assert cast.applied.no_undo == report.entries[0].applied.no_undo, "a reason that was there already stays"
    assert {(entry.applied.undo, entry.applied.no_undo) for entry in others} == {(None, reason)}
    # The pipe itself still has its own.
    assert ernie_accel.report(ernie) is report


def test_what_is_planned_after_the_last_transform_is_carried(ernie):
    ernie_accel.optimize(ernie, SetAttention("math"), SliceVae())
    for pipe in (ernie, copy.deepcopy(ernie), pickle.loads(pickle.dumps(ernie))):
        assert PlannedPipe.of(pipe).attention == "math"
    assert Carried(ernie_accel.report(ernie), 0).planned.attention == "math"
    ernie_accel.restore(ernie)
    assert PlannedPipe.of(ernie).attention is None


def test_a_plan_for_a_copy_names_all_that_would_have_to_be_undone(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"), SliceVae(), TileVae(tile_px=32))
    twin = copy.deepcopy(ernie)
    why = "this pipe is a copy; restore the pipe it was copied from"
    plan = ernie_accel.plan(twin, SwapScheduler("lcm"))
    assert not plan.ok
    assert plan.blockers == tuple(
        f"{transform!r} would have to be undone first: {why}" for transform in (SliceVae(), TileVae(tile_px=32))
    )
    assert plan.undoes == (SliceVae(), TileVae(tile_px=32))
    # What the request keeps, or adds to, has nothing to be undone.
    assert ernie_accel.plan(twin, SwapScheduler("lcm"), SliceVae(), TileVae(tile_px=32), Compile()).ok
    assert ernie_accel.plan(ernie, SwapScheduler("lcm")).blockers == ()


@pytest.mark.parametrize("request_", [(), (SwapScheduler("lcm"),), (CastDtype("bfloat16"),)], ids=str)
def test_a_copy_refuses_what_needs_an_undo_and_stays_as_it_is(ernie, request_):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"), SliceVae())
    twin = copy.deepcopy(ernie)
    before, report = snapshot(twin), ernie_accel.report(twin)
    with pytest.raises(ernie_accel.RestoreError, match="this pipe is a copy"):
        ernie_accel.optimize(twin, *request_)
    with pytest.raises(ernie_accel.RestoreError, match="this pipe is a copy"):
        ernie_accel.restore(twin)
    assert differences(before, snapshot(twin)) == []
    assert ernie_accel.report(twin).entries == report.entries


def test_a_copy_that_is_optimized_further_undoes_its_own_part(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"))
    twin = copy.deepcopy(ernie)
    ernie_accel.optimize(twin, SwapScheduler("lcm"), SliceVae())
    ways = [entry.applied.undo is None for entry in ernie_accel.report(twin).entries]
    assert ways == [True, False]
    ernie_accel.optimize(twin, SwapScheduler("lcm"))
    assert not twin.vae.use_slicing
    assert not ernie.vae.use_slicing


def test_a_report_in_a_pickle_has_no_live_objects(ernie, report):
    again = pickle.loads(pickle.dumps(CARRIED.required(ernie)))
    assert again.pipe_id == 0
    assert all(entry.applied == Applied(**vars(entry.applied)) for entry in again.report.entries)
    assert all(entry.applied.undo is None for entry in again.report.entries)
