"""A batch can be begun while the device is at work on the one before; nothing else about a job changes by that."""

from __future__ import annotations

import asyncio
import functools
import json
import sqlite3
import threading
import time

import pytest

from ernie_accel.batch import Producer, aproduce, produce
from ernie_accel.batch.engines import EngineLostError, LocalEngine, WorkerLostError
from ernie_accel.batch.engines.base import NotFiniteError, Request, finished
from ernie_accel.batch.line.schedule import BatchSizer
from ernie_accel.batch.output.writer import Writer
from tests.pipelines import tiny_ernie
from tests.stub_engine import StubEngine, make_rows, picture_of


class Ahead(StubEngine):
    """Returns pictures that have to be waited for; `wait` is called with their request first, by whoever waits."""

    def __init__(self, wait=lambda request: None, **options):
        super().__init__(**options)
        self.begun: list[int] = []
        self._wait = wait

    def begin(self, requests, timeout_s=None):
        self.begun.append(len(requests))
        return [functools.partial(self._picture, request) for request in requests]

    def _picture(self, request):
        self._wait(request)
        return picture_of(request)


def make(engine, rows, out, **options):
    results = list(produce(engine, rows, out, progress=False, **options))
    return sorted(results, key=lambda result: result.row.index)


def states(out):
    ledger = sqlite3.connect(out / ".ernie-accel" / "ledger.sqlite")
    found = dict(ledger.execute("SELECT path, state FROM rows ORDER BY path"))
    ledger.close()
    return found


def test_the_next_batch_is_begun_while_the_pictures_of_the_one_before_are_waited_for(tmp_path):
    second = threading.Event()

    def wait(request):
        assert second.wait(60), "the line waited for the first picture before it began the next"

    class Two(Ahead):
        def begin(self, requests, timeout_s=None):
            if self.begun:
                second.set()
            return super().begin(requests, timeout_s)

    results = make(Two(wait), make_rows(8), tmp_path, batch_size=4)
    assert [result.error for result in results] == [None] * 8


def test_pictures_are_those_that_rendering_gives(tmp_path):
    make(Ahead(), make_rows(6), tmp_path / "begun", batch_size=4)
    make(StubEngine(), make_rows(6), tmp_path / "rendered", batch_size=4)
    for path in (tmp_path / "rendered").glob("*.png"):
        assert (tmp_path / "begun" / path.name).read_bytes() == path.read_bytes()


def test_while_the_batch_size_is_looked_for_batches_are_waited_for_and_then_not_any_more(tmp_path):
    engine = Ahead(max_batch=2, seconds=0.01)
    make(engine, make_rows(30), tmp_path)
    assert engine.batches, "no batch was measured"
    assert engine.begun, "a size was found, and the batches after it were still waited for"
    sizes = [len(batch) for batch in engine.batches]
    assert sizes[0] == 1
    assert sum(sizes) + sum(engine.begun) == 30


def test_a_picture_that_fails_while_it_is_waited_for_has_its_retries(tmp_path):
    tries: list[int] = []

    def wait(request):
        if request.seed == 1:
            tries.append(1)
            if len(tries) < 3:
                raise RuntimeError("the device gave up")

    results = make(Ahead(wait), make_rows(4), tmp_path, batch_size=4, retries=2)
    assert [result.error for result in results] == [None] * 4
    assert len(tries) == 3


def test_a_picture_that_keeps_failing_is_its_own_rows_failure(tmp_path):
    def wait(request):
        if request.seed == 1:
            raise RuntimeError("the device gave up")

    results = make(Ahead(wait), make_rows(4), tmp_path, batch_size=4)
    assert [result.error for result in results] == [None, "RuntimeError: the device gave up", None, None]
    assert [result.batch_size for result in results] == [4] * 4


def test_a_deferred_picture_with_nan_is_tried_again_alone_and_then_fails_alone(tmp_path):
    tried: list[int] = []

    def wait(request):
        if request.seed == 1:
            tried.append(1)
            raise NotFiniteError(3, 12)

    engine = Ahead(wait)
    results = make(engine, make_rows(4), tmp_path, batch_size=4, retries=1)
    error = "3 of the picture's 12 values are NaN or infinite; try bfloat16 instead of float16"
    assert [result.error for result in results] == [None, error, None, None]
    assert [result.batch_size for result in results] == [4, 1, 4, 4]
    assert (engine.begun, len(tried)) == ([4, 1], 2)


