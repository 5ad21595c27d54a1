"""What is done ahead of rendering: prompts encoded in batches, under the timeout, and rows bucketed by length."""

from __future__ import annotations

import functools
import multiprocessing
import sqlite3
import threading
from dataclasses import replace

import pytest
import torch

from ernie_accel.batch import produce
from ernie_accel.batch.engines import BatchTimeoutError, EngineLostError, LocalEngine, Request, prompts
from ernie_accel.batch.engines.base import PREPARE_BATCH, ROUND, Engine, in_batches
from ernie_accel.batch.engines.process import ProcessEngine
from ernie_accel.batch.engines.prompts import PromptStage
from tests.pipelines import tiny_ernie
from tests.stub_engine import StubEngine, make_rows
from tests.stub_pipes import load_ernie_that_hangs_on, load_tiny_ernie

SHORT, LONG = "a red circle", "a big red circle on a small blue square on a big red square on a red circle on a square"


def ernie_rows(*texts):
    options = {"width": 64, "height": 64, "steps": 1, "guidance_scale": 1.0}
    return [replace(row, prompt=text) for row, text in zip(make_rows(len(texts), **options), texts, strict=True)]


def requests_of(*texts):
    return [
        Request(prompt=text, seed=i, width=64, height=64, steps=1, guidance_scale=1.0) for i, text in enumerate(texts)
    ]


def states(out):
    ledger = sqlite3.connect(out / ".ernie-accel" / "ledger.sqlite")
    found = [state for (state,) in ledger.execute("SELECT state FROM rows ORDER BY path")]
    ledger.close()
    return found


def test_prompts_are_prepared_few_at_a_time_and_alike_in_length_together():
    requests = requests_of(*("x" * (i * 7 % 40) for i in range(40)))
    batches = list(in_batches(requests))
    assert [len(batch) for batch in batches] == [PREPARE_BATCH, PREPARE_BATCH, 8]
    lengths = [[len(request.prompt) for request in batch] for batch in batches]
    assert [length for some in lengths for length in some] == list(range(40))


