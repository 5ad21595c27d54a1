"""Arguments of the transformer's forward by size, without values: for working out what a step needs."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ernie_accel.models.newbie.blocks import OwnTransformer


def forward_inputs(transformer: nn.Module, rows: int, width: int, height: int, tokens: int) -> dict[str, object]:
    """Return the arguments for `rows` pictures of `width` x `height` pixels and prompts of `tokens` tokens."""
    own = cast(OwnTransformer, transformer)
    dtype = own.x_embedder.weight.dtype
    embeds = (own.cap_embedder[1], own.clip_text_pooled_proj[1])
    text_width, pooled_width = (cast(nn.Linear, embed).in_features for embed in embeds)
    return {
        "x": torch.empty(rows, own.in_channels, height // 8, width // 8, dtype=dtype),
        "t": torch.empty(rows, dtype=dtype),
        "cap_feats": torch.empty(rows, tokens, text_width, dtype=dtype),
        "cap_mask": torch.ones(rows, tokens, dtype=torch.long),
        "clip_text_pooled": torch.empty(rows, pooled_width, dtype=dtype),
    }
