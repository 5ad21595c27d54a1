"""Arguments of the transformer's forward by size, without values: for working out what a step needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import Lumina2Transformer2DModel


def forward_inputs(
    transformer: Lumina2Transformer2DModel, rows: int, width: int, height: int, tokens: int
) -> dict[str, object]:
    """Return the arguments for `rows` pictures of `width` x `height` pixels and prompts of `tokens` tokens."""
    config, dtype = transformer.config, transformer.dtype
    pooled = config.get("pooled_projection_dim")  # of versions that know NewBie-image
    return {
        "hidden_states": torch.empty(rows, config.in_channels, height // 8, width // 8, dtype=dtype),
        "timestep": torch.empty(rows, dtype=dtype),
        "encoder_hidden_states": torch.empty(rows, tokens, config.cap_feat_dim, dtype=dtype),
        "encoder_attention_mask": torch.ones(rows, tokens, dtype=torch.bool),
        **({} if pooled is None else {"pooled_projections": torch.empty(rows, pooled, dtype=dtype)}),
        "return_dict": False,
    }
