"""Weights that are freed while a picture is denoised are right again, whatever was done meanwhile."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from diffusers import ErnieImagePipeline

import ernie_accel
from ernie_accel import CastDtype, ErnieAccelError, FreeAfterUse, MakeContiguous, Quantize, RestoreWarning
from tests.examples import differences, snapshot
from tests.pipelines import picture, tiny_ernie


@pytest.fixture
def freed(ernie):
    ernie_accel.optimize(ernie, FreeAfterUse())
    picture(ernie, steps=1)
    assert is_empty(ernie)
    return ernie


def is_empty(pipe):
    return all(weight.numel() == 0 for weight in pipe.text_encoder.parameters())


def dtypes(pipe):
    return {weight.dtype for weight in pipe.text_encoder.parameters()}


def test_a_cast_while_they_are_freed_counts(freed):
    want = picture(tiny_ernie().to(torch.bfloat16), steps=1)
    freed.to(torch.bfloat16)
    assert torch.equal(picture(freed, steps=1), want)
    assert torch.equal(picture(freed, steps=1), want)
    freed.encode_prompt("w1", torch.device("cpu"))
    assert dtypes(freed) == {torch.bfloat16}
    picture(freed, steps=1)
    ernie_accel.restore(freed)
    assert dtypes(freed) == {torch.bfloat16}


def test_a_state_dict_can_be_loaded_into_them_and_stays(freed):
    other = tiny_ernie()
    for weight in other.text_encoder.parameters():
        weight.data.mul_(1.5)
    want = picture(other, steps=1)
    freed.text_encoder.load_state_dict(other.text_encoder.state_dict())
    for _ in range(3):
        assert torch.equal(picture(freed, steps=1), want)
        assert is_empty(freed)
    ernie_accel.restore(freed)
    assert torch.equal(picture(freed, steps=1), want)


def test_what_was_changed_between_two_pictures_is_not_forgotten(freed):
    freed.encode_prompt("w1", torch.device("cpu"))
    with torch.no_grad():
        next(freed.text_encoder.parameters()).mul_(1.5)  # the others are still mapped into the file
    whole = {name: weight.clone() for name, weight in freed.text_encoder.named_parameters()}
    picture(freed, prompt=None, prompt_embeds=[torch.zeros(3, 64)], steps=1)
    assert is_empty(freed)
    ernie_accel.restore(freed)
    assert all(torch.equal(weight, whole[name]) for name, weight in freed.text_encoder.named_parameters())


@pytest.mark.parametrize("twin", [False, True], ids=["itself", "copy"])
def test_what_is_changed_in_place_while_they_are_empty_is_refused_and_not_lost_in_silence(freed, twin):
    want = picture(tiny_ernie(), steps=1)
    with torch.no_grad():
        next(freed.text_encoder.parameters()).mul_(1.5)
    pipe = copy.deepcopy(freed) if twin else freed
    for _ in range(2):
        with pytest.raises(ErnieAccelError, match=r"text_encoder: .* changed in place while FreeAfterUse"):
            picture(pipe, steps=1)
    with pytest.warns(RestoreWarning, match=r"text_encoder: .* the values from before"):
        ernie_accel.restore(freed)
    assert torch.equal(picture(freed, steps=1), want)


def test_a_lora_on_the_text_encoder_comes_while_they_are_empty_and_the_weights_come_back(freed):
    from peft import LoraConfig, inject_adapter_in_model

    def load(pipe):
        torch.manual_seed(3)
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), pipe.text_encoder)

    other = tiny_ernie()
    load(other)
    want = picture(other, steps=1)
    load(freed)
    for _ in range(2):
        assert torch.equal(picture(freed, steps=1), want)
        assert is_empty(freed)
    ernie_accel.restore(freed)
    assert torch.equal(picture(freed, steps=1), want)


@pytest.mark.parametrize("when", ["freed", "before"])
@pytest.mark.parametrize("place", ["temporary", "given"])
def test_a_copy_has_weights_of_its_own(ernie, when, place, tmp_path):
    want = picture(tiny_ernie(), steps=1)
    ernie_accel.optimize(ernie, FreeAfterUse(folder=str(tmp_path) if place == "given" else None))
    if when == "freed":
        picture(ernie, steps=1)
    twin = copy.deepcopy(ernie)
    ernie_accel.restore(ernie)
    for _ in range(2):
        assert torch.equal(picture(twin, steps=1), want)
        assert is_empty(twin)
        assert not is_empty(ernie)
    del ernie
    gc.collect()
    assert torch.equal(picture(twin, steps=1), want)


def test_two_pipes_in_one_folder_do_not_mix_their_weights(tmp_path):
    pipes = [tiny_ernie(), tiny_ernie()]
    for weight in pipes[1].text_encoder.parameters():
        weight.data.mul_(1.5)
    want = [picture(pipe, steps=1) for pipe in pipes]
    for pipe in pipes:
        ernie_accel.optimize(pipe, FreeAfterUse(folder=str(tmp_path)))
    for _ in range(2):
        assert all(torch.equal(picture(pipe, steps=1), image) for pipe, image in zip(pipes, want, strict=True))


def test_two_pipes_that_share_components_free_them_once(ernie):
    want = picture(ernie, steps=1)
    other = ErnieImagePipeline(**ernie.components)
    other.set_progress_bar_config(disable=True)
    before = snapshot(ernie)
    ernie_accel.optimize(ernie, FreeAfterUse())
    picture(ernie, steps=1)
    with pytest.raises(ernie_accel.UnsupportedError, match="text_encoder is freed already, by FreeAfterUse"):
        ernie_accel.optimize(other, FreeAfterUse())
    for pipe in (other, ernie, other):
        assert torch.equal(picture(pipe, steps=1), want)
    picture(ernie, steps=1)
    for transform in (CastDtype("bf16"), MakeContiguous(), Quantize("nf4", components=("text_encoder",))):
        with pytest.raises(ernie_accel.UnsupportedError, match="text_encoder has no weights at the moment"):
            ernie_accel.optimize(other, transform)
        assert ernie_accel.plan(other, CastDtype("bf16", components=("vae",))).ok
    assert ernie_accel.plan(ernie, FreeAfterUse("nowhere")).ok  # its own is undone first
    ernie_accel.restore(ernie)
    assert differences(before, snapshot(ernie)) == []
    ernie_accel.optimize(other, FreeAfterUse())
    assert torch.equal(picture(other, steps=1), want)


def test_a_pipe_that_skipped_freeing_does_not_fill_the_weights_of_another(ernie):
    other = ErnieImagePipeline(**ernie.components)
    other.set_progress_bar_config(disable=True)
    ernie_accel.optimize(ernie, FreeAfterUse())
    ernie_accel.optimize(other, FreeAfterUse(), on_unsupported="skip")
    picture(ernie, steps=1)
    assert is_empty(ernie)
    (step,) = ernie_accel.plan(other, CastDtype("bf16", components=("text_encoder",))).steps
    assert "text_encoder has no weights at the moment" in step.reasons[0]


def test_an_interrupt_while_they_are_emptied_loses_nothing(ernie, monkeypatch):
    want = picture(ernie, steps=1)
    ernie_accel.optimize(ernie, FreeAfterUse())
    new_empty, calls = torch.Tensor.new_empty, []

    def interrupted(self, *size):
        calls.append(size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return new_empty(self, *size)

    monkeypatch.setattr(torch.Tensor, "new_empty", interrupted)
    with pytest.raises(KeyboardInterrupt):
        picture(ernie, steps=1)
    monkeypatch.undo()
    assert torch.equal(picture(ernie, steps=1), want)
    ernie_accel.restore(ernie)
    assert torch.equal(picture(ernie, steps=1), want)
