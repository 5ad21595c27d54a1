"""Draw the noise of stochastic samplers so that the pipeline's ``generator`` decides all of it, row by row."""

from __future__ import annotations

import hashlib

import torch


class RowNoise:
    """Standard normal noise, seeded by the first latents of a run, separately for each picture of a batch.

    Pipelines pass no generator to ``step``, so stock stochastic sampling draws from the global one. But the first
    latents were drawn from the pipeline's generator, so hashing them carries its seed over. Only their signs are
    hashed, because signs survive a cast: a bfloat16 run gets the same noise as a float32 one.
    """

    def __init__(self, first_latents: torch.Tensor) -> None:
        """Take the latents [B, ...] that a run starts from, any floating dtype and device."""
        self._rows = [_digest(row) for row in first_latents]
        self._drawn = 0

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Return the next noise, of the shape, dtype and device of `like` [B, ...]."""
        rows = [torch.randn(like.shape[1:], generator=self._generator(row), dtype=like.dtype) for row in self._rows]
        self._drawn += 1
        return torch.stack(rows).to(like.device)

    def _generator(self, row: bytes) -> torch.Generator:
        seed = hashlib.sha256(row + self._drawn.to_bytes(4, "little")).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)


class GivenNoise:
    """Standard normal noise from the generator that a caller passes to ``step``, as stock draws it."""

    def __init__(self, generator: torch.Generator | list[torch.Generator]) -> None:
        self._generator = generator

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Return the next noise, of the shape, dtype and device of `like` [B, ...]."""
        from diffusers.utils.torch_utils import randn_tensor

        noise: torch.Tensor = randn_tensor(like.shape, generator=self._generator, device=like.device, dtype=like.dtype)
        return noise


def _digest(latents: torch.Tensor) -> bytes:
    signs = (latents.detach() > 0).flatten().to("cpu", torch.uint8)
    return hashlib.sha256(signs.numpy().tobytes()).digest()
