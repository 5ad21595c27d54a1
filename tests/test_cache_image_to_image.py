"""Step caches in image to image, whose pipelines take the transformer's output as an object."""

from __future__ import annotations

import pytest
from diffusers import ZImageImg2ImgPipeline
from PIL import Image

import ernie_accel
from ernie_accel import CacheSteps
from tests.pipelines import tiny_z_image


@pytest.mark.xfail(
    raises=AssertionError,
    strict=True,
    reason="their calls pass no return_dict=False, and CacheSteps computes all of those",
)
def test_image_to_image_leaves_steps_out_as_text_to_image_does():
    pipe = ZImageImg2ImgPipeline(**tiny_z_image().components)
    pipe.set_progress_bar_config(disable=True)
    computed = []
    pipe.transformer.layers[0].register_forward_hook(lambda *_: computed.append(1))
    ernie_accel.optimize(pipe, CacheSteps())
    image = Image.new("RGB", (64, 64))
    pipe("a red circle", image=image, strength=1.0, num_inference_steps=24, guidance_scale=0.0, output_type="latent")
    assert len(computed) < 18
