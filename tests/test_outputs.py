"""What a pipeline returns is read alike, whichever release of diffusers made it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import torch
from PIL import Image

from ernie_accel.batch.engines import LocalEngine, Request
from ernie_accel.core.outputs import images_of


def test_tensors_and_pictures_stay_what_they_are():
    tensor, pictures = torch.rand(2, 3, 4, 5), [Image.new("RGB", (5, 4))]
    assert images_of(SimpleNamespace(images=tensor)) is tensor
    assert images_of(SimpleNamespace(images=pictures)) is pictures


def test_bare_latents_of_diffusers_0_38_are_the_latents():
    latents = torch.rand(1, 128, 4, 4)
    assert images_of(latents) is latents


def test_numpy_pictures_of_diffusers_0_38_become_tensors_with_channels_first():
    pictures = torch.rand(2, 3, 4, 5)
    output = SimpleNamespace(images=pictures.permute(0, 2, 3, 1).numpy())
    assert torch.equal(images_of(output), pictures)


class Returns038:
    """A pipeline that answers output_type="pt" as ERNIE-Image's of diffusers 0.38 does."""

    components: ClassVar[dict[str, object]] = {}

    def __call__(self, prompt, generator=None, output_type="pil", width=16, height=16):
        assert output_type == "pt"
        grey = torch.full((1, height, width, 3), 0.5)
        return SimpleNamespace(images=grey.numpy())


def test_a_batch_draws_with_a_pipeline_of_diffusers_0_38():
    (picture,) = LocalEngine(Returns038()).render([Request(prompt="a red circle", seed=0)])
    assert isinstance(picture, Image.Image)
    assert picture.size == (16, 16) and picture.getpixel((0, 0)) == (128, 128, 128)
