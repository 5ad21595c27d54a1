"""On CUDA a batch is begun while the one before is under way, and its pictures are those that waiting gives."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

import ernie_accel
from ernie_accel.batch import Row, produce
from ernie_accel.batch.engines import LocalEngine, Request
from ernie_accel.batch.engines.base import NotFiniteError, finished

CYCLES = 2_000_000_000  # about a second


class SlowPipe:
    """Draws each row's noise, and keeps the device busy before; a pipeline as far as the engine looks."""

    def __init__(self):
        self.components = {}

    def __call__(self, prompt, generator=None, output_type="pil", width=64, height=64):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generators = generator if isinstance(generator, list) else [generator]
        torch.cuda._sleep(CYCLES)
        images = torch.stack([torch.rand(3, height, width, generator=one).cuda() for one in generators])
        images[[text == "broken" for text in prompts]] = float("nan")
        return SimpleNamespace(images=images)


class AheadPipe(SlowPipe):
    """Hands its device work over without waiting for it."""

    def __call__(self, prompt, generator=None, output_type="pil", width=64, height=64):
        images = torch.full((1, 3, height, width), 0.5, device="cuda")
        torch.cuda._sleep(CYCLES)
        return SimpleNamespace(images=images + 0.0)


def requests(*prompts):
    return [Request(prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)]


def test_begin_returns_while_the_device_is_at_work():
    engine = LocalEngine(AheadPipe())
    finished(engine.begin(requests("warm up")))
    start = time.perf_counter()
    begun = engine.begin(requests("a cup"))
    handed_over = time.perf_counter() - start
    (picture,) = finished(begun)
    total = time.perf_counter() - start
    assert handed_over < total / 4
    assert picture.getpixel((0, 0)) == (128, 128, 128)


def test_pictures_of_a_begun_batch_are_those_of_a_rendered_one_whatever_comes_after():
    engine = LocalEngine(SlowPipe())
    first, second = engine.begin(requests("a", "b")), engine.begin(requests("c", "d", "e"))
    later, earlier = finished(second), finished(first)  # in any order
    for begun, wanted in ((earlier, requests("a", "b")), (later, requests("c", "d", "e"))):
        assert [picture.tobytes() for picture in begun] == [one.tobytes() for one in engine.render(wanted)]


def test_a_picture_that_is_not_finite_costs_no_other():
    good, bad = LocalEngine(SlowPipe()).begin(requests("a", "broken"))
    assert good().size == (64, 64)
    with pytest.raises(NotFiniteError, match="12288 of the picture's 12288 values"):
        bad()


def test_a_batch_captures_graphs_while_pictures_are_written(tmp_path):
    pipe = ernie_accel.demo.load(dtype=torch.bfloat16).to("cuda")
    ernie_accel.optimize(pipe, preset="turbo-bf16")
    rows = [
        Row(line=i + 2, index=i, prompt=f"a {size} red circle", file_name=f"{i}.png", width=width, height=128)
        for i, (size, width) in enumerate(itertools.product(("small", "large"), (64, 96, 128, 160, 192)))
    ]
    for attempt in range(3):  # captures fall into the time of the writers only now and then
        results = list(produce(pipe, rows, tmp_path / str(attempt), batch_size=1, progress=False))
        assert [result.error for result in results] == [None] * len(rows)
        pipe.transformer.forward._graphs.clear()
