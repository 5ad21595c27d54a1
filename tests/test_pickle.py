"""Optimized pipes can be copied and pickled: the copy draws the same picture and has state of its own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import (
    Autocast,
    BatchPromptEncoding,
    CacheSteps,
    CallDefaults,
    CaptureGraphs,
    CastDtype,
    CheckFinite,
    ElideMask,
    ExpandAttentionMask,
    FreeAfterUse,
    FuseVae,
    KeepTimestepsOnHost,
    Phase,
    Quantize,
    RewriteBlocks,
    RewriteEnhancer,
    RewriteTextEncoder,
    SliceVae,
    SwapScheduler,
    TruncatePrompts,
)
from tests.examples import ELSEWHERE, EXAMPLES
from tests.pipelines import picture, tiny_ernie
from tests.test_graphs import H200, Recorder

WANTED: list[tuple[Any, ...]] = [
    (),
    (Autocast("bfloat16"),),
    (BatchPromptEncoding(cache=2),),
    (CacheSteps(),),
    (CallDefaults("turbo"),),
    (CastDtype("bfloat16"),),
    (CheckFinite(),),
    (ElideMask(),),
    (ExpandAttentionMask(),),
    (FreeAfterUse("disk"),),
    (FuseVae(),),
    (KeepTimestepsOnHost(),),
    (Quantize("int8-weight-only"),),
    (RewriteBlocks(),),
    (RewriteBlocks(), Quantize("int8-weight-only")),
    (RewriteBlocks(), CaptureGraphs()),
    (RewriteEnhancer(),),
    (RewriteTextEncoder(),),
    (SliceVae(),),
    (SwapScheduler("unipc"),),
    (TruncatePrompts(8),),
    (RewriteTextEncoder(), BatchPromptEncoding(), RewriteBlocks(), CheckFinite(), CacheSteps(), TruncatePrompts(8)),
]


def through_pickle(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_a_copy_draws_the_same_picture_by_itself(wanted: tuple[Any, ...], copied: Any, recorder: Recorder) -> None:
    pipe = tiny_ernie(enhancer=any(isinstance(each, RewriteEnhancer) for each in wanted))
    context = H200 if any(isinstance(each, (CaptureGraphs, KeepTimestepsOnHost)) for each in wanted) else None
    if wanted:
        ernie_accel.optimize(pipe, *wanted, context=context)
    steps = 24 if any(isinstance(each, CacheSteps) for each in wanted) else 2
    if copied is copy.deepcopy:  # hooks that transformers leaves on a text encoder that was called cannot be pickled
        picture(pipe, steps=steps)  # so that there is something to leave behind
    other = copied(pipe)
    expected = picture(pipe, steps=steps)
    assert torch.equal(picture(other, steps=steps), expected)
    for part in (pipe.transformer, pipe.text_encoder.language_model.norm, pipe.vae):
        part.__class__ = torch.nn.Identity  # the original is gone
    assert torch.equal(picture(other, steps=steps), expected)


@pytest.mark.parametrize("transform", [*EXAMPLES, *ELSEWHERE], ids=repr)
def test_a_pipe_with_any_transform_comes_out_of_a_pickle(transform: Any) -> None:
    pipe = tiny_ernie(enhancer=transform.slot == "enhancer")
    if not ernie_accel.plan(pipe, transform).ok:
        assert transform in ELSEWHERE  # it needs another machine
        return
    ernie_accel.optimize(pipe, transform)
    other = through_pickle(pipe)  # before the first call, after which transformers' hooks cannot be pickled
    assert [entry.step.transform for entry in ernie_accel.report(other).entries] == [transform]
    if transform.phase is Phase.COMPILE or transform == CastDtype("float16", components=("transformer",)):
        return  # compiled code stays behind; two dtypes do not go together
    assert torch.equal(picture(other, steps=1), picture(pipe, steps=1))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What captures in the place of CUDA."""
    recorder = Recorder()
    monkeypatch.setattr("ernie_accel.models.replays.capture_cuda", recorder)
    return recorder
