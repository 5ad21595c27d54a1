"""Whatever fails, each row ends done, failed with its reason, or pending, and the others are made."""

from __future__ import annotations

import functools
import multiprocessing
import sqlite3
import time
from dataclasses import replace
from multiprocessing import forkserver

import pytest
import torch
from PIL import Image

from ernie_accel.batch import BatchOutputError, produce
from ernie_accel.batch.engines import EngineLostError, LocalEngine, Request, WorkerLostError
from ernie_accel.batch.engines.process import ProcessEngine
from tests.child_paths import PYTHONPATH
from tests.full_disk import disk_full_when
from tests.own_newbie import tiny_own_newbie
from tests.pipelines import tiny_ernie
from tests.stub_engine import StubEngine, make_rows, picture_of
from tests.stub_pipes import StepPipe, load_nothing


def run(engine, rows, out, **options):
    results = list(produce(engine, rows, out, progress=False, **options))
    return sorted(results, key=lambda result: result.row.index)


def states(out):
    with sqlite3.connect(out / ".ernie-accel" / "ledger.sqlite") as ledger:
        found = dict(ledger.execute("SELECT path, state FROM rows"))
    ledger.close()
    return [found[path] for path in sorted(found)]


def prompts(*texts):
    return [replace(row, prompt=text) for row, text in zip(make_rows(len(texts)), texts, strict=True)]


# Out of memory


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), MemoryError(), torch.OutOfMemoryError()])
def test_running_out_of_memory_at_any_call_loses_no_row(tmp_path, call, error):
    def before(requests, number):
        if number == call:
            raise error

    engine = StubEngine(before)
    results = run(engine, make_rows(12), tmp_path, batch_size=4, retries=1)
    assert [result.error for result in results] == [None] * 12
    assert states(tmp_path) == ["done"] * 12


def test_the_batch_is_halved_until_it_fits_and_grown_again(tmp_path):
    free = 2

    def before(requests, number):
        if len(requests) > free:
            raise RuntimeError("out of memory")

    engine = StubEngine(before, max_batch=8)
    rows = make_rows(60)
    list(produce(engine, rows[:30], tmp_path, progress=False, batch_size=8))
    sizes = [len(batch) for batch in engine.batches]
    assert sizes[:11] == [8, 4, *[2] * 8, 4]  # 4 is tried again after eight batches without trouble
    free, engine.batches = 8, []
    list(produce(engine, rows, tmp_path, progress=False, batch_size=8))
    assert [len(batch) for batch in engine.batches] == [8, 8, 8, 6]


def test_a_row_that_does_not_fit_alone_fails_and_says_so(tmp_path):
    def before(requests, number):
        if any(request.seed == 2 for request in requests):
            raise RuntimeError("out of memory")

    results = run(StubEngine(before), make_rows(5), tmp_path, batch_size=4)
    assert [result.error for result in results] == [
        None,
        None,
        "RuntimeError: out of memory: it does not fit even alone; choose a smaller size",
        None,
        None,
    ]


# A bad row


@pytest.mark.parametrize("bad", range(6))
def test_a_bad_row_in_a_batch_fails_alone(tmp_path, bad):
    def before(requests, number):
        if any(request.seed == bad for request in requests):
            raise ValueError("bad prompt")

    results = run(StubEngine(before), make_rows(6), tmp_path, batch_size=4)
    expected = [None] * 6
    expected[bad] = "ValueError: bad prompt"
    assert [result.error for result in results] == expected


@pytest.mark.parametrize(("failures", "retries", "error"), [(1, 1, None), (2, 1, "OSError: flaky"), (2, 2, None)])
def test_retries_are_counted(tmp_path, failures, retries, error):
    def before(requests, number):
        if number <= failures:
            raise OSError("flaky")

    (result,) = run(StubEngine(before), make_rows(1), tmp_path, retries=retries)
    assert result.error == error


def test_fail_fast_leaves_the_rest_pending(tmp_path):
    def before(requests, number):
        if number == 2:
            raise ValueError("no")

    results = run(StubEngine(before), make_rows(6), tmp_path, batch_size=1, fail_fast=True)
    assert [result.error for result in results] == [None, "ValueError: no"]
    assert states(tmp_path) == ["done", "failed", "pending", "pending", "pending", "pending"]


@pytest.mark.parametrize("outcomes", [0, 2])
def test_an_engine_that_returns_too_few_or_too_many_pictures_is_named(tmp_path, monkeypatch, outcomes):
    monkeypatch.setattr(
        StubEngine, "render", lambda self, requests, timeout_s=None: [picture_of(requests[0])] * outcomes
    )
    (result,) = run(StubEngine(), make_rows(1), tmp_path)
    assert result.error == f"TypeError: the engine returned {outcomes} pictures for a batch of 1"


def test_pictures_with_nan_fail_and_their_neighbours_do_not(tmp_path):
    pipe = tiny_ernie()
    decode = pipe.vae.decode

    def poisoned(latents, **options):
        (images,) = decode(latents, **options)
        images[1, :, :4] = torch.nan
        return (images,)

    pipe.vae.decode = poisoned
    rows = make_rows(2, width=64, height=64, steps=1, guidance_scale=1.0)
    good, bad = run(LocalEngine(pipe), rows, tmp_path, batch_size=2)
    assert good.error is None
    assert bad.error == "768 of the picture's 12288 values are NaN or infinite; try bfloat16 instead of float16"


# The disk


