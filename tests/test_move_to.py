"""Moving a pipe to a device: said before, undone after, refused where there is no such device."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import Context, MoveTo, UnsupportedError
from tests.examples import differences, snapshot
from tests.pipelines import picture, tiny_ernie


@pytest.fixture
def scattered():
    """A pipe whose text encoder is elsewhere: on a machine without accelerator, on the meta device."""
    pipe = tiny_ernie()
    pipe.text_encoder.to("meta")
    return pipe


def test_a_preset_for_an_npu_says_that_it_moves_the_pipe(ernie):
    plan = ernie_accel.plan(ernie, preset="npu-bf16", context=Context.named("ascend910b"))
    (step,) = (step for step in plan.steps if isinstance(step.transform, MoveTo))
    assert step.preview.changes == ("transformer cpu -> npu", "vae cpu -> npu", "text_encoder cpu -> npu")
    assert plan.ok


@pytest.mark.parametrize("device", ["npu", "npu:1", "cuda"])
def test_a_device_that_is_not_here_is_refused_before_anything_moves(ernie, device):
    before = snapshot(ernie)
    with pytest.raises(UnsupportedError, match=f"there is no '{device}' here: the device is cpu"):
        ernie_accel.optimize(ernie, MoveTo(device))
    assert differences(before, snapshot(ernie)) == []


def test_a_pipe_that_is_there_has_nothing_to_do(ernie):
    (step,) = ernie_accel.plan(ernie, MoveTo("cpu")).steps
    assert (step.verdict, step.preview.note) == ("nothing to do", "the pipe is on cpu already")


def test_what_is_elsewhere_is_moved_and_moved_back(scattered, monkeypatch):
    moved = []
    monkeypatch.setattr(type(scattered), "to", lambda self, device: moved.append(device))  # meta holds no values
    assert MoveTo("cpu").preview(scattered, Context.detect(scattered)).changes == ("text_encoder meta -> cpu",)
    places = []
    for name in ("transformer", "vae", "text_encoder"):
        part = getattr(scattered, name)
        monkeypatch.setattr(part, "to", lambda device, name=name: places.append((name, str(device))))
    applied = MoveTo("cpu").apply(scattered, Context.detect(scattered))
    assert (moved, places) == (["cpu"], [])
    applied.undo()
    assert sorted(places) == [("text_encoder", "meta"), ("transformer", "cpu"), ("vae", "cpu")]


def test_another_card_of_the_same_kind_is_another_device(ernie, monkeypatch):
    class Fake:
        device = torch.device("cuda:0")

    monkeypatch.setattr(ernie.vae, "parameters", lambda: iter([Fake]))
    context = Context.named("h200")
    assert "vae cuda:0 -> cuda:1" in MoveTo("cuda:1").preview(ernie, context).changes
    assert not any(change.startswith("vae") for change in MoveTo("cuda").preview(ernie, context).changes)


@pytest.mark.parametrize("device", ["", "CUDA", "cuda:", 0, None])
def test_a_device_that_torch_would_not_understand_is_refused(device):
    with pytest.raises(ValueError, match="device takes "):
        MoveTo(device)


def test_a_pipe_that_is_offloaded_is_moved_by_that(ernie):
    ernie.vae._hf_hook = object()
    with pytest.raises(UnsupportedError, match="vae: offloaded, and moved by that"):
        ernie_accel.optimize(ernie, MoveTo("cpu"))


def test_pictures_are_the_same_with_a_preset_that_moves_nothing_here(ernie):
    before = picture(ernie)
    ernie_accel.optimize(ernie, MoveTo("cpu"))
    assert torch.equal(picture(ernie), before)
