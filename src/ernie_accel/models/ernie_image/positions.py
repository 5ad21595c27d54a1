"""Where the tokens of an ERNIE-Image batch are, and how long its prompts are: computed once for all steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ernie_accel.common.notes import Note
from ernie_accel.core.captured import version_of
from ernie_accel.core.stand_in import StandInMethod


class PaddingRule(NamedTuple):
    """How a transformer pads its rows of tokens, and how its blocks learn which tokens are padding.

    Attributes:
        multiple_of: The number of tokens is rounded up to a multiple of this.
        padding_input: "mask" gives the blocks a mask and the lengths; "lengths" gives only the lengths, for models
            in which every block uses these.
        always_lengths: Pass lengths even if nothing is padded, so that padded and unpadded batches share a graph.
    """

    multiple_of: int = 1
    padding_input: Literal["mask", "lengths"] = "mask"
    always_lengths: bool = False


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
class Position:
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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them that there are."""
        return tuple(tensor for tensor in vars(self).values() if tensor is not None)

    def clone(self) -> Position:
        """Return a copy that shares no memory."""
        lengths, mask = (None if tensor is None else tensor.clone() for tensor in (self.lengths_b, self.mask_b11s))
        return Position(self.cos_bs1d.clone(), self.sin_bs1d.clone(), lengths, mask)


class Positions:
    """Positions of the last few image sizes and prompt lengths, so that a picture's steps share one computation."""

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._known: OrderedDict[tuple[object, ...], Position] = OrderedDict()

    def get(self, pos_embed: Callable[[Tensor], Tensor], rows: Rows, like: Tensor) -> Position:
        """Return the position tables, in the dtype and on the device of `like`.

        Args:
            pos_embed: Token positions [B, S, 3] -> angles [B, S, 1, D]; the model's own.
            rows: The rows of the batch.
            like: Any tensor of the right dtype and device.
        """
        key = (rows, like.device, like.dtype)
        found = self._known.pop(key, None)  # another thread may draw with the transformer: each look is one operation
        if found is None:
            found = _position(pos_embed, rows, like)
        self._known[key] = found  # the last one used is the last
        if len(self._known) > self._keep:
            self._known.popitem(last=False)
        return found


def _position(pos_embed: Callable[[Tensor], Tensor], rows: Rows, like: Tensor) -> Position:
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


class TokenLayout:
    """How a rewritten transformer lays out the tokens of a batch.

    Attributes:
        positions: Those of the last batches.
        padding_rule: Returns the rule for the attention that the blocks use now; by default, that of stock.
    """

    def __init__(self) -> None:
        self.positions = Positions()
        self.padding_rule: Callable[[], PaddingRule] = PaddingRule


LAYOUT = Note("token_layout", TokenLayout, "transformer", "positions and padding of its batches, once it is rewritten")


class PromptLengths(NamedTuple):
    """The values of a tensor of prompt lengths, on the host.

    Attributes:
        version: Of the tensor, when it had these (see `version_of`).
        lengths: Its values.
    """

    version: int | None
    lengths: tuple[int, ...]


PROMPT_LENGTHS = Note("prompt_lengths", PromptLengths, "tensor", "its values, as they are on the host")


def prompt_lengths(text_lens: Tensor) -> tuple[int, ...]:
    """Return the prompt lengths [B] on the host, reading the device at most once per tensor.

    What was read is kept on the tensor, so a picture costs one synchronisation, and none at all if the pipeline's
    ``_pad_text``, which knows the lengths, has called `remember_lengths`.
    """
    known = PROMPT_LENGTHS.of(text_lens)
    if known is None or known.version != version_of(text_lens):
        known = remember_lengths(text_lens, tuple(text_lens.tolist()))
    return known.lengths


def remember_lengths(text_lens: Tensor, lengths: tuple[int, ...]) -> PromptLengths:
    """Keep the values of `text_lens` [B], as they are on the host, on the tensor itself; return what is kept."""
    kept = PromptLengths(version_of(text_lens), lengths)
    PROMPT_LENGTHS.put(text_lens, kept)
    return kept


class RememberingPad(StandInMethod):
    """A pipeline's ``_pad_text`` that also keeps the prompt lengths, which it knows, on the host."""

    def __call__(self, text_hiddens: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        text_bth, text_lens = self.call_below(text_hiddens, *args, **kwargs)
        remember_lengths(
            text_lens,
            tuple(hidden.squeeze(1).shape[0] if hidden.dim() == 3 else hidden.shape[0] for hidden in text_hiddens),
        )
        return text_bth, text_lens
