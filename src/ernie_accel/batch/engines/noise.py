"""Draw the noise that an ERNIE-Image pipeline would draw for a batch, without what makes the device wait for it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ernie_accel.batch.engines.base import Request

if TYPE_CHECKING:
    from ernie_accel.core.components import CallablePipeline


def latents_for(pipe: CallablePipeline, requests: Sequence[Request]) -> object:
    """Return the first latents [B, C, H / 16, W / 16] of requests alike in size, each from its own seed.

    The pipeline draws the same numbers by itself. But it joins the rows in a parallel region, which waits for cores
    that encode PNG, and copies them in a way that waits for the device.

    Returns:
        A tensor on the pipe's device, or None for a pipeline of another class, whose noise nobody knows here.
    """
    import torch

    if not any(cls.__name__ == "ErnieImagePipeline" for cls in type(pipe).__mro__):
        return None
    defaults = {name: parameter.default for name, parameter in inspect.signature(pipe).parameters.items()}
    height, width = (getattr(requests[0], side) or defaults[side] for side in ("height", "width"))
    scale, device = pipe.vae_scale_factor, pipe._execution_device
    if height % scale or width % scale:
        return None  # the pipeline's own error says what is wrong
    shape = (len(requests), pipe.transformer.config.in_channels, height // scale, width // scale)
    latents_bchw = torch.empty(shape, dtype=pipe.transformer.dtype, pin_memory=device.type == "cuda")
    for row, request in zip(latents_bchw, requests, strict=True):
        row.normal_(generator=torch.Generator("cpu").manual_seed(request.seed))
    return latents_bchw.to(device, non_blocking=True)
