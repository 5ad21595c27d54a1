"""A batch can be begun while the device is at work on the one before; nothing else about a job changes by that."""

from __future__ import annotations

import functools
import threading

import pytest

from ernie_accel.batch import produce
from ernie_accel.batch.engines import LocalEngine
from ernie_accel.batch.engines.base import Request, finished
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