def test_a_full_disk_ends_the_job_and_the_next_run_finishes_it(tmp_path):
    with (
        disk_full_when(lambda file: file > 4),
        pytest.raises(BatchOutputError, match="No space left on device; fix this and run again"),
    ):
        run(StubEngine(), make_rows(12), tmp_path, batch_size=2)
    assert set(states(tmp_path)) == {"done", "pending"}
    assert not list(tmp_path.glob(".*.tmp"))
    run(StubEngine(), make_rows(12), tmp_path)
    assert states(tmp_path) == ["done"] * 12


def test_the_last_picture_that_cannot_be_written_ends_the_job_too(tmp_path):
    with (
        disk_full_when(lambda file: file == 2),
        pytest.raises(BatchOutputError, match="No space left on device; fix this and run again"),
    ):
        run(StubEngine(), make_rows(2), tmp_path, batch_size=2, writers=1)
    assert sorted(states(tmp_path)) == ["done", "pending"]


# Time


def test_a_slow_batch_is_given_up_at_the_end_of_its_step(tmp_path):
    engine = LocalEngine(StepPipe())
    results = run(engine, prompts("a", "slow", "b"), tmp_path, timeout_s=1.0)
    assert [result.error for result in results] == [
        None,
        "not finished after 1 s (--timeout) and given up",
        None,
    ]


def test_a_slow_batch_of_a_pipeline_without_a_callback_is_given_up_at_the_end_of_its_step_too(tmp_path):
    pipe, steps = tiny_own_newbie(), []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: steps.append(time.sleep(0.05)))
    rows = make_rows(1, width=64, height=64, steps=1000)
    (result,) = run(LocalEngine(pipe, grace_s=60), rows, tmp_path, timeout_s=0.5)
    assert result.error == "not finished after 0.5 s (--timeout) and given up"
    assert 0 < len(steps) < 1000


def test_a_step_that_hangs_within_the_process_ends_the_job_and_keeps_the_rows(tmp_path):
    engine = LocalEngine(StepPipe(), grace_s=0.1)
    start = time.perf_counter()
    with pytest.raises(EngineLostError, match="hangs inside a step, which nothing can end within a process"):
        run(engine, prompts("a", "hang", "b"), tmp_path, timeout_s=0.3)
    assert time.perf_counter() - start < 20
    assert states(tmp_path) == ["done", "failed", "pending"]


def test_an_engine_lost_while_it_prepares_is_no_waiting_rows_fault(tmp_path):
    """A row that waits for others to fill its batch, while those are prepared."""

    class Hangs(StubEngine):
        ahead, lost = 4, False

        def prepare(self, requests, timeout_s=None):
            self.lost = any(request.seed == 4 for request in requests)
            if self.lost:
                raise EngineLostError("the encoder hangs")

        def render(self, requests, timeout_s=None):
            assert not self.lost, "asked to render after it was lost"
            return super().render(requests, timeout_s)

    with pytest.raises(EngineLostError, match="the encoder hangs"):
        run(Hangs(), make_rows(5), tmp_path, batch_size=3)
    assert states(tmp_path) == ["done"] * 3 + ["pending"] * 2


@pytest.fixture
def quick_children(monkeypatch):
    """Fork children from a process that has imported torch, which takes each of them longer than all its work."""
    forkserver.set_forkserver_preload(["tests.stub_pipes"])
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        forkserver.ensure_running()
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def test_a_process_engine_survives_hangs_crashes_and_errors(tmp_path, quick_children):
    engine = ProcessEngine(functools.partial(StepPipe, str(tmp_path)))
    try:
        rows = prompts("a", "hang", "crash", "fail", "crash once", "b")
        results = run(engine, rows, tmp_path / "out", timeout_s=2.5)
    finally:
        engine.close()
    assert [result.error for result in results] == [
        None,
        "not finished after 2.5 s (--timeout) and given up",
        "the process that rendered it died (exit code 7)",
        "LookupError: no such word",
        None,
        None,
    ]
    with Image.open(results[5].path) as picture:
        assert picture.getpixel((5, 5)) == (5, 10, 20)


def test_a_process_engine_that_cannot_load_says_why():
    with pytest.raises(EngineLostError, match="FileNotFoundError: no weights here"):
        ProcessEngine(load_nothing)


def test_a_process_engine_asks_its_pipe_what_it_can_do(tmp_path):
    engine = ProcessEngine(StepPipe)
    try:
        with pytest.raises(ValueError, match="asks for negative_prompt, which StepPipe does not take"):
            produce(engine, make_rows(1, negative_prompt="blurry"), tmp_path)
        assert engine.identity() == {"pipeline": "StepPipe"}
    finally:
        engine.close()
    # Not by the connection, on which the answers to other threads come: a row is submitted while another is rendered.
    ((line, problem),) = engine.problems([(2, Request(prompt="a cup", seed=1, steps=4))])
    assert (line, problem.partition(",")[0]) == (2, "asks for num_inference_steps")


def test_rows_of_a_lost_worker_are_made_by_another_and_a_killer_row_fails(tmp_path):
    def before(requests, number):
        if number == 1 or any(request.seed == 5 for request in requests):
            raise WorkerLostError("the worker died")

    results = run(StubEngine(before), make_rows(8), tmp_path, batch_size=4)
    assert [result.error for result in results] == [None] * 5 + ["the worker died"] + [None] * 2


# Interrupts


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupt_keeps_what_is_rendered_and_the_rest_pending(tmp_path, call):
    def before(requests, number):
        if number == call:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(StubEngine(before), make_rows(12), tmp_path, batch_size=4)
    done = 4 * (call - 1)
    assert states(tmp_path) == ["done"] * done + ["pending"] * (12 - done)
    assert len(list(tmp_path.glob("*.png"))) == done
    assert len(run(StubEngine(), make_rows(12), tmp_path)) == 12 - done
