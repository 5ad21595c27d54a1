"""`BatchPromptEncoding` and `CompileVae`: the same embeddings and pictures, from fewer and faster runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ernie_accel
from tests.pipelines import picture, tiny_ernie, tiny_flux

PROMPTS = ["a red circle on blue", "", "a", "a red circle on blue", "small square on red"]


def count_runs(monkeypatch: pytest.MonkeyPatch, encoder: Any) -> list[int]:
    runs: list[int] = []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda **kw: runs.append(len(kw["input_ids"])) or forward(**kw))
    return runs


def test_prompts_are_encoded_together_and_equal_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_ernie()
    expected = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 2)
    ernie_accel.optimize(pipe, ernie_accel.BatchPromptEncoding())
    runs = count_runs(monkeypatch, pipe.text_encoder)
    got = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 2)
    assert runs == [4]
    assert len(got) == len(expected) == 10
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, atol=2e-6, rtol=2e-5)


def test_a_single_prompt_goes_the_stock_way() -> None:
    pipe = tiny_ernie()
    expected = picture(pipe)
    assert torch.equal(picture(ernie_accel.optimize(pipe, ernie_accel.BatchPromptEncoding())), expected)


def test_a_guided_batch_draws_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_ernie()
    call: dict[str, Any] = {"prompt": ["a red circle", "a"], "guidance_scale": 3.0}
    expected = picture(pipe, **call)
    ernie_accel.optimize(pipe, ernie_accel.BatchPromptEncoding())
    runs = count_runs(monkeypatch, pipe.text_encoder)
    torch.testing.assert_close(picture(pipe, **call), expected, atol=1e-5, rtol=0)
    assert runs == [3]  # the two prompts, and the empty negative prompt once


def test_large_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ernie_accel.optimize(tiny_ernie(), ernie_accel.BatchPromptEncoding(max_batch=2))
    runs = count_runs(monkeypatch, pipe.text_encoder)
    pipe.encode_prompt(PROMPTS, torch.device("cpu"))
    assert runs == [2, 2]


def test_other_families_have_nothing_to_do() -> None:
    assert "already" in ernie_accel.BatchPromptEncoding().preview(tiny_flux(), ernie_accel.Context("cpu", "")).note


def test_the_decoder_gets_channels_last_weights_and_is_compiled_without_breaks() -> None:
    torch._dynamo.reset()
    pipe = tiny_ernie()
    expected = picture(pipe)
    strides = [p.stride() for p in pipe.vae.decoder.parameters()]
    graphs: list[Any] = []
    compile_ = torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        count = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
        patch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_(self, backend=count, **kw))
        ernie_accel.optimize(pipe, ernie_accel.CompileVae(), context=ernie_accel.Context("cuda", "a test", (9, 0)))
    torch.testing.assert_close(picture(pipe), expected, atol=1e-4, rtol=0)
    assert len(graphs) == 1
    assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    ernie_accel.restore(pipe)
    torch._dynamo.reset()
    assert [p.stride() for p in pipe.vae.decoder.parameters()] == strides
    assert torch.equal(picture(pipe), expected)


def test_a_pipe_without_a_decoder_is_refused() -> None:
    pipe = tiny_ernie()
    pipe.vae = None
    assert ernie_accel.CompileVae().unsupported(pipe, ernie_accel.Context("cpu", "")) == [
        "ErnieImagePipeline has no vae.decoder"
    ]
