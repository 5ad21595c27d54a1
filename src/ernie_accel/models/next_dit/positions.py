"""Where the tokens of a batch are: image first, then text, then padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_accel.models.token_layout import PaddingRule, Prepared


class Rows(NamedTuple):
    """What the rows of a batch are made of.

    Attributes:
        grid: The image in tokens: height and width, or frames, height and width.
        image_tokens: Tokens of an image.
        lengths: Tokens of each prompt.
        tokens: Tokens that each prompt is padded to.
        rule: How they are padded.
        passes_lengths: Whether blocks get lengths in place of a mask.
    """

    grid: tuple[int, ...]
    image_tokens: int
    lengths: tuple[int, ...]
    tokens: int
    rule: PaddingRule
    passes_lengths: bool

    @classmethod
    def of(
        cls,
        grid: tuple[int, ...],
        image_tokens: int,
        lengths: tuple[int, ...],
        tokens: int,
        rule: PaddingRule,
        *,
        for_graph: bool,
    ) -> Rows:
        """Return the rows whose prompts are padded to at least `tokens`, as `rule` requires.

        With `for_graph`, blocks that use lengths get them even if nothing is padded, so that padded batches can replay
        the same graph.
        """
        tokens += -(image_tokens + tokens) % rule.multiple_of
        is_padded = any(length != tokens for length in lengths)
        takes = rule.padding_input == "lengths"
        return cls(grid, image_tokens, lengths, tokens, rule, takes and (is_padded or for_graph or rule.always_lengths))

    @property
    def passes_masks(self) -> bool:
        """Whether blocks get masks."""
        return not self.passes_lengths and any(length != self.tokens for length in self.lengths)


@dataclass(frozen=True)
class Position(Prepared):
    """What depends on where tokens are.

    A RoPE table is complex [B, S, D / 2] as stock diffusers makes it, or the real and the imaginary part of that in
    float32 [2, B, S, 1, D / 2].

    Attributes:
        rope_image: Of the image tokens.
        rope_text: Of the text tokens.
        rope: Of all tokens.
        text_mask: True where a text token is real [B, 1, 1, T]; None if all are, or if blocks use lengths.
        mask: The same of all tokens [B, 1, 1, S].
        text_lengths: Real text tokens of each row, int32 [B]; None if all are real, and blocks need no lengths.
        lengths: The same of all tokens.
        image_pads: True where an image token only fills up [S]; None if none does. Blocks see it.
        text_pads: The same of the text [B, T].
        order: For blocks that see the tokens in another order: which token is at each place [B, S].
        image_at: Where the image tokens are then [B, I].
        time_rates: Rates [F / 2] of the sinusoids that embed the time, for code that makes them on the host.
    """

    rope_image: Tensor
    rope_text: Tensor
    rope: Tensor
    text_mask: Tensor | None = None
    mask: Tensor | None = None
    text_lengths: Tensor | None = None
    lengths: Tensor | None = None
    image_pads: Tensor | None = None
    text_pads: Tensor | None = None
    order: Tensor | None = None
    image_at: Tensor | None = None
    time_rates: Tensor | None = None


def table(freqs_bsp: Tensor) -> Tensor:
    """Return complex rotations as blocks take them: on the CPU as they are, so that no bit of a picture differs.

    Elsewhere in real numbers, which can be compiled, and in float32 (Lumina 2 computes them in float64).
    """
    return freqs_bsp if freqs_bsp.device.type == "cpu" else real(freqs_bsp)


def real(freqs_bsp: Tensor) -> Tensor:
    """Return complex rotations [B, S, P] as real and imaginary part [2, B, S, 1, P] in float32."""
    return torch.stack((freqs_bsp.real, freqs_bsp.imag)).float()[:, :, :, None]


def padding(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """Return masks or lengths, by the names that they have in `Position`."""
    if not rows.passes_lengths and not rows.passes_masks:
        return {}
    text_b = torch.tensor(rows.lengths, device=device)
    all_b = rows.image_tokens + text_b
    if rows.passes_lengths:
        return {"text_lengths": text_b.int(), "lengths": all_b.int()}
    return {
        "text_mask": _real_mask(rows.tokens, text_b),
        "mask": _real_mask(rows.image_tokens + rows.tokens, all_b),
    }


def _real_mask(tokens: int, lengths_b: Tensor) -> Tensor:
    """Return which of so many tokens are real: bool [B, 1, 1, S]."""
    return (torch.arange(tokens, device=lengths_b.device) < lengths_b[:, None])[:, None, None]
