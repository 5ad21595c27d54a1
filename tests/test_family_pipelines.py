"""diffusers' pipelines of Z-Image and Lumina 2, and NewBie-image by its shape: presets draw what stock draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import ernie_accel
from ernie_accel import Context
from ernie_accel.core.transform import ROUNDING_REL
from ernie_accel.kernels.linear import Fp8Linear
from tests.examples import EXAMPLES
from tests.own_newbie import tiny_own_newbie
from tests.pipelines import PIPELINES, picture, randomize, tiny_lumina2, tiny_newbie, tiny_z_image
from tests.test_families import check_contract
from tests.test_fuse_kernels import sqnr_db

H200 = Context("cuda", "NVIDIA H200", (9, 0))
WITH_CUDNN = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})


def z_image_of(cls: str, **more: Any) -> Any:
    return quiet(getattr(diffusers, cls)(**tiny_z_image().components, **more))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlled(cls: str) -> Any:
    """A ControlNet shares the embedders and refiners of the transformer."""
    torch.manual_seed(0)
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=4 if cls == "ZImageControlNetPipeline" else 9,
        dim=96,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
    )
    randomize(net, seed=2)
    return z_image_of(cls, controlnet=net.eval().requires_grad_(False))


def omni() -> Any:
    """It has a vision encoder, which a third refiner of the transformer reads; diffusers runs it in bfloat16 alone."""
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    parts = dict(tiny_z_image().components)
    config = {name: x for name, x in parts["transformer"].config.items() if not name.startswith("_")}
    parts["transformer"] = diffusers.ZImageTransformer2DModel(**config | {"siglip_feat_dim": 32})
    eye = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_patches=16,
            patch_size=4,
        )
    )
    for part in (parts["transformer"], eye):
        randomize(part)
        part.eval().requires_grad_(False)
    sees = Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    return in_dtype(quiet(diffusers.ZImageOmniPipeline(**parts, siglip=eye, siglip_processor=sees)), torch.bfloat16)


def in_dtype(pipe: Any, dtype: torch.dtype) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    return pipe


def drawing(size: int = 64) -> Image.Image:
    values = np.arange(size * size * 3, dtype=np.uint32) * 37 % 251
    return Image.fromarray(values.astype(np.uint8).reshape(size, size, 3))


IMAGE, MASK = drawing(), drawing().convert("L")
PIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "ZImagePipeline": (tiny_z_image, {}),
    "ZImageImg2ImgPipeline": (functools.partial(z_image_of, "ZImageImg2ImgPipeline"), {"image": IMAGE}),
    "ZImageInpaintPipeline": (
        functools.partial(z_image_of, "ZImageInpaintPipeline"),
        {"image": IMAGE, "mask_image": MASK},
    ),
    "ZImageControlNetPipeline": (functools.partial(controlled, "ZImageControlNetPipeline"), {"control_image": IMAGE}),
    "ZImageControlNetInpaintPipeline": (
        functools.partial(controlled, "ZImageControlNetInpaintPipeline"),
        {"control_image": IMAGE, "image": IMAGE, "mask_image": MASK},
    ),
    "ZImageOmniPipeline": (omni, {"image": [IMAGE]}),
    "Lumina2Pipeline": (tiny_lumina2, {}),
    "NewBie-image": (tiny_newbie, {}),
    "NewbiePipeline": (tiny_own_newbie, {}),
}


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    return picture(pipe, steps=2, guidance_scale=3.0, output_type="latent", **call)


def requests() -> Iterator[tuple[str, str]]:
    for name in PIPES:
        yield from ((name, "exact"), (name, "turbo-fp32"))
        yield name, "turbo-bf16" if name.startswith("ZImage") else "quality-bf16"


@pytest.mark.parametrize(("name", "preset"), requests())
def test_a_preset_draws_what_stock_draws(name: str, preset: str) -> None:
    make, call = PIPES[name]
    pipe = make()
    dtype = torch.bfloat16 if preset.endswith("bf16") else pipe.transformer.dtype
    before, expected = latents(pipe, call), latents(in_dtype(make(), dtype), call)
    with torch.compiler.set_stance("force_eager"):  # what is compiled is tested elsewhere, and takes long
        ernie_accel.optimize(
            pipe, preset=preset, context=H200 if preset == "exact" else None, on_unsupported="skip", memory=None
        )
        got = latents(pipe, call)
    statuses = {entry.step.transform.slot: entry.applied for entry in ernie_accel.report(pipe).entries}
    if preset != "exact" and name != "NewBie-image":
        assert statuses["blocks"] is not None
    if preset == "exact":
        assert torch.equal(got, expected)
    assert (got - expected).norm() <= ROUNDING_REL[str(dtype).removeprefix("torch.")] * expected.norm()
    assert torch.equal(latents(ernie_accel.restore(pipe), call), before)


@pytest.mark.parametrize("name", [name for name in PIPES if name != "NewBie-image"])
def test_fp8_on_the_kernels_keeps_its_floor(name: str) -> None:
    """By the kernels' twins; the guided ones draw both halves."""
    make, call = PIPES[name]
    pipe = in_dtype(make(), torch.bfloat16)
    expected, fuse = latents(pipe, call), ernie_accel.FuseKernels("fp8")
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), fuse, context=WITH_CUDNN)
    assert any(isinstance(part, Fp8Linear) for part in pipe.transformer.modules())
    got = latents(pipe, call)
    assert fuse.floor_db is not None
    assert sqnr_db(got, expected) > fuse.floor_db
    assert torch.equal(latents(ernie_accel.restore(pipe), call), expected)


@pytest.mark.parametrize("transform", EXAMPLES, ids=repr)
@pytest.mark.parametrize("name", [name for name, (make, _) in PIPES.items() if make not in PIPELINES.values()])
def test_every_transform_on_every_pipeline_is_undone_bit_for_bit_or_refuses(name: str, transform: Any) -> None:
    make, call = PIPES[name]
    check_contract(make(), transform, found=("a ControlNet", "weights are bfloat16"), **call)