def test_memory_that_runs_out_after_a_batch_was_begun_halves_it_and_loses_no_row(tmp_path):
    class Tight(Ahead):
        def begin(self, requests, timeout_s=None):
            return [functools.partial(self._picture_of, request, len(requests)) for request in requests]

        def _picture_of(self, request, count):
            if count > 2:
                raise RuntimeError("out of memory")
            return picture_of(request)

    results = make(Tight(), make_rows(8), tmp_path, batch_size=4)
    assert [result.error for result in results] == [None] * 8
    assert {result.batch_size for result in results} <= {1, 2}


def test_a_size_that_ran_out_of_memory_is_tried_again_whatever_was_only_begun_meanwhile(tmp_path, monkeypatch):
    """Beginning takes no time, so that beside it every batch that is waited for looks slow."""
    tight = [True]

    class Slow(Ahead):
        def render(self, requests, timeout_s=None):
            if len(requests) > 4 and tight:
                tight.clear()
                raise RuntimeError("out of memory")
            return super().render(requests, timeout_s)

    engine = Slow(max_batch=8)
    fixed, succeeded = 0.02, BatchSizer.succeeded

    def without_noise(self, count, seconds):  # of other processes, which can double a time
        succeeded(self, count, fixed if seconds is not None and seconds >= fixed else seconds)

    monkeypatch.setattr(BatchSizer, "succeeded", without_noise)
    engine._before = lambda requests, number: time.sleep(fixed)  # a call costs as much whatever it renders
    make(engine, make_rows(200), tmp_path)
    assert engine.begun, "no batch was only begun"
    assert max(map(len, engine.batches)) == 8, "the size was never tried again"
    assert engine.begun[-2] == 8, "beside batches that were only begun it looked slow"


def test_an_engine_that_is_lost_behind_a_deferred_picture_ends_the_job_and_keeps_the_rows(tmp_path):
    def wait(request):
        if request.seed == 1:
            raise EngineLostError("the device is gone")

    with pytest.raises(EngineLostError, match="the device is gone"):
        make(Ahead(wait), make_rows(4), tmp_path, batch_size=4)
    assert states(tmp_path) == {"000.png": "done", "001.png": "pending", "002.png": "done", "003.png": "done"}


def test_a_worker_that_is_lost_behind_a_deferred_picture_costs_an_attempt_of_nobody(tmp_path):
    lost = [1]

    def wait(request):
        if request.seed == 1 and lost:
            lost.clear()
            raise WorkerLostError("the worker died")

    assert [result.error for result in make(Ahead(wait), make_rows(4), tmp_path, batch_size=4)] == [None] * 4


def test_under_a_timeout_nothing_is_deferred(tmp_path):
    """Nobody could end what is at work after the call, and it would be waited for for ever."""
    engine = Ahead(lambda request: pytest.fail("deferred"))
    make(engine, make_rows(8), tmp_path, batch_size=4, timeout_s=60.0)
    assert (engine.begun, [len(batch) for batch in engine.batches]) == ([], [4, 4])


def test_time_spent_waiting_for_deferred_pictures_counts_as_rendering_and_in_latencies(tmp_path):
    engine = Ahead(lambda request: time.sleep(0.2))
    log = tmp_path / "log.jsonl"
    make(engine, make_rows(4), tmp_path / "out", batch_size=4, writers=4, log_json=log)
    state = json.loads(log.read_text().splitlines()[-1])
    assert state["engine_idle"] == 0.0
    assert 0.2 <= state["latency_p50_s"] <= state["latency_p95_s"] < 5


def test_fail_fast_begins_no_more_than_there_is_room_for_until_a_deferred_picture_has_failed(tmp_path):
    def wait(request):
        raise RuntimeError("the device gave up")

    engine = Ahead(wait)
    make(engine, make_rows(100), tmp_path, batch_size=4, fail_fast=True)
    assert sum(engine.begun) <= 20
    assert set(states(tmp_path).values()) == {"failed", "pending"}


