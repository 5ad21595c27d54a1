"""Read what a pipeline's call returned: diffusers 0.38 gives other types for ERNIE-Image than later releases."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, cast

import numpy as np
import torch

from ernie_accel.core.errors import ErnieAccelError

#: Call arguments that only pipelines for video or sound have; those return no pictures.
_OF_OTHER_MEDIA = frozenset({"num_frames", "video_length", "audio_length_in_s", "audio_end_in_s", "audio_duration"})


class HasImages(Protocol):
    """What the call of a pipeline returns."""

    @property
    def images(self) -> object:
        """PIL pictures, a tensor or an array, as ``output_type`` says."""


def require_pictures(pipeline_class: type) -> None:
    """Refuse a pipeline that makes something other than pictures, before it is loaded or called.

    Raises:
        ErnieAccelError: It makes videos or sound.
    """
    found = sorted(_OF_OTHER_MEDIA.intersection(inspect.signature(pipeline_class.__call__).parameters))
    if found:
        raise ErnieAccelError(
            f"{pipeline_class.__name__} makes no pictures: its call takes {found[0]}, as those of videos and sound do. "
            "Name a pipeline whose call returns .images"
        )


def images_of(output: object) -> Any:
    """Return the pictures, or latents, of a pipeline's call.

    The pipeline of diffusers 0.38 returns bare latents for ``output_type="latent"``, and NumPy arrays [B, H, W, 3] for
    "pt". Both come out as later releases return them: the tensor, and tensors [B, 3, H, W].

    Args:
        output: What the call returned for "pt", "latent" or "pil"; not for "np".
    """
    images = output if isinstance(output, torch.Tensor) else cast(HasImages, output).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images
