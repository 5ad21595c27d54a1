"""Two Ray actors, one of which dies in the middle of the job: every row is made exactly once."""

from __future__ import annotations

import functools
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import ray
from PIL import Image

from ernie_accel.batch import produce
from ernie_accel.batch.engines import EngineLostError, LocalEngine, Request, WorkerLostError
from ernie_accel.batch.input.task import tasks_of
from tests.child_paths import PYTHONPATH
from tests.pipelines import tiny_ernie
from tests.stub_engine import StubEngine, make_rows
from tests.stub_pipes import StepPipe, load_ernie_that_hangs_on, load_ernie_that_notes, load_tiny_ernie


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 80_000_000}
    with pytest.MonkeyPatch.context() as patch:
        # Not as `runtime_env`: the processes that Ray starts ahead do not fit that, and actors would wait for others.
        patch.setenv("PYTHONPATH", PYTHONPATH)  # actors import the stub and what is tested from there
        ray.init(num_cpus=2, **options)
        yield
        ray.shutdown()


def test_rows_of_a_killed_actor_are_made_by_the_other(cluster, tmp_path):
    from ernie_accel.batch.engines.ray import RayEngine

    rows = make_rows(10)
    object.__setattr__(rows[4], "prompt", "crash once")  # takes its actor's process down, the first time
    object.__setattr__(rows[6], "prompt", "fail")
    engine = RayEngine(functools.partial(StepPipe, str(tmp_path)), actors=2, num_gpus=0, num_cpus=1)
    results = []
    for result in produce(engine, rows, tmp_path / "out", progress=False):
        if len(results) == 1:
            ray.kill(engine._actors[0])
        results.append(result)
    engine.close()
    errors = {result.row.index: result.error for result in results}
    assert errors == {i: "LookupError: no such word" if i == 6 else None for i in range(10)}
    assert len(results) == 10
    with sqlite3.connect(tmp_path / "out" / ".ernie-accel" / "ledger.sqlite") as ledger:
        assert dict(ledger.execute("SELECT state, count(*) FROM rows GROUP BY state")) == {"done": 9, "failed": 1}
    assert (tmp_path / "crashed").exists()


def ernie_rows(*texts):
    options = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 4.0, "negative_prompt": "small"}
    return [replace(row, prompt=text) for row, text in zip(make_rows(len(texts), **options), texts, strict=True)]


def notes(scratch, name):
    """Return the processes that did something, and how many texts they did it to, all together."""
    lines = [line.split() for line in (scratch / name).read_text().splitlines()]
    return {int(process) for process, _ in lines}, sum(int(count) for _, count in lines)


TEXTS = ["a red circle", "a big blue square on", "red"] * 5


@pytest.fixture(scope="module")
def alone():
    """The pictures of TEXTS, each made alone in this process, where it was encoded alone."""
    engine = LocalEngine(tiny_ernie(enhancer=True))
    requests = [task.request for task in tasks_of(ernie_rows(*TEXTS), 0)]
    pictures = [np.asarray(engine.render([request])[0], np.int16) for request in requests]
    return pictures, [engine.bucket(request) for request in requests]


def assert_alone(results, alone):
    """As tests/test_batch_equality.py: float32 may round a value to the other side of one step."""
    assert [result.error for result in results] == [None] * len(TEXTS)
    for result, picture in zip(results, alone[0], strict=True):
        with Image.open(result.path) as made:
            assert np.abs(np.asarray(made, np.int16) - picture).max() <= 1


HANGS = "blue blue blue"


@pytest.fixture
def noting(cluster, tmp_path):
    """An engine of two actors that note what they do, and whose enhancers hang on HANGS; closed at the end."""
    from ernie_accel.batch.engines.ray import RayEngine

    load = functools.partial(load_ernie_that_notes, str(tmp_path), hang_at=HANGS)
    engine = RayEngine(load, actors=2, num_gpus=0, num_cpus=1)
    yield engine
    engine.close()


@pytest.mark.slow
def test_prompts_are_enhanced_and_encoded_ahead_by_all_actors_once_and_used_by_any(noting, tmp_path, alone):
    """At the end, closing waits for none that is still being encoded."""
    engine, asked = noting, []

    class Spy:
        def __init__(self):
            self.buckets = {}

        def __call__(self, request, bucket=engine.bucket):
            self.buckets[request] = bucket(request)
            return self.buckets[request]

    engine.bucket = spy = Spy()
    render = engine.render
    engine.render = lambda requests, timeout_s=None: (asked.append(notes(tmp_path, "encoded")), render(requests))[1]
    results = list(produce(engine, ernie_rows(*TEXTS), tmp_path / "out", progress=False))
    assert_alone(sorted(results, key=lambda result: result.row.index), alone)
    processes, enhanced = notes(tmp_path, "enhanced")
    assert (len(processes), enhanced) == (2, len(TEXTS))  # rows of equal prompts have seeds, and so words, of their own
    assert asked[0] == asked[-1] == notes(tmp_path, "encoded"), "something was encoded with its batch"
    buckets = [spy.buckets[task.request] for task in tasks_of(ernie_rows(*TEXTS), 0)]
    assert buckets == alone[1], "the length is not that of the enhanced prompt"
    assert not any(encoded.packed for future in engine._encoding.values() for encoded in future.result().values())

    engine.prepare([task.request for task in tasks_of(ernie_rows(*TEXTS, HANGS), 1)])
    while not (tmp_path / "hangs").exists():
        time.sleep(0.01)
    start = time.perf_counter()
    engine.close()
    engine._threads.shutdown(wait=True)  # as the interpreter does at its end
    assert time.perf_counter() - start < 20
    assert len(engine._actors) == 2, "an actor was started for an engine that is closed"


