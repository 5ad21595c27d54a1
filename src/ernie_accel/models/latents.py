"""Encode pictures into the latents that a family's pipeline denoises, in the dtype in which it draws their noise."""

from __future__ import annotations

import torch

from ernie_accel.core.components import Pipeline

#: What `ErnieImagePipeline` adds to the variance when it decodes; the hub's config of the VAE has another value.
_EPSILON = 1e-5


def encode_patches(pipe: Pipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Return latents [B, C, H/16, W/16] of pictures [B, 3, H, W] in [-1, 1], for ``ErnieImagePipeline``.

    The inverse of how it decodes: 2 x 2 latents of the VAE become the channels of one, normalised by the VAE's batch
    norm.
    """
    vae = pipe.vae
    encoded: torch.Tensor = pipe._patchify_latents(_encoded(pipe, pictures))
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(encoded.device, torch.float32)
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1).to(encoded.device, torch.float32) + _EPSILON)
    latents: torch.Tensor = ((encoded.float() - mean) / deviation).to(pipe.transformer.dtype)
    return latents


def encode_in_float32(pipe: Pipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Return latents [B, C, H/8, W/8] of pictures [B, 3, H, W] in [-1, 1], for ``ZImagePipeline``."""
    return _scaled(pipe, pictures).float()


def encode_as_prompts(pipe: Pipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Return latents [B, C, H/8, W/8] of pictures [B, 3, H, W] in [-1, 1], for ``Lumina2Pipeline``.

    It draws noise in the dtype of its encoded prompts, which is that of the text encoder, if there is one.
    """
    encoder = getattr(pipe, "text_encoder", None)
    return _scaled(pipe, pictures).to((pipe.transformer if encoder is None else encoder).dtype)


def encode_as_transformer(pipe: Pipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Return latents [B, C, H/8, W/8] of pictures [B, 3, H, W] in [-1, 1], for NewBie-image's own pipeline."""
    return _scaled(pipe, pictures).to(pipe.transformer.dtype)


def _scaled(pipe: Pipeline, pictures: torch.Tensor) -> torch.Tensor:
    config = pipe.vae.config
    scaled: torch.Tensor = (_encoded(pipe, pictures) - (config.shift_factor or 0.0)) * config.scaling_factor
    return scaled


def _encoded(pipe: Pipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Return the most probable latents: a sample would take noise from the caller's generator."""
    with torch.no_grad():
        found: torch.Tensor = pipe.vae.encode(pictures.to(pipe.vae.dtype)).latent_dist.mode()
    return found
