"""A pipe is called by one thread at a time, however many engines, services and jobs share it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from ernie_accel.batch import Producer, produce
from ernie_accel.batch.engines import EngineLostError, LocalEngine, Request
from tests.stub_engine import make_rows, picture_of


class OneAtATime:
    """A pipe with state, as schedulers have: it notices a second call while one is under way."""

    def __init__(self, steps: int = 3, at_step_3: Callable[[], None] = lambda: None) -> None:
        self.steps, self.at_step_3 = steps, at_step_3
        self.calls = self.inside = self.most = 0

    def __call__(self, prompt, generator, callback_on_step_end=None):
        self.inside += 1
        self.calls += 1
        self.most = max(self.most, self.inside)
        try:
            for step in range(self.steps):
                time.sleep(0.002)
                if step == 3:
                    self.at_step_3()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, 0, {})
        finally:
            self.inside -= 1
        request = Request(prompt=prompt, seed=generator.initial_seed())
        return SimpleNamespace(images=[picture_of(request)])


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_services_and_jobs_that_share_a_pipe_take_turns(tmp_path, timeout_s):
    pipe = OneAtATime()
    rows = make_rows(8)
    with Producer(pipe, tmp_path / "a", timeout_s=timeout_s) as first, Producer(pipe, tmp_path / "b") as second:
        futures = [producer.submit(row) for row in rows for producer in (first, second)]
        results = list(produce(pipe, rows, tmp_path / "c", timeout_s=timeout_s, progress=False))
        results += [future.result() for future in futures]
    assert [result.error for result in results] == [None] * 24
    assert (pipe.calls, pipe.most) == (24, 1)


def test_ctrl_c_under_a_timeout_leaves_nobody_in_the_pipe():
    pipe = OneAtATime(steps=10_000, at_step_3=lambda: os.kill(os.getpid(), signal.SIGINT))
    engine = LocalEngine(pipe)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.render([Request(prompt="a cup", seed=1)], 30.0)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert pipe.inside == 0
    pipe.steps = 1
    (picture,) = LocalEngine(pipe).render([Request(prompt="a cup", seed=1)])
    assert picture.tobytes() == picture_of(Request(prompt="a cup", seed=1)).tobytes()


def test_ctrl_c_while_the_thread_starts_leaves_nobody_in_the_pipe_either(monkeypatch):
    pipe, start = OneAtATime(steps=10_000), threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LocalEngine(pipe).render([Request(prompt="a cup", seed=1)], 30.0)
    assert pipe.inside == 0


def test_a_pipe_that_hangs_is_nobodys_turn_any_more():
    release = threading.Event()

    def pipe(prompt, generator):
        release.wait(30)

    try:
        with pytest.raises(EngineLostError, match="hangs inside a step"):
            LocalEngine(pipe, grace_s=0.05).render([Request(prompt="a cup", seed=1)], 0.05)
        with pytest.raises(EngineLostError, match="still inside a step that hung"):
            LocalEngine(pipe).render([Request(prompt="a cup", seed=1)])
    finally:
        release.set()
