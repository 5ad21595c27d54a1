"""The parts of a production line get what the caller asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ernie_accel.batch import Sift
from ernie_accel.batch.engines import Request
from ernie_accel.batch.line import assembly
from ernie_accel.exports import VERSION
from tests.stub_engine import StubEngine


@pytest.fixture
def parts(monkeypatch):
    """Return a function that assembles a line, and what its writer, schedule and line were made of."""
    made = {}
    for name in ("Writer", "Schedule", "Line"):

        def make(*arguments, name=name, **options):
            made[name] = SimpleNamespace(arguments=arguments, **options)
            return made[name]

        monkeypatch.setattr(assembly, name, make)

    def assemble(engine, ledger=None, **options):
        assembly.assemble(engine, ledger, "telemetry", "folder", **options)
        return made

    return assemble


@pytest.mark.parametrize(
    ("batch_size", "most", "slots", "writers", "limit", "ahead"),
    [
        (None, 4, 1, 2, 4, 8),
        (None, 16, 1, 2, 16, 32),  # two whole batches
        (None, 16, 3, 2, 16, 96),  # of each that renders
        (None, 1, 1, 4, 1, 16),
        (3, 16, 1, 1, 3, 6),
        (32, 4, 1, 2, 4, 8),  # no more than the engine can
    ],
)
def test_batches_are_as_large_as_both_allow_and_two_of_each_worker_have_room(
    parts, batch_size, most, slots, writers, limit, ahead
):
    engine = StubEngine(max_batch=most)
    engine.slots = slots
    made = parts(engine, batch_size=batch_size, writers=writers)
    assert made["Schedule"].limit == limit
    assert (made["Writer"].threads, made["Writer"].ahead) == (writers, ahead)


def test_only_a_size_that_nobody_gave_is_looked_for(parts):
    engine = StubEngine(max_batch=8)
    looked_for, given = (parts(engine, batch_size=size)["Schedule"] for size in (None, 4))
    assert (looked_for.start, looked_for.probe) == (1, True)
    assert (given.start, given.probe) == (4, False)


def test_rows_are_sorted_by_the_seed_they_are_tried_with_now_and_are_alike_by_shape(parts):
    engine = StubEngine()
    engine.bucket = lambda request: ("bucket of", request.seed)
    schedule = parts(engine)["Schedule"]
    first, again = (Request(prompt="a cup", seed=seed, width=64) for seed in (1, 2))
    task = SimpleNamespace(second_pass=None, request=first, current=lambda: again)
    assert schedule.arguments[0](task) == ("bucket of", 2)
    assert schedule.similar_key_of(task) == first.shape()


def test_a_line_gives_up_and_tries_again_as_asked(parts):
    line = parts(StubEngine(), retries=3, timeout_s=7.5)["Line"]
    assert (line.retries, line.rerolls, line.timeout_s) == (3, 0, 7.5)
    line = parts(StubEngine(), SimpleNamespace(hashes=list), sift=Sift(reroll=2))["Line"]
    assert (line.retries, line.rerolls, line.timeout_s) == (0, 2, None)


def test_pictures_say_how_they_were_made_and_are_compared_with_those_of_earlier_runs(parts):
    made = parts(StubEngine(), facts={"preset": "turbo-fp8", "version": "of a caller"})["Writer"]
    assert made.arguments == ("folder", {"preset": "turbo-fp8", "version": VERSION})
    assert made.sieve is None
    ledger = SimpleNamespace(hashes=lambda: [("0" * 16, "old.png")])
    sieve = parts(StubEngine(), ledger, sift=Sift(duplicate_bits=0))["Writer"].sieve
    assert [*sieve._paths] == ["old.png"]
