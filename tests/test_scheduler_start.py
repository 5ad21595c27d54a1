"""Image to image starts where stock starts, whatever a step costs; and pipelines with other steps are refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)
from PIL import Image

import ernie_accel
from ernie_accel import CheckFinite, SwapScheduler
from tests import pipelines

TWICE = ("heun", "dpmpp_sde")
NOISE = np.random.RandomState(0).rand(64, 64, 3) * 255
IMAGE = Image.fromarray(NOISE.astype("uint8"))
MASK = Image.fromarray((np.arange(64 * 64).reshape(64, 64) > 2048).astype("uint8") * 255)


def z_image(cls: type) -> Any:
    return _quiet(cls(**pipelines.tiny_z_image().components))


def flux(cls: type) -> Any:
    return _quiet(cls(**pipelines.tiny_flux().components))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timesteps_of(pipe: Any, strength: float, steps: int = 8) -> tuple[list[float], torch.Tensor]:
    """Return the timestep of every evaluation, and the final latents."""
    seen: list[float] = []

    def note(module, args, kwargs):
        given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        seen.append(round(float(given.flatten()[0]), 4))

    arguments: dict[str, Any] = {"image": IMAGE, "strength": strength, "num_inference_steps": steps}
    arguments |= {"output_type": "latent", "generator": torch.Generator().manual_seed(1)}
    if "Inpaint" in type(pipe).__name__:
        arguments["mask_image"] = MASK
    if "Flux" in type(pipe).__name__:
        given = torch.Generator().manual_seed(7)
        arguments["prompt_embeds"] = torch.randn(1, 5, 32, generator=given)
        arguments["pooled_prompt_embeds"] = torch.randn(1, 32, generator=given)
    else:
        arguments |= {"prompt": "a red circle", "guidance_scale": 0.0}
    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    latents = pipe(height=64, width=64, **arguments).images
    handle.remove()
    return seen, latents


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.6, 1.0])
@pytest.mark.parametrize(
    ("make", "cls"),
    [
        (z_image, ZImageImg2ImgPipeline),
        (z_image, ZImageInpaintPipeline),
        (flux, FluxImg2ImgPipeline),
        (flux, FluxInpaintPipeline),
    ],
)
def test_it_starts_where_stock_starts(make, cls, strength, name):
    stock, _ = timesteps_of(make(cls), strength)
    pipe = ernie_accel.optimize(make(cls), SwapScheduler(name))
    found, latents = timesteps_of(pipe, strength)
    assert found[0] == stock[0]
    assert len(found) == 2 * len(stock) - 1
    assert found[-1] == stock[-1]
    assert torch.isfinite(latents).all()
    if strength == 0.5:
        assert timesteps_of(copy.deepcopy(pipe), strength)[0] == found
        assert timesteps_of(ernie_accel.restore(pipe), strength)[0] == stock


def test_a_pipe_that_only_shares_the_scheduler_is_refused_until_it_is_optimized_itself():
    first = ernie_accel.optimize(pipelines.tiny_z_image(), SwapScheduler("heun"))
    second = _quiet(ZImageImg2ImgPipeline(**first.components))
    with pytest.raises(ernie_accel.ErnieAccelError, match="Optimize this pipe itself"):
        timesteps_of(second, 0.6)
    assert len(timesteps_of(second, 1.0)[0]) == 15
    ernie_accel.restore(first)
    second = _quiet(ZImageImg2ImgPipeline(**first.components))
    assert len(timesteps_of(second, 0.6)[0]) == 5


class PerToken(ZImagePipeline):
    """Steps each token from a noise level of its own, as LTX's and SANA's video pipelines do."""

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        self.scheduler.set_timesteps(2)
        levels = self.scheduler.timesteps[0].repeat(latents.shape[:2])
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(latents, t, latents, per_token_timesteps=levels, return_dict=False)[0]
        return latents


def test_a_pipeline_with_a_noise_level_a_token_keeps_euler():
    pipe = PerToken(**pipelines.tiny_z_image().components)
    with pytest.raises(ernie_accel.UnsupportedError, match=r"a noise level of its own \(per_token_timesteps\)"):
        ernie_accel.optimize(pipe, SwapScheduler("unipc"))
    ernie_accel.optimize(pipe, SwapScheduler("euler", shift=5.0))
    assert pipe(torch.ones(1, 4, 2)).shape == (1, 4, 2)
    other = ernie_accel.optimize(pipelines.tiny_z_image(), SwapScheduler("unipc"))
    pipe.scheduler = other.scheduler
    with pytest.raises(ernie_accel.ErnieAccelError, match="only the stock step knows"):
        pipe(torch.ones(1, 4, 2))


def test_pipelines_of_diffusers_are_told_apart_by_their_code():
    from diffusers import LTXConditionPipeline, LTXPipeline

    from ernie_accel.transforms.scheduler.swap_scheduler import _passes

    assert [_passes(object.__new__(cls), "per_token_timesteps") for cls in (LTXConditionPipeline, LTXPipeline)] == [
        True,
        False,
    ]


def test_the_replaced_step_takes_all_that_stock_takes():
    from inspect import signature

    scheduler = ernie_accel.optimize(pipelines.tiny_z_image(), SwapScheduler("unipc")).scheduler
    assert list(signature(scheduler.step).parameters) == list(signature(type(scheduler).step).parameters)[1:]


def test_heun_in_image_to_image_goes_with_other_wrappers():
    pipe = ernie_accel.optimize(z_image(ZImageImg2ImgPipeline), SwapScheduler("heun"), CheckFinite())
    assert len(timesteps_of(pipe, 0.6)[0]) == 9
