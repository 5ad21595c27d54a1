"""On a CUDA device: after a warm-up no picture compiles or captures, and a cache of steps goes round the graphs."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import CacheSteps, CallDefaults, CaptureGraphs, RewriteBlocks, Warmup
from ernie_accel.core.stand_in import standing_in
from ernie_accel.models.graphed_forward import GraphedForward
from tests.pipelines import picture, tiny_ernie

PROMPT = "a red circle on"
WARM = Warmup(sizes=((64, 64),), prompt_lengths=(4,))


def graphed_forward(pipe) -> GraphedForward:
    forward = standing_in(pipe.transformer, GraphedForward)  # the forecast goes round it
    assert forward is not None
    return forward


@pytest.mark.parametrize("cache", [(), (CacheSteps(),)], ids=repr)
def test_the_first_picture_finds_its_graph(cache, monkeypatch):
    pipe = tiny_ernie().to("cuda")
    assert len(pipe.tokenizer(PROMPT)["input_ids"]) == 4
    once = CallDefaults(guidance_scale=1.0)
    expected = picture(ernie_accel.optimize(pipe, RewriteBlocks(), once, *cache), prompt=PROMPT, steps=24)
    state = torch.cuda.get_rng_state()
    ernie_accel.optimize(pipe, RewriteBlocks(), once, CaptureGraphs(), *cache, WARM)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert ernie_accel.report(pipe).entries[-1].status == "applied"

    def no_capture(*_):
        raise AssertionError("a graph was captured after the warm-up")

    graphed = graphed_forward(pipe)
    assert len(graphed._graphs) == 1
    monkeypatch.setattr(graphed._graphs, "_capture", no_capture)
    image = picture(pipe, prompt=PROMPT, steps=24)
    assert len(graphed._graphs) == 1
    assert ((image - expected).norm() / expected.norm()).item() < 1e-5
