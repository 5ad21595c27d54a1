"""Memory: what is freed is really gone, what comes back is the same, and what cannot come back says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ernie_accel
from ernie_accel import Context, FreeAfterUse, MakeContiguous, Offload
from ernie_accel.core.components import module_bytes
from tests.pipelines import picture


def held_while_denoising(pipe):
    """Return the bytes of the text encoder at every step of a picture, and the picture."""
    held = []

    def look(pipe, step, t, tensors):
        held.append(module_bytes(pipe.text_encoder))
        return tensors

    return held, picture(pipe, steps=2, callback_on_step_end=look)


def test_the_text_encoder_is_gone_while_denoising_and_back_for_the_next_call(ernie):
    before = picture(ernie, steps=2)
    ernie_accel.optimize(ernie, FreeAfterUse())
    buffers = sum(b.numel() * b.element_size() for b in ernie.text_encoder.buffers())
    for _ in range(2):
        held, image = held_while_denoising(ernie)
        assert held == [buffers] * 2
        assert torch.equal(image, before)


def test_a_saved_text_encoder_is_whole(ernie, tmp_path):
    """The trap: empty tensors would be saved without a word."""
    whole = {name: tensor.clone() for name, tensor in ernie.text_encoder.state_dict().items()}
    ernie_accel.optimize(ernie, FreeAfterUse(folder=str(tmp_path)))
    picture(ernie, steps=1)
    assert (tmp_path / "text_encoder.safetensors").is_file()
    saved = ernie.text_encoder.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in whole.items())
    ernie_accel.restore(ernie)
    assert list(tmp_path.iterdir()) == []


def test_freed_to_nowhere_the_next_call_says_what_to_do(ernie):
    embeds = ernie.encode_prompt("a red circle", torch.device("cpu"))
    ernie_accel.optimize(ernie, FreeAfterUse("nowhere"))
    before = picture(ernie, prompt="a red circle", steps=1)
    with pytest.raises(ernie_accel.ErnieAccelError, match="weights of text_encoder were freed after their first use"):
        picture(ernie, prompt="a red circle", steps=1)
    assert torch.equal(picture(ernie, prompt=None, prompt_embeds=embeds, steps=1), before)
    with pytest.raises(ernie_accel.RestoreError, match="freed weights are gone"):
        ernie_accel.restore(ernie)


def test_a_prompt_enhancer_fetches_its_weights_before_it_generates(ernie):
    """The trap: ``generate`` looks at the model before its first forward."""

    class Enhancer(torch.nn.Linear):
        device = torch.device("cpu")

        def generate(self):
            return self.weight.sum()

    ernie.register_modules(pe=Enhancer(4, 4))
    before = ernie.pe.generate()
    ernie_accel.optimize(ernie, FreeAfterUse())
    picture(ernie, steps=1, use_pe=False)
    assert module_bytes(ernie.pe) == 0
    assert ernie.pe.generate() == before


def test_what_works_later_cannot_be_freed_before(ernie):
    (step,) = ernie_accel.plan(ernie, FreeAfterUse(components=("vae",))).steps
    assert step.reasons == ("vae works while or after the picture is denoised: it cannot be freed before",)


def test_offloading_says_what_is_in_the_way(ernie, flux):
    h200 = Context.named("h200")
    ernie.vae._hf_hook = object()
    assert "vae: offloaded already" in Offload("group").unsupported(ernie, h200)[0]
    assert "FluxPipeline has none of text_encoder" in Offload("stages").unsupported(flux, h200)[0]
    assert "there is no accelerator" in Offload("model").unsupported(flux, Context.named("cpu"))[0]
    assert Offload("model").unsupported(flux, h200) == []
    with pytest.raises(ernie_accel.UnknownNameError, match="Did you mean 'sequential'"):
        Offload("sequentially")
    with pytest.raises(ValueError, match="blocks_per_group must be >= 1, got 0"):
        Offload("group", blocks_per_group=0)


def test_channels_last_lays_out_convolutions_only_and_says_when_it_pays(ernie):
    before = picture(ernie)
    ernie_accel.optimize(ernie, MakeContiguous(channels_last=("vae",)))
    (entry,) = ernie_accel.report(ernie).entries
    weights = {f"vae.{name}": p for name, p in ernie.vae.named_parameters() if p.ndim == 4}
    assert set(entry.applied.changed) >= {n for n, p in weights.items() if min(p.shape[1:]) > 1}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights.values())
    assert "pays only in a compiled model" in entry.applied.note
    image = picture(ernie)
    assert ((image - before).norm() / before.norm()).item() < 1e-5
    assert MakeContiguous(channels_last=("vae",)).effect is ernie_accel.Effect.ROUNDING
    assert MakeContiguous().effect is ernie_accel.Effect.EXACT


def test_channels_last_names_components_that_are_there_and_asked_for(ernie):
    reasons = MakeContiguous(channels_last=("unet",)).unsupported(ernie, Context.named("cpu"))
    assert reasons[0].startswith("ErnieImagePipeline has no component 'unet'")
    odd = replace(MakeContiguous(channels_last=("vae",)), components=("transformer",))
    assert "which is not among components=('transformer',)" in odd.unsupported(ernie, Context.named("cpu"))[0]
