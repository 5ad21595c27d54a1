"""A call that runs out of memory says where, and what would fit; the pipe works on."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import DeviceOutOfMemoryError, ExplainOutOfMemory
from ernie_accel.batch.engines.base import is_out_of_memory
from tests.pipelines import picture, tiny_ernie

CUDA = "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 7.30 GiB"


def fail_once(monkeypatch: pytest.MonkeyPatch, module: Any, method: str, kept: list[Any] | None = None) -> None:
    inner = getattr(type(module), method)
    failed = []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(True)
            large = torch.ones(1000)
            if kept is not None:
                kept.append(weakref.ref(large))
            raise torch.OutOfMemoryError(CUDA)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(type(module), method, failing)


@pytest.mark.parametrize(
    ("part", "method", "stage"),
    [
        (lambda pipe: pipe.transformer.layers[1].mlp, "forward", "while transformer denoised"),
        (lambda pipe: pipe.text_encoder, "forward", "while text_encoder encoded prompts"),
        (lambda pipe: pipe.vae.decoder, "forward", "while vae decoded"),
    ],
)
def test_the_error_names_the_stage_and_the_pipe_works_on(monkeypatch, part, method, stage):
    pipe = tiny_ernie()
    before = picture(pipe)
    ernie_accel.optimize(pipe, ExplainOutOfMemory(predicted=3 * 2**30))
    fail_once(monkeypatch, part(pipe), method)
    with pytest.raises(DeviceOutOfMemoryError, match=stage) as caught:
        picture(pipe)
    text = str(caught.value)
    assert "512.00 MiB more were asked for" in text
    assert "predicted that 3.0 GiB" in text
    assert "smaller pictures than 64x64" in text
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert is_out_of_memory(caught.value)  # a batch then tries fewer at once
    assert torch.equal(picture(pipe), before)


def test_what_the_failed_call_had_computed_is_let_go_while_the_error_is_handled(monkeypatch):
    pipe, kept = tiny_ernie(), []
    ernie_accel.optimize(pipe, ExplainOutOfMemory())
    fail_once(monkeypatch, pipe.transformer.layers[0], "forward", kept)
    try:
        picture(pipe)
    except DeviceOutOfMemoryError:
        gc.collect()
        assert kept[0]() is None
    else:
        pytest.fail("it did not fail")


def test_other_errors_pass(monkeypatch):
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, ExplainOutOfMemory())
    with pytest.raises(ValueError, match="divisible"):
        picture(pipe, height=65)


def test_nothing_predicted_is_nothing_claimed(monkeypatch):
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, ExplainOutOfMemory())
    fail_once(monkeypatch, pipe.vae.decoder, "forward")
    with pytest.raises(DeviceOutOfMemoryError) as caught:
        picture(pipe, num_images_per_prompt=2)
    assert "predicted" not in str(caught.value)
    assert "fewer pictures at once" in str(caught.value)
    with pytest.raises(ValueError, match="at least 1 byte"):
        ExplainOutOfMemory(predicted=0)
