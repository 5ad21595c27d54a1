"""Read what a pipeline's call returned: diffusers 0.38 gives other types for ERNIE-Image than later releases."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def images_of(output: Any) -> Any:
    """Return the pictures, or latents, of a pipeline's call.

    The pipeline of diffusers 0.38 returns bare latents for ``output_type="latent"``, and NumPy arrays [B, H, W, 3] for
    "pt". Both come out as later releases return them: the tensor, and tensors [B, 3, H, W].

    Args:
        output: What the call returned for "pt", "latent" or "pil"; not for "np".
    """
    images = output if isinstance(output, torch.Tensor) else output.images
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images
