"""What the production line decides: who is tried again and with whom, who is pending, how long a batch took."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace

import pytest

from ernie_accel.batch import produce
from ernie_accel.batch.engines import EngineLostError, Request, WorkerLostError
from ernie_accel.batch.input.task import Task
from ernie_accel.batch.line.line import Line, _Batch
from ernie_accel.batch.output.ledger import Ledger
from tests.stub_engine import StubEngine, make_rows


def seeds_of(engine):
    return [[request.seed for request in batch] for batch in engine.batches]


def states(out):
    ledger = sqlite3.connect(out / ".ernie-accel" / "ledger.sqlite")
    found = [state for (state,) in ledger.execute("SELECT state FROM rows ORDER BY path")]
    ledger.close()
    return found


class OneFails(StubEngine):
    """Returns an error in the place of the second picture of the first batch."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def render(self, requests, timeout_s=None):
        outcomes = super().render(requests, timeout_s)
        if len(self.batches) == 1:
            outcomes[1] = self.error
        return outcomes


@pytest.mark.parametrize(
    ("error", "then"),
    [
        (MemoryError(), [[1, 4], [5, 6], [7]]),  # in a batch of half the size
        (WorkerLostError("the worker died"), [[1], [4, 5, 6, 7]]),  # alone: so no other row can be to blame
        (ValueError("flaky"), [[1], [4, 5, 6, 7]]),
    ],
    ids=repr,
)
def test_a_row_that_fails_in_a_batch_is_tried_again_before_others_and_with_whom_it_may(tmp_path, error, then):
    engine = OneFails(error)
    results = list(produce(engine, make_rows(8), tmp_path, batch_size=4, retries=1, progress=False))
    assert seeds_of(engine) == [[0, 1, 2, 3], *then]
    assert [result.error for result in results] == [None] * 8


def test_a_batch_that_does_not_fit_is_made_before_the_rows_behind_it(tmp_path):
    def before(requests, call):
        if call == 1:
            raise MemoryError

    engine = StubEngine(before)
    list(produce(engine, make_rows(8), tmp_path, batch_size=4, progress=False))
    assert seeds_of(engine) == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_row_under_which_workers_die_is_tried_twice_with_others_and_once_alone(tmp_path):
    def before(requests, call):
        if any(request.seed == 1 for request in requests):
            raise WorkerLostError("the worker died")

    engine = StubEngine(before)
    results = list(produce(engine, make_rows(4), tmp_path, batch_size=4, progress=False))
    assert [batch for batch in seeds_of(engine) if 1 in batch] == [[0, 1, 2, 3], [0, 1, 2, 3], [1]]
    assert {result.row.index: result.error for result in results} == {0: None, 1: "the worker died", 2: None, 3: None}


def test_no_row_of_a_batch_that_an_engine_was_lost_with_is_to_blame(tmp_path):
    def before(requests, call):
        if call == 2:
            raise EngineLostError("the device is gone")

    with pytest.raises(EngineLostError, match="the device is gone"):
        list(produce(StubEngine(before), make_rows(8), tmp_path, batch_size=4, progress=False))
    assert states(tmp_path) == ["done"] * 4 + ["pending"] * 4


def test_an_interrupt_right_after_rows_were_entered_as_running_makes_them_pending_again(tmp_path, monkeypatch):
    enter = Ledger.running

    def interrupted(ledger, tasks):
        enter(ledger, tasks)
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "running", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(produce(StubEngine(), make_rows(4), tmp_path, batch_size=4, progress=False))
    assert states(tmp_path) == ["pending"] * 4


def line_of(**parts):
    names = ("engine", "ledger", "writer", "schedule", "telemetry", "folder")
    given = {"engine": StubEngine()} | parts
    return Line(*(given.get(name) for name in names))


def tasks(count):
    return [Task(row, Request(prompt="x", seed=row.index)) for row in make_rows(count)]


def test_a_row_whose_file_is_there_or_may_still_come_is_not_called_pending():
    """The next run would take such a file for somebody else's."""
    there, coming, neither = tasks(3)
    pending = []
    line = line_of(
        ledger=SimpleNamespace(pending=pending.extend),
        writer=SimpleNamespace(holds=lambda task: task is coming),
        folder=SimpleNamespace(status=lambda path: "a file" if path == there.row.path else None),
    )
    line._release([there, coming, neither])
    assert pending == [neither]


def test_a_deferred_batch_took_as_long_as_its_slowest_picture_whichever_is_collected_last():
    slow, fast = tasks(2)
    ended = []
    line = line_of(telemetry=SimpleNamespace(ended=lambda begun, seconds: ended.append((begun, seconds))))
    batch = _Batch([slow, fast], begun=7.0, measured=False, left=2)
    line._deferred = {slow: batch, fast: batch}
    for task, seconds in ((slow, 2.0), (fast, 1.0)):
        assert ended == []
        line._waited_for(SimpleNamespace(task=task, rendered_s=seconds))
    assert ended == [(7.0, 2.0)]
