"""Arguments of the transformer's forward by size, without values: for working out what a step needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ernie_accel.models.token_layout import remember_lengths

if TYPE_CHECKING:
    from diffusers import ErnieImageTransformer2DModel


def forward_inputs(
    transformer: ErnieImageTransformer2DModel, rows: int, width: int, height: int, tokens: int
) -> dict[str, object]:
    """Return the arguments for `rows` pictures of `width` x `height` pixels and prompts of `tokens` tokens."""
    config, dtype = transformer.config, transformer.dtype
    lengths = torch.tensor([tokens] * rows)
    remember_lengths(lengths, (tokens,) * rows)
    return {
        "hidden_states": torch.empty(rows, config.in_channels, height // 16, width // 16, dtype=dtype),
        "timestep": torch.empty(rows, dtype=dtype),
        "text_bth": torch.empty(rows, tokens, config.text_in_dim, dtype=dtype),
        "text_lens": lengths,
        "return_dict": False,
    }
