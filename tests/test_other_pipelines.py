"""Pipelines that a transform cannot serve are refused in the plan, and not by an error in the middle of a call."""

from __future__ import annotations

import diffusers
import pytest
import torch

import ernie_accel
from ernie_accel import Autocast, CallDefaults, Context, ExpandAttentionMask, TileVae, Warmup
from tests import pipelines
from tests.examples import ELSEWHERE, EXAMPLES
from tests.pipelines import tiny_flux, tiny_sd, tiny_z_image


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("ZImageImg2ImgPipeline", "image"),
        ("ZImageInpaintPipeline", "image and mask_image"),
        ("ZImageControlNetPipeline", "control_image"),
        ("ZImagePipeline", None),
        ("ErnieImagePipeline", None),
        ("Flux2Pipeline", None),
        ("FluxKontextPipeline", None),
        ("FluxFillPipeline", "image and mask_image"),
        ("QwenImageEditPipeline", "image"),
        ("StableDiffusionControlNetPipeline", "image"),
        ("WanImageToVideoPipeline", "image"),
        ("WanPipeline", None),
        ("StableCascadeDecoderPipeline", "image_embeddings"),
    ],
)
def test_a_warm_up_is_refused_where_a_call_needs_more_than_a_prompt(name, needs):
    pipe = tiny_z_image()
    call = {"__call__": getattr(diffusers, name).__call__}  # beside components that are there
    object.__setattr__(pipe, "__class__", type(name, (diffusers.ZImagePipeline,), call))
    reasons = Warmup(sizes=((64, 64),)).unsupported(pipe, ernie_accel.Context.detect(tiny_z_image()))
    told = [reason for reason in reasons if "a warm-up has none" in reason]
    assert bool(told) == (needs is not None)
    if needs is not None:
        assert f"{name} draws from {needs} beside the prompt" in told[0]
        assert "warm it up by a call of your own" in told[0]


def kvae(**settings):
    small = {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "sample_size": 64}
    return diffusers.AutoencoderKLKVAE(**small, **settings)


def test_a_vae_with_levels_under_another_name_is_tiled():
    pipe = tiny_flux()
    pipe.vae = kvae(ch_mult=(1, 2, 2))
    ernie_accel.optimize(pipe, TileVae(tile_px=32))
    assert pipe.vae.tile_latent_min_size == 8
    with torch.no_grad():
        assert pipe.vae.decode(torch.randn(1, 4, 16, 16)).sample.shape == (1, 3, 64, 64)
    ernie_accel.restore(pipe)
    pipe.vae._internal_dict = type(pipe.vae.config)({k: v for k, v in pipe.vae.config.items() if k != "ch_mult"})
    plan = ernie_accel.plan(pipe, TileVae(tile_px=32))
    assert "AutoencoderKLKVAE does not say how many pixels a latent has; leave tile_px out" in str(plan)
    assert ernie_accel.plan(pipe, TileVae()).ok


def test_autocast_is_refused_beside_a_control_net_of_z_image():
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        dim=64,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    pipe = diffusers.ZImageControlNetPipeline(**tiny_z_image().components, controlnet=net)
    plan = str(ernie_accel.plan(pipe, Autocast("bfloat16")))
    assert "controlnet is a ZImageControlNetModel, which writes its float32 padding tokens" in plan
    assert "use CastDtype('bfloat16')" in plan
    assert ernie_accel.plan(tiny_z_image(), Autocast("bfloat16")).ok


def test_masks_that_the_blocks_expand_themselves_are_left_to_them():
    pipe = tiny_flux()
    pipe.transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    plan = str(ernie_accel.plan(pipe, ExpandAttentionMask()))
    assert "ChromaTransformerBlock expands its mask to [B, 1, S, S] itself: leave this out" in plan


def test_the_other_guidance_scale_is_a_default_too():
    pipe = ernie_accel.optimize(tiny_flux(), CallDefaults(true_cfg_scale=3.0))
    assert "true_cfg_scale 1.0 -> 3.0" in str(ernie_accel.report(pipe))
    negative = {"negative_prompt_embeds": torch.ones(1, 5, 32), "negative_pooled_prompt_embeds": torch.ones(1, 32)}
    want = pipelines.picture(tiny_flux(), true_cfg_scale=3.0, **negative)
    assert torch.equal(pipelines.picture(pipe, **negative), want)
    assert not torch.equal(pipelines.picture(pipe, true_cfg_scale=1.0, **negative), want)
    plan = ernie_accel.plan(tiny_z_image(), CallDefaults(true_cfg_scale=3.0))
    assert "ZImagePipeline takes no argument 'true_cfg_scale'" in str(plan)


@pytest.mark.parametrize("machine", [Context.named("cpu"), Context("cuda", "NVIDIA H200", (9, 0))], ids=str)
def test_every_transform_plans_for_a_pipe_without_a_transformer(machine):
    pipe = tiny_sd()
    for transform in (*EXAMPLES, *ELSEWHERE):
        assert ernie_accel.plan(pipe, transform, context=machine, memory=None).steps
    for preset in ernie_accel.presets:
        assert ernie_accel.plan(pipe, preset=preset, context=machine, memory=None).steps
