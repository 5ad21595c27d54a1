"""Two Ray actors, one of which dies in the middle of the job: every row is made exactly once."""

from __future__ import annotations

import functools
import sqlite3
from pathlib import Path

import pytest
import ray

from ernie_accel.batch import produce
from ernie_accel.batch.engines import Request
from tests.stub_engine import make_rows
from tests.stub_pipes import StepPipe, load_tiny_ernie


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}  # actors import the stub from here
    ray.init(
        num_cpus=2,
        runtime_env=environment,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80_000_000,
    )
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
