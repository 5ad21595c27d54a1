"""Arguments of the transformer's forward by size, without values: for working out what a step needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel


def forward_inputs(
    transformer: ZImageTransformer2DModel, rows: int, width: int, height: int, tokens: int
) -> dict[str, object]:
    """Return the arguments for `rows` pictures of `width` x `height` pixels and prompts of `tokens` tokens."""
    config, dtype = transformer.config, transformer.dtype
    latents = [torch.empty(config.in_channels, 1, height // 8, width // 8, dtype=dtype) for _ in range(rows)]
    captions = [torch.empty(tokens, config.cap_feat_dim, dtype=dtype) for _ in range(rows)]
    return {"x": latents, "t": torch.empty(rows, dtype=dtype), "cap_feats": captions, "return_dict": False}
