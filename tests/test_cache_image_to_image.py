"""Step caches in image to image, inpainting and ControlNet: pipelines that begin late, and ask for objects."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image

import ernie_accel
from ernie_accel import CacheSteps, SwapScheduler
from ernie_accel.transforms.denoiser.cache_steps.cache_steps import LEAST_STEPS
from tests.pipelines import randomize, tiny_z_image

IMAGE = Image.fromarray((np.random.RandomState(0).rand(64, 64, 3) * 255).astype("uint8"))
MASK = Image.fromarray((np.arange(64 * 64).reshape(64, 64) > 2048).astype("uint8") * 255)
BEGINS_LATE = (ZImageImg2ImgPipeline, ZImageInpaintPipeline)
CONTROLLED = (ZImageControlNetPipeline, ZImageControlNetInpaintPipeline)


def make(cls: type) -> Any:
    parts = dict(tiny_z_image().components)
    if cls in CONTROLLED:
        torch.manual_seed(0)
        channels = 4 if cls is ZImageControlNetPipeline else 9  # latents; with mask and masked image
        control = ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=channels,
            add_control_noise_refiner="control_layers",
            dim=96,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=2,
        )
        randomize(control)
        parts["controlnet"] = control.eval().requires_grad_(False)
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, *, steps: int = 24, strength: float = 1.0, **kwargs: Any) -> tuple[torch.Tensor, int]:
    """Return the final latents, and at how many evaluations the second block ran."""
    arguments: dict[str, Any] = {"prompt": "a red circle", "guidance_scale": 0.0, "height": 64, "width": 64}
    arguments |= {"num_inference_steps": steps, "output_type": "latent", "max_sequence_length": 48}
    arguments["generator"] = torch.Generator().manual_seed(1)
    arguments["image" if isinstance(pipe, BEGINS_LATE) else "control_image"] = IMAGE
    if isinstance(pipe, ZImageInpaintPipeline | ZImageControlNetInpaintPipeline):
        arguments |= {"image": IMAGE, "mask_image": MASK}
    if isinstance(pipe, BEGINS_LATE):
        arguments["strength"] = strength
    ran: list[int] = []
    hook = pipe.transformer.layers[1].register_forward_hook(lambda *_: ran.append(1))
    latents: torch.Tensor = pipe(**(arguments | kwargs)).images
    hook.remove()
    return latents, len(ran)


def db(a: torch.Tensor, b: torch.Tensor) -> float:
    return (20 * torch.log10(b.norm() / (a - b).norm())).item()


@pytest.mark.parametrize("cls", [*BEGINS_LATE, *CONTROLLED])
def test_it_computes_the_steps_it_says_and_comes_near(cls):
    pipe, cache = make(cls), CacheSteps()
    stock, computed = draw(pipe)
    assert computed == 24
    ernie_accel.optimize(pipe, cache)
    note = ernie_accel.report(pipe).entries[-1].applied.note
    assert note.startswith("computes 27 of 50 steps and forecasts the others")  # 50 are the pipeline's default
    assert ("at a strength below 1" in note) == (cls in BEGINS_LATE)
    latents, computed = draw(pipe)
    assert computed == sum(cache.computes(step, 24) for step in range(24)) < 18
    assert 20 < db(latents, stock) < 120  # random weights: their velocity changes more than a trained model's
    ernie_accel.restore(pipe)
    again, computed = draw(pipe)
    assert computed == 24
    assert torch.equal(again, stock)


@pytest.mark.parametrize("cls", BEGINS_LATE)
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize(("steps", "strength"), [(40, 0.6), (24, 0.6), (30, 0.1)])
def test_only_the_steps_that_a_strength_leaves_count(cls, sampler, steps, strength):
    pipe, cache = make(cls), CacheSteps()
    ernie_accel.optimize(pipe, SwapScheduler(sampler))
    stock, _ = draw(pipe, steps=steps, strength=strength)
    ernie_accel.optimize(pipe, SwapScheduler(sampler), cache)
    latents, computed = draw(pipe, steps=steps, strength=strength)
    left, order = steps - int(steps - steps * strength), pipe.scheduler.order
    evaluations = [step for step in range(left) for _ in range(order if step < left - 1 else 1)]
    assert computed == sum(cache.computes(step, left) for step in evaluations)
    assert torch.equal(latents, stock) if left < LEAST_STEPS else 15 < db(latents, stock) < 120


@pytest.mark.parametrize("cls", BEGINS_LATE)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_what_changes_evenly_is_forecast_exactly(cls, strength):
    """A stand-in for the transformer whose output is a line over the noise level: a wrong level would bend it."""
    pipe = make(cls)

    def forward(x, t, *args, **kwargs):
        lines = [torch.full_like(one, 0.3 + 0.1 * i) - 0.4 * t.flatten()[i] for i, one in enumerate(x)]
        return Transformer2DModelOutput(sample=lines)

    forward.__signature__ = inspect.signature(pipe.transformer.forward)
    pipe.transformer.forward = forward
    stock, _ = draw(pipe, steps=40, strength=strength)
    ernie_accel.optimize(pipe, CacheSteps(3))
    latents, _ = draw(pipe, steps=40, strength=strength)
    assert db(latents, stock) > 100


@pytest.mark.parametrize("backend", ["diffusers", "cache-dit"])
@pytest.mark.parametrize("cls", [*BEGINS_LATE, *CONTROLLED])
def test_caches_of_blocks_skip_too_or_are_refused(cls, backend, monkeypatch):
    pipe = make(cls)
    if cls in CONTROLLED:
        with pytest.raises(ernie_accel.ErnieAccelError, match="ControlNet adds to the output of single blocks"):
            ernie_accel.optimize(pipe, CacheSteps(backend=backend))
        return
    monkeypatch.setattr("ernie_accel.transforms.denoiser.cache_steps.blocks.MOST_THRESHOLD", 9.0)
    stock, _ = draw(pipe, strength=0.9)
    ernie_accel.optimize(pipe, CacheSteps(backend=backend, threshold=9.0))
    latents, computed = draw(pipe, strength=0.9)
    # 22 steps: the first three and the last are computed, and of the others every second or none.
    assert computed == {"cache-dit": 13, "diffusers": 4}[backend]
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, stock)
    few, computed = draw(pipe, strength=0.5)
    assert computed == 12
    ernie_accel.restore(pipe)
    assert torch.equal(few, draw(pipe, strength=0.5)[0])


def test_a_call_after_one_that_began_late_counts_from_its_own_start():
    pipe, cache = make(ZImageImg2ImgPipeline), CacheSteps()
    ernie_accel.optimize(pipe, cache)
    whole, computed = draw(pipe, strength=1.0)
    draw(pipe, steps=40, strength=0.6)
    again, as_often = draw(pipe, strength=1.0)
    assert (computed, torch.equal(whole, again)) == (as_often, True)


def test_a_forecast_is_an_object_of_the_class_that_was_asked_for():
    pipe = make(ZImageImg2ImgPipeline)
    ernie_accel.optimize(pipe, CacheSteps())
    outputs: list[object] = []
    pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output))
    _, computed = draw(pipe)
    assert computed < len(outputs)
    assert {type(output) for output in outputs} == {Transformer2DModelOutput}
