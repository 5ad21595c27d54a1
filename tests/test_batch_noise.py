"""The noise that a batch is given is the noise that the pipeline would have drawn."""

from __future__ import annotations

import inspect

import pytest
import torch

from ernie_accel.batch.engines import LocalEngine, Request
from ernie_accel.batch.engines.noise import latents_for
from tests.pipelines import tiny_ernie, tiny_flux, tiny_z_image


def requests(count, **settings):
    return [Request(prompt="a cup", seed=seed, **settings) for seed in range(7, 7 + count)]


def drawn_by(pipe, wanted, monkeypatch):
    """Return the latents that the pipe itself begins with."""
    from diffusers.pipelines.ernie_image import pipeline_ernie_image as module

    seen, draw = [], module.randn_tensor
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: seen.append(draw(*a, **k)) or seen[-1])
    size = {name: getattr(wanted[0], name) for name in ("width", "height") if getattr(wanted[0], name)}
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in wanted]
    pipe([request.prompt for request in wanted], generator=generators, num_inference_steps=1, **size)
    (latents,) = seen
    return latents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "size"), [(1, {"width": 64, "height": 32}), (3, {"width": 32, "height": 64})])
def test_it_is_that_of_the_pipeline(monkeypatch, dtype, count, size):
    pipe, wanted = tiny_ernie(dtype=dtype), requests(count, **size)
    latents, expected = latents_for(pipe, wanted), drawn_by(pipe, wanted, monkeypatch)
    assert latents.dtype == expected.dtype == dtype
    assert torch.equal(latents, expected)


def test_what_a_row_leaves_open_is_the_pipelines_default():
    pipe = tiny_ernie()
    given = {name: parameter.default for name, parameter in inspect.signature(pipe).parameters.items()}
    sides = (given["height"] // pipe.vae_scale_factor, 32 // pipe.vae_scale_factor)
    assert latents_for(pipe, requests(2, width=32)).shape[2:] == sides


def test_the_engine_hands_it_over(monkeypatch):
    from diffusers.pipelines.ernie_image import pipeline_ernie_image as module

    def refuse(*args, **kwargs):
        raise AssertionError("the pipeline drew noise by itself")

    monkeypatch.setattr(module, "randn_tensor", refuse)
    pictures = LocalEngine(tiny_ernie()).render(requests(2, width=32, height=32, steps=1))
    assert [picture.size for picture in pictures] == [(32, 32)] * 2


@pytest.mark.parametrize("make", [tiny_flux, tiny_z_image])
def test_other_pipelines_draw_their_own(make):
    assert latents_for(make(), requests(1, width=32, height=32)) is None


def test_a_size_that_the_pipeline_refuses_is_left_to_it_to_refuse():
    with pytest.raises(ValueError, match="divisible by"):
        LocalEngine(tiny_ernie()).render(requests(1, width=33, height=32, steps=1))
