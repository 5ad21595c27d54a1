"""LoRAs where a ControlNet runs blocks of the transformer, earlier in each step than the transformer itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import ernie_accel
from ernie_accel import Compile, RewriteBlocks, Transform
from tests.examples import differences, snapshot
from tests.pipelines import picture
from tests.test_fuse_kernels import sqnr_db
from tests.test_lora import load
from tests.z_image_pipes import Z_IMAGE_PIPES

pytestmark = pytest.mark.usefixtures("traced_only")
MAKE, CALL = Z_IMAGE_PIPES["ZImageControlNetPipeline"]
REQUESTS: dict[str, tuple[Transform, ...]] = {"stock": (Compile(),), "rewritten": (RewriteBlocks(), Compile())}
#: SQNR in dB that one and the same thing has in float32.
FLOOR = 70


def latents(pipe: Any) -> torch.Tensor:
    return picture(pipe, output_type="latent", steps=2, **CALL)


def in_place(pipe: Any) -> None:
    """Write other values into the adapter of a refiner, which only the ControlNet runs first."""
    for path, weight in pipe.transformer.named_parameters():
        if "noise_refiner" in path and "lora_B" in path:
            with torch.no_grad():
                weight.mul_(-2)


CHANGES: dict[str, Callable[[Any], object]] = {
    "scale": lambda pipe: pipe.set_adapters(["a"], [-0.5]),
    "in place": in_place,
    "disable": lambda pipe: pipe.disable_lora(),
    "enable": lambda pipe: pipe.enable_lora(),
    "load": lambda pipe: load(pipe, "z_image", "b", seed=2),
    "fuse": lambda pipe: pipe.fuse_lora(lora_scale=0.8),
    "unfuse": lambda pipe: pipe.unfuse_lora(),
    "unload": lambda pipe: pipe.unload_lora_weights(),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_controlnet_sees_each_change_in_the_first_step(request_: str) -> None:
    stock, pipe = MAKE(), ernie_accel.optimize(MAKE(), *REQUESTS[request_])
    seen = [latents(stock)]
    for each in (stock, pipe):
        load(each, "z_image")
    latents(pipe)
    for name, change in CHANGES.items():
        change(stock)
        change(pipe)
        seen.append(latents(stock))
        assert sqnr_db(latents(pipe), seen[-1]) > FLOOR, name
        assert name in ("fuse", "unfuse") or sqnr_db(seen[-1], seen[-2]) < 40, name


@pytest.mark.parametrize("request_", REQUESTS)
def test_one_that_is_put_beside_an_optimized_transformer_sees_them_too(request_: str) -> None:
    stock, net = MAKE(), MAKE().controlnet
    parts = {name: part for name, part in MAKE().components.items() if name != "controlnet"}
    first = ernie_accel.optimize(diffusers.ZImagePipeline(**parts), *REQUESTS[request_])
    pipe = diffusers.ZImageControlNetPipeline(**first.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    for each in (stock, first):
        load(each, "z_image")
    assert sqnr_db(latents(pipe), latents(stock)) > FLOOR
    for each in (stock, first):
        each.set_adapters(["a"], [-0.5])
    assert sqnr_db(latents(pipe), latents(stock)) > FLOOR


def test_a_copy_of_the_controlnet_leaves_the_transformer_behind_and_restore_nothing() -> None:
    pipe = MAKE()
    load(pipe, "z_image")
    latents(pipe)
    before = snapshot(pipe)
    size = len(pickle.dumps(pipe.controlnet))
    ernie_accel.optimize(pipe, Compile())
    transformer = pipe.transformer
    assert len(pickle.dumps(pipe.controlnet)) < size * 1.1
    copied = copy.deepcopy(pipe.controlnet)
    assert not any(each is transformer or type(each) is type(transformer) for each in copied.modules())
    again = copy.deepcopy(pipe)
    again.set_adapters(["a"], [-0.5])
    expected = latents(again)
    pipe.set_adapters(["a"], [-0.5])
    assert sqnr_db(latents(pipe), expected) > FLOOR
    pipe.set_adapters(["a"], [1.0])
    assert not differences(before, snapshot(ernie_accel.restore(pipe)))
