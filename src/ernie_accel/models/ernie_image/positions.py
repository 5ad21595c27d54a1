"""Where the tokens of an ERNIE-Image batch are, and how long its prompts are: computed once for all steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.models.token_layout import Prepared, remember_lengths


class Rows(NamedTuple):
    """What the rows of a batch are made of: an image, a prompt, padding.

    Attributes:
        grid: Height and width of the image in tokens.
        lengths: Tokens of each prompt.
        tokens: Tokens that each prompt is padded to.
        padding_input: What tells the blocks which tokens are padding; None only if nothing is padded.
    """

    grid: tuple[int, int]
    lengths: tuple[int, ...]
    tokens: int
    padding_input: Literal["mask", "lengths"] | None


@dataclass(frozen=True)
class Position(Prepared):
    """What depends on where tokens are: the last of each row are padding.

    Attributes:
        cos_bs1d: RoPE table [B, S, 1, D].
        sin_bs1d: Likewise.
        lengths_b: Real tokens of each row, int32; None if all are real, and blocks need no lengths.
        mask_b11s: True where a token is real [B, 1, 1, S]; None if all are, or if blocks use lengths.
    """

    cos_bs1d: Tensor
    sin_bs1d: Tensor
    lengths_b: Tensor | None
    mask_b11s: Tensor | None


def position(pos_embed: Callable[[Tensor], Tensor], rows: Rows, like: Tensor) -> Position:
    """Return the position tables, in the dtype and on the device of `like`.

    Args:
        pos_embed: Token positions [B, S, 3] -> angles [B, S, 1, D]; the model's own.
        rows: The rows of the batch.
        like: Any tensor of the right dtype and device.
    """
    (height, width), batch, device = rows.grid, len(rows.lengths), like.device
    lengths_b, text = torch.tensor(rows.lengths, device=device), torch.arange(rows.tokens, device=device)
    text_ids = F.pad(text.float()[:, None], (0, 2)).expand(batch, -1, -1)
    down, across = (torch.arange(size, device=device, dtype=torch.float32) for size in rows.grid)
    grid_ids = torch.stack(torch.meshgrid(down, across, indexing="ij"), -1).view(1, height * width, 2)
    offset = lengths_b.float().view(batch, 1, 1).expand(-1, height * width, -1)
    image_ids = torch.cat([offset, grid_ids.expand(batch, -1, -1)], -1)
    angles = pos_embed(torch.cat([image_ids, text_ids], 1))
    real_b, mask = (height * width + lengths_b).int(), None
    if rows.padding_input == "mask":
        mask = (torch.arange(height * width + rows.tokens, device=device) < real_b[:, None])[:, None, None]
    return Position(
        angles.cos().to(like.dtype), angles.sin().to(like.dtype), real_b if rows.padding_input else None, mask
    )


class RememberingPad(StandInMethod):
    """A pipeline's ``_pad_text`` that also keeps the prompt lengths, which it knows, on the host."""

    def __call__(self, text_hiddens: list[Tensor], *args: object, **kwargs: object) -> object:
        text_bth, text_lens = self.call_inner(text_hiddens, *args, **kwargs)
        remember_lengths(
            text_lens,
            tuple(hidden.squeeze(1).shape[0] if hidden.dim() == 3 else hidden.shape[0] for hidden in text_hiddens),
        )
        return text_bth, text_lens
