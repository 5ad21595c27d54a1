"""`CompileVae`: the same pictures from a decoder that is compiled in one piece, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ernie_accel
from tests.pipelines import picture, tiny_ernie


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
