"""Tiny pipelines of all that diffusers draws with Z-Image, and what their calls need beside a prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from tests.pipelines import randomize, tiny_z_image


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
#: How to make a pipeline, by its class, and further arguments of its calls.
Z_IMAGE_PIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
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
}