@pytest.mark.slow
def test_an_actor_that_dies_while_it_encodes_ahead_costs_no_row(cluster, tmp_path, alone):
    from ernie_accel.batch.engines.ray import RayEngine

    load = functools.partial(load_ernie_that_notes, str(tmp_path), TEXTS[1])
    engine = RayEngine(load, actors=2, num_gpus=0, num_cpus=1)
    try:
        results = list(produce(engine, ernie_rows(*TEXTS), tmp_path / "out", progress=False))
    finally:
        engine.close()
    assert (tmp_path / "crashed").exists()
    assert_alone(sorted(results, key=lambda result: result.row.index), alone)


def test_more_actors_than_fit_on_this_machine_are_refused(cluster, monkeypatch):
    from ernie_accel.batch.engines.ray import RayEngine

    ended = []  # as if the cluster of these tests, which has two CPUs, were started for the engine
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    text = r"^The Ray actors need 3 x 1 CPU, and this machine has 2: take fewer, or give each less \(num_cpus\)$"
    with pytest.raises(EngineLostError, match=text):
        RayEngine(load_tiny_ernie, actors=3, num_gpus=0, num_cpus=1)
    text = r"^The Ray actors need 1 x 1 GPU, and this machine has 0: .* less \(num_gpus, in the command --ray-gpus\)$"
    with pytest.raises(EngineLostError, match=text):
        RayEngine(load_tiny_ernie)
    assert ended == [True, True]


def test_an_actor_without_a_place_is_waited_for_and_logged(cluster, monkeypatch, caplog):
    """A cluster that others started may grow."""
    from ernie_accel.batch.engines import ray as module

    monkeypatch.setattr(module, "_TELL_S", 0.2)
    engine = module.RayEngine(StepPipe, actors=2, num_gpus=0, num_cpus=2)
    (without,) = [actor for actor in engine._actors if actor not in engine._loaded]  # whichever Ray has started first
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine._first_described, [without])
        while "2 CPU (0 free)" not in caplog.text:
            assert not waiting.done()
            time.sleep(0.05)
        engine.close()
        with pytest.raises(WorkerLostError):
            waiting.result(30)
    assert "Waiting for a Ray actor" in caplog.text


def test_one_actor_that_is_ready_is_enough_to_begin(cluster, monkeypatch):
    """Ray may start the second first, and have no place for the other."""
    from ernie_accel.batch.engines.ray import RayEngine

    given, made = RayEngine._new_actor, []

    def first_without_a_place(engine):
        made.append(engine)
        if len(made) > 1:
            return given(engine)
        return engine._actor_class.options(num_cpus=3).remote(engine._load, engine._given_max_batch)

    monkeypatch.setattr(RayEngine, "_new_actor", first_without_a_place)
    engine = RayEngine(StepPipe, actors=2, num_gpus=0, num_cpus=1)
    try:
        assert engine._idle.queue[0] is engine._actors[1]
    finally:
        engine.close()


def test_an_actor_that_dies_before_another_is_ready_does_not_end_the_job(cluster, monkeypatch):
    from ernie_accel.batch.engines.ray import RayEngine

    given = RayEngine._first_described
    lost = []

    def without_the_first(engine, actors):
        ray.kill(actors[0])
        lost.append(actors[0])
        return given(engine, actors)

    monkeypatch.setattr(RayEngine, "_first_described", without_the_first)
    engine = RayEngine(StepPipe, actors=2, num_gpus=0, num_cpus=1)
    try:
        assert engine._loaded == {engine._actors[1]}
    finally:
        engine.close()
    with pytest.raises(WorkerLostError):
        RayEngine(StepPipe, actors=1, num_gpus=0, num_cpus=1)
    assert len(lost) == 2


@pytest.mark.slow
def test_an_encoder_that_hangs_ahead_costs_its_row_and_no_other(cluster, tmp_path):
    """The actor is replaced, and loading the next one is no batch's time."""
    from ernie_accel.batch.engines.ray import RayEngine

    load = functools.partial(load_ernie_that_hangs_on, "blue blue blue")
    engine = RayEngine(load, actors=1, num_gpus=0, num_cpus=1)
    try:
        rows = ernie_rows("a red circle", "blue blue blue", "a red circle")
        results = sorted(
            produce(engine, rows, tmp_path, timeout_s=5.0, batch_size=1, progress=False), key=lambda r: r.row.index
        )
    finally:
        engine.close()
    assert [result.error for result in results] == [None, "not finished after 5 s (--timeout) and given up", None]


def test_the_next_rows_are_prepared_before_those_at_hand_are_rendered(tmp_path):
    """So that nobody waits for encoders while there is something to render."""

    class Aside(StubEngine):
        prepares_aside, ahead = True, 4

        def prepare(self, requests, timeout_s=None):
            events.append(("prepare", len(requests)))

        def render(self, requests, timeout_s=None):
            events.append(("render", len(requests)))
            return super().render(requests, timeout_s)

    events = []
    list(produce(Aside(), make_rows(10), tmp_path, batch_size=4, progress=False))
    assert events == [
        *(("prepare", 4), ("prepare", 4), ("render", 4)),
        *(("prepare", 2), ("render", 4)),
        ("render", 2),
    ]


@pytest.mark.slow
def test_rows_are_bucketed_by_the_length_of_their_prompt(cluster):
    from ernie_accel.batch.engines.ray import RayEngine

    engine = RayEngine(load_tiny_ernie, actors=1, num_gpus=0, num_cpus=1)
    try:
        short, other, long = (
            Request(prompt=prompt, seed=0) for prompt in ("a red circle", "a blue square on", "a red circle " * 4)
        )
        assert engine.bucket(short) == engine.bucket(other) == (short.shape(), 4)
        assert engine.bucket(long) == (short.shape(), 16)
    finally:
        engine.close()
