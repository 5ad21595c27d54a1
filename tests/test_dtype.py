"""Casting equals loading in that dtype, tensor by tensor."""

from __future__ import annotations

import ast

import pytest
import torch

import ernie_accel
from ernie_accel import CastDtype, Context, MakeContiguous
from tests.examples import make_awkward
from tests.pipelines import picture
from tests.z_image_pipes import Z_IMAGE_PIPES


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_it_equals_loading_with_torch_dtype(ernie, name, tmp_path):
    from diffusers import ErnieImagePipeline

    ernie.save_pretrained(tmp_path)
    loaded = ErnieImagePipeline.from_pretrained(tmp_path, torch_dtype=getattr(torch, name), local_files_only=True)
    ernie_accel.optimize(ernie, CastDtype(name))
    for component in ("transformer", "vae", "text_encoder"):
        ours, theirs = (
            dict([*m.named_parameters(), *m.named_buffers()])
            for m in (getattr(ernie, component), getattr(loaded, component))
        )
        assert ours.keys() == theirs.keys()
        for tensor in ours:
            assert ours[tensor].dtype == theirs[tensor].dtype, f"{component}.{tensor}"
            assert torch.equal(ours[tensor], theirs[tensor]), f"{component}.{tensor}"


def test_rope_frequencies_of_the_text_encoder_stay_in_float32(ernie):
    frequencies = [b for n, b in ernie.text_encoder.named_buffers() if "inv_freq" in n]
    assert frequencies
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    assert all(b.dtype == torch.float32 for n, b in ernie.text_encoder.named_buffers() if "inv_freq" in n)


def test_modules_that_a_model_keeps_in_float32_stay(ernie):
    ernie.transformer._keep_in_fp32_modules = ["time_embedding"]
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    assert ernie.transformer.time_embedding.linear_1.weight.dtype == torch.float32
    assert ernie.transformer.final_linear.weight.dtype == torch.bfloat16


def test_components_can_be_chosen(ernie):
    ernie_accel.optimize(ernie, CastDtype("bf16", components=("transformer",)))
    assert ernie.transformer.dtype == torch.bfloat16
    assert ernie.vae.dtype == ernie.text_encoder.dtype == torch.float32


def test_tied_weights_stay_tied(ernie):
    ernie.transformer.layers[1].mlp.up_proj.weight = ernie.transformer.layers[0].mlp.up_proj.weight
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    assert ernie.transformer.layers[1].mlp.up_proj.weight is ernie.transformer.layers[0].mlp.up_proj.weight
    assert ernie.transformer.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16


def test_bfloat16_on_an_old_card_is_refused_with_the_way_out(ernie):
    plan = ernie_accel.plan(ernie, CastDtype("bf16"), context=ernie_accel.Context.named("t4"))
    assert plan.problems[CastDtype("bf16")] == (
        "bfloat16 needs CUDA compute capability >= 8.0; this device has 7.5: use 'float16'",
    )
    assert ernie_accel.plan(ernie, CastDtype("fp16"), context=ernie_accel.Context.named("t4")).ok


@pytest.mark.parametrize("loaded_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_t5_is_cast_as_it_would_have_been_loaded(flux, name, loaded_in, tmp_path):
    """``wo`` stays in float32 beside float16 only, also where it was loaded in bfloat16."""
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    encoder.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path, dtype=getattr(torch, name))
    flux.text_encoder_2 = T5EncoderModel.from_pretrained(tmp_path, dtype=getattr(torch, loaded_in))
    before = dict(flux.text_encoder_2.state_dict())
    ernie_accel.optimize(flux, CastDtype(name, components=("text_encoder_2",)))
    assert all(
        torch.equal(tensor, want) and tensor.dtype == want.dtype
        for tensor, want in zip(flux.text_encoder_2.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    planned = ernie_accel.report(flux).entries[0].step.planned
    if planned is not None:
        wo = planned.weights["text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo.weight"]
        assert wo.dtype == loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype
    ernie_accel.restore(flux)
    assert all(torch.equal(tensor, before[path]) for path, tensor in flux.text_encoder_2.state_dict().items())


@pytest.mark.parametrize("transform", [CastDtype("bf16"), MakeContiguous()])
def test_a_script_that_casts_the_pipe_afterwards_finds_one_dtype_when_it_is_restored(transform, flux):
    make_awkward(flux)
    flux.transformer.proj_out.bias.data.fill_(1.0)  # in every dtype
    ernie_accel.optimize(flux, transform)
    flux.to(torch.float16)
    ernie_accel.restore(flux)
    assert {p.dtype for m in (flux.transformer, flux.vae) for p in m.parameters()} == {torch.float16}


def test_a_vae_that_gets_its_pictures_in_bfloat16_is_cast_to_nothing_else():
    make, call = Z_IMAGE_PIPES["ZImageOmniPipeline"]
    pipe = make()
    plan = ernie_accel.plan(pipe, CastDtype("float16"))
    assert "calls of ZImageOmniPipeline give the VAE pictures in bfloat16" in str(plan)
    (reason,) = CastDtype("float16").unsupported(pipe, Context.detect(pipe))
    others = ast.literal_eval(reason.partition("components=")[2])
    ernie_accel.optimize(pipe, CastDtype("float16", components=others))
    assert torch.isfinite(picture(pipe, steps=2, **call)).all()
    assert ernie_accel.plan(ernie_accel.restore(pipe).to(torch.float32), CastDtype("bfloat16")).ok


def test_a_tensor_of_two_components_that_a_script_has_parted_is_cast_back_in_both():
    """A ControlNet of Z-Image has the padding tokens of the transformer, until the latter gets other weights."""
    make, call = Z_IMAGE_PIPES["ZImageControlNetPipeline"]
    pipe = make()
    before, token = picture(pipe, steps=2, **call), pipe.controlnet.x_pad_token.data.clone()
    assert pipe.controlnet.x_pad_token is pipe.transformer.x_pad_token
    ernie_accel.optimize(pipe, CastDtype("bfloat16"))
    assert pipe.controlnet.x_pad_token.dtype == torch.bfloat16
    pipe.transformer.load_state_dict({k: v.clone() for k, v in pipe.transformer.state_dict().items()}, assign=True)
    assert pipe.controlnet.x_pad_token is not pipe.transformer.x_pad_token
    ernie_accel.restore(pipe)
    assert torch.equal(pipe.controlnet.x_pad_token, token) and torch.equal(pipe.transformer.x_pad_token, token)
    assert torch.equal(picture(pipe, steps=2, **call), before)
