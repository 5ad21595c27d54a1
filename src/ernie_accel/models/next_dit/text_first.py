"""What transformers share whose rows are a prompt, then its image: Lumina 2, and NewBie-image's own code.

On fused kernels the image comes before the text, so that padding is at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.models.next_dit.blocks import run_blocks
from ernie_accel.models.next_dit.positions import Position, Rows, padding, table
from ernie_accel.models.next_dit.time_rates import rates_of
from ernie_accel.models.token_layout import LAYOUT


class TextFirst(Protocol):
    """Such a transformer as a type checker sees it."""

    out_channels: int
    x_embedder: nn.Module
    noise_refiner: nn.ModuleList
    context_refiner: nn.ModuleList
    layers: nn.ModuleList


def predicted(
    model: TextFirst,
    x_bchw: Tensor,
    patch: int,
    text_bth: Tensor,
    time_be: Tensor,
    at: Position,
    last: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the prediction [B, C, height, width].

    Args:
        model: With rewritten blocks.
        x_bchw: Latents.
        patch: Height and width of a token, in latents.
        text_bth: Embedded text.
        time_be: Embedded time.
        at: Positions.
        last: Makes [B, S, patch * patch * C] of hidden states and the embedded time.
    """
    batch, channels, height, width = x_bchw.shape
    rows, columns = height // patch, width // patch
    patches = x_bchw.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    x_bsh = model.x_embedder(patches.reshape(batch, rows * columns, -1))
    text_bth = run_blocks(model.context_refiner, text_bth, at.text_mask, at.rope_text, lengths_b=at.text_lengths)
    if at.text_pads is not None:
        text_bth = text_bth.masked_fill(at.text_pads[:, :, None], 0.0)
    x_bsh = run_blocks(model.noise_refiner, x_bsh, None, at.rope_image, time_be)

    x_bsh = torch.cat([x_bsh, text_bth], 1)
    if at.order is not None:
        x_bsh = _picked(x_bsh, at.order)
    x_bsh = run_blocks(model.layers, x_bsh, at.mask, at.rope, time_be, at.lengths)

    x_bsh = x_bsh[:, : rows * columns] if at.image_at is None else _picked(x_bsh, at.image_at)
    return (
        last(x_bsh, time_be)
        .view(batch, rows, columns, patch, patch, model.out_channels)
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(batch, model.out_channels, height, width)
    )


def _picked(x_bsh: Tensor, at_bt: Tensor) -> Tensor:
    """Return the tokens of each row at the given places [B, T]."""
    return x_bsh.gather(1, at_bt[:, :, None].expand(-1, -1, x_bsh.shape[-1]))


def real_lengths(mask_bt: Tensor) -> tuple[int, ...]:
    """Return how many tokens of each prompt are real, by its mask; empty if real tokens come after padding."""
    found = []
    for row in mask_bt.tolist():
        real = sum(map(bool, row))
        if not all(row[:real]):
            return ()
        found.append(real)
    return tuple(found)


def positioned(
    module: nn.Module,
    embed: Callable[[Tensor], Tensor],
    text_btc: Tensor,
    lengths: tuple[int, ...],
    grid: tuple[int, int],
    time_embedder: nn.Module | None = None,
    *,
    for_graph: bool,
) -> tuple[Tensor, Position]:
    """Return the text [B, T, C], padded or cut as the blocks take it, and positions.

    Args:
        module: The rewritten transformer.
        embed: Returns complex rotations [B, S, D / 2] of positions [B, S, 3].
        text_btc: Encoded prompts.
        lengths: Real tokens of each.
        grid: The image in tokens: height and width.
        time_embedder: Has its rates among the positions; None for one that makes them on the device.
        for_graph: Give blocks that use lengths these even if nothing is padded.
    """
    layout, image_tokens = LAYOUT.required(module), grid[0] * grid[1]
    rule = layout.padding_rule()
    stock_order = rule.padding_input == "mask"
    tokens = text_btc.shape[1] if stock_order else max(1, *lengths)
    rows = Rows.of(grid, image_tokens, lengths, tokens, rule, for_graph=for_graph)
    if rows.tokens != text_btc.shape[1]:
        text_btc = F.pad(text_btc, (0, 0, 0, rows.tokens - text_btc.shape[1]))  # or cuts off what is padding
    device = text_btc.device

    def made() -> Position:
        rates = None if time_embedder is None else rates_of(time_embedder, device)
        return replace(_position(embed, rows, stock_order, device), time_rates=rates)

    return text_btc, layout.positions.get((rows, device), made)


def _position(embed: Callable[[Tensor], Tensor], rows: Rows, stock_order: bool, device: torch.device) -> Position:
    """Return positions; in the order of stock, each row begins with its prompt."""
    batch, image, longest = len(rows.lengths), rows.image_tokens, max(rows.lengths)
    ids = torch.zeros(batch, image + rows.tokens, 3, dtype=torch.int32, device=device)
    axes = (torch.arange(size, dtype=torch.int32, device=device) for size in rows.grid)
    ids[:, :image, 1:] = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(image, 2)
    lengths_b = torch.tensor(rows.lengths, device=device)
    ids[:, :image, 0] = lengths_b[:, None].int()
    # What is beyond a prompt is padding: any position within the tables will do.
    text = torch.arange(rows.tokens, device=device)
    ids[:, image:, 0] = torch.minimum(text, (lengths_b[:, None] - 1).clamp_min(0)).int()
    freqs_bsp = embed(ids)
    found = padding(rows, device)
    if min(rows.lengths) == 0:  # attention over nothing is not a number
        found["text_pads"] = text >= lengths_b[:, None]
    rope_image, rope_text = freqs_bsp[:, :image].contiguous(), freqs_bsp[:, image:].contiguous()
    if not stock_order:
        return Position(table(rope_image), table(rope_text), table(freqs_bsp), **found)
    places = torch.arange(image + longest, device=device).expand(batch, -1)
    is_text, is_image = places < lengths_b[:, None], places < lengths_b[:, None] + image
    order = torch.where(is_text, image + places, torch.where(is_image, places - lengths_b[:, None], places))
    if "mask" in found:
        equal = min(rows.lengths) == longest
        found["mask"] = is_image[:, None, None]
        if equal:
            del found["mask"]
    rope = freqs_bsp.gather(1, order[:, :, None].expand(-1, -1, freqs_bsp.shape[-1]))
    image_at = lengths_b[:, None] + torch.arange(image, device=device)
    return Position(table(rope_image), table(rope_text), table(rope), **found, order=order, image_at=image_at)