@pytest.fixture
def forked(monkeypatch):
    """Have children forked from a process that has drawn: what each would import takes 6 s. Others are spawned."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.loaded_ernie"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)


@pytest.mark.parametrize("engine", [LocalEngine, pytest.param(ProcessEngine, marks=pytest.mark.slow)])
def test_rows_are_bucketed_by_the_length_of_their_prompt(engine, forked):
    engine = engine(load_tiny_ernie) if engine is ProcessEngine else engine(load_tiny_ernie())
    try:
        short, long, other = requests_of(SHORT, LONG, "a blue square")
        assert engine.bucket(short) == engine.bucket(long)  # nothing is known yet
        engine.prepare([short, long, other])
        assert engine.bucket(short) == engine.bucket(other) == (short.shape(), 4)
        assert engine.bucket(long) == (short.shape(), 32)
    finally:
        engine.close()


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.slow), 2])
def threads(request):
    if request.param == 1:
        request.getfixturevalue("forked")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_child_process_renders_what_it_encoded_ahead(tmp_path, threads):
    """To the bit: both encode the four prompts in one batch and render rows of one length in twos, in equal threads."""
    rows = ernie_rows(SHORT, LONG, "a blue square", SHORT)
    engine, pictures = ProcessEngine(load_tiny_ernie), []
    try:
        for engine_or_pipe in (tiny_ernie(), engine):
            out = tmp_path / str(len(pictures))
            results = list(produce(engine_or_pipe, rows, out, batch_size=2, progress=False))
            assert {r.row.index: (r.error, r.batch_size) for r in results} == {
                0: (None, 2),
                1: (None, 1),
                2: (None, 2),
                3: (None, 1),
            }
            pictures.append({result.row.index: result.path.read_bytes() for result in results})
        assert [engine.bucket(request)[1] for request in requests_of(SHORT, LONG, "a blue square", SHORT)] == [
            4,
            32,
            4,
            4,
        ]
    finally:
        engine.close()
    assert pictures[0] == pictures[1]


def test_an_encoder_that_hangs_is_noticed_and_the_rows_stay_pending(tmp_path, monkeypatch):
    pipe = tiny_ernie()
    calls, release = [], threading.Event()
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda **inputs: (calls.append(inputs), release.wait(60)))
    engine = LocalEngine(pipe, grace_s=0.1)
    with pytest.raises(EngineLostError, match=r"prompts were not encoded after 0.2 s: the pipe hangs inside a step"):
        list(produce(engine, ernie_rows(SHORT, LONG), tmp_path, timeout_s=0.2, progress=False))
    release.set()
    assert len(calls) == 1
    assert states(tmp_path) == ["pending", "pending"]


def test_slow_words_of_the_enhancer_are_given_up_between_two(monkeypatch):
    """The enhancer writes thousands of tokens: it is stopped at the next, and the pipe is whole afterwards."""
    import ernie_accel

    pipe = ernie_accel.demo.load()
    engine = LocalEngine(pipe)
    started, forward = threading.Event(), pipe.pe.lm_head.forward  # once a token

    def slow(*arguments, **options):
        started.set()
        threading.Event().wait(0.05)
        return forward(*arguments, **options)

    monkeypatch.setattr(pipe.pe.lm_head, "forward", slow)
    request = Request(prompt="a large red circle", seed=1, width=64, height=64, steps=1)
    with pytest.raises(BatchTimeoutError, match=r"not finished after 0.1 s"):
        engine.prepare([request], 0.1)
    assert started.is_set()
    monkeypatch.setattr(pipe.pe.lm_head, "forward", forward)
    engine.prepare([request], 60.0)
    assert engine.bucket(request)[1] > 0
    engine.close()


@pytest.mark.slow
def test_a_child_whose_encoder_hangs_costs_the_row_and_no_other(tmp_path, forked):
    engine = ProcessEngine(functools.partial(load_ernie_that_hangs_on, "blue blue blue"))
    try:
        rows = ernie_rows(SHORT, "blue blue blue", LONG)
        results = sorted(produce(engine, rows, tmp_path, timeout_s=2.0, progress=False), key=lambda r: r.row.index)
    finally:
        engine.close()
    assert [result.error for result in results] == [None, "not finished after 2 s (--timeout) and given up", None]


class Rounds(StubEngine):
    ahead, in_rounds = 5, True

    def __init__(self, **options):
        super().__init__(**options)
        self.events = []

    def prepare(self, requests, timeout_s=None):
        self.events.append(("prepare", len(requests), timeout_s))

    def render(self, requests, timeout_s=None):
        self.events.append(("render", len(requests), timeout_s))
        return super().render(requests, timeout_s)


def test_an_engine_in_rounds_renders_what_it_prepared_before_it_prepares_more(tmp_path):
    engine = Rounds(max_batch=4)
    list(produce(engine, make_rows(12), tmp_path, batch_size=4, timeout_s=9.0, progress=False))
    assert engine.events == [
        (kind, count, 9.0)
        for kind, count in (
            *(("prepare", 5), ("render", 4), ("render", 1)),
            *(("prepare", 5), ("render", 4), ("render", 1)),
            *(("prepare", 2), ("render", 2)),
        )
    ]
    assert not Engine.in_rounds


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_freeing_the_encoders_holds_the_embeddings_of_one_round_only(process, forked):
    if process:
        engine = ProcessEngine(load_tiny_ernie, free_encoders=True)
    else:
        engine = LocalEngine(load_tiny_ernie(), free_encoders=True)
    try:
        assert (engine.ahead, engine.in_rounds) == (ROUND, True)
    finally:
        engine.close()


def test_freed_encoders_come_back_for_the_next_round_and_for_what_was_not_encoded():
    pipe = tiny_ernie()
    encoder = pipe.text_encoder
    engine = LocalEngine(pipe, free_encoders=True)
    first, second, third = requests_of(SHORT, LONG, "a blue square")
    for request in (first, second):
        engine.prepare([request])
        assert pipe.text_encoder is None
        engine.render([request])
    (picture,) = engine.render([third])  # such as a reroll
    assert picture.size == (64, 64)
    assert pipe.text_encoder is None
    engine.close()
    assert pipe.text_encoder is encoder


def test_what_is_needed_now_is_not_forgotten_to_make_room(monkeypatch):
    """A prompt that comes again when it is the oldest that is kept, beside new ones."""
    monkeypatch.setattr(prompts, "_KEPT", 2)
    stage = PromptStage(tiny_ernie(enhancer=True))
    old, middle, new = requests_of(SHORT, "a blue square", "a red square")
    stage.prepare([old, middle])
    words = stage.pack(old)[0]
    stage.prepare([old, new])
    assert stage.pack(old)[0] == words