def test_stop_waits_for_what_was_begun_and_tries_nothing_again(tmp_path):
    def wait(request):
        time.sleep(0.05)
        if request.seed == 1:
            raise RuntimeError("the device gave up")

    asked = iter([False])
    results = make(Ahead(wait), make_rows(12), tmp_path, batch_size=4, retries=1, stop=lambda: next(asked, True))
    assert [result.row.index for result in results] == [0, 2, 3]
    expected = ["done", "pending", "done", "done", *["pending"] * 8]
    assert list(states(tmp_path).values()) == expected


def test_an_interrupt_while_the_line_waits_for_deferred_pictures_keeps_them(tmp_path, monkeypatch):
    """The line stands in `Writer.submit`, some of a batch handed over: what is finished is not called pending."""
    submit, calls = Writer.submit, []

    def interrupted(self, task, *arguments, **options):
        calls.append(task)
        if len(calls) == 7:
            raise KeyboardInterrupt
        submit(self, task, *arguments, **options)

    monkeypatch.setattr(Writer, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(Ahead(lambda request: time.sleep(0.05)), make_rows(12), tmp_path, batch_size=4)
    monkeypatch.undo()
    assert list(states(tmp_path).values()) == ["done"] * 6 + ["pending"] * 6
    assert len(list(tmp_path.glob("*.png"))) == 6
    assert len(make(Ahead(), make_rows(12), tmp_path)) == 6


def test_an_interrupt_right_after_a_picture_was_handed_over_leaves_nothing_in_the_next_runs_way(tmp_path, monkeypatch):
    """The line does not know of it, but its file is there: it is this job's, as after a kill."""
    submit = Writer.submit

    def interrupted(self, task, *arguments, **options):
        submit(self, task, *arguments, **options)
        if task.row.index == 1:
            self._pending.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(Ahead(), make_rows(4), tmp_path, batch_size=4)
    monkeypatch.undo()
    assert list(states(tmp_path).values()) == ["done", "running", "pending", "pending"]
    assert len(make(Ahead(), make_rows(4), tmp_path)) == 3


def test_a_producer_answers_rows_whose_pictures_are_deferred_also_while_it_closes(tmp_path):
    def wait(request):
        time.sleep(0.05)
        if request.seed == 2:
            raise RuntimeError("the device gave up")

    with Producer(Ahead(wait), tmp_path, batch_size=4) as producer:
        futures = [producer.submit(row) for row in make_rows(6)]
    errors = [future.result(0).error for future in futures]
    assert errors == [None, None, "RuntimeError: the device gave up", None, None, None]


def test_cancelling_aproduce_waits_for_deferred_pictures(tmp_path):
    engine = Ahead(lambda request: time.sleep(0.02))

    async def main():
        work = asyncio.create_task(aproduce(engine, make_rows(200), tmp_path, batch_size=2, progress=False))
        while not engine.begun:
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(main())
    assert 0 < len(list(tmp_path.glob("*.png"))) == sum(engine.begun) < 200


def test_a_job_that_is_closed_early_keeps_the_pictures_that_were_begun(tmp_path):
    job = produce(Ahead(), make_rows(12), tmp_path, batch_size=4, progress=False)
    next(job)
    job.close()
    assert len(list(tmp_path.glob("*.png"))) >= 4


def test_finished_returns_what_the_device_raises_as_an_outcome():
    def broken():
        raise ValueError("no")

    good, bad = finished([lambda: "picture", broken])
    assert good == "picture"
    assert isinstance(bad, ValueError)


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_a_pipe_on_the_cpu_gives_whole_pictures(timeout_s):
    engine = LocalEngine(tiny_ernie())
    request = Request(prompt="a red cup", seed=1, width=64, height=64, steps=2, guidance_scale=1.0)
    (begun,), (rendered,) = engine.begin([request], timeout_s), engine.render([request], timeout_s)
    assert begun.tobytes() == rendered.tobytes()
