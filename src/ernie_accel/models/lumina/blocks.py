"""The Lumina 2 transformer, on which NewBie-image runs, rewritten. ``RewriteBlocks`` installs it.

Beside what its blocks save (``next_dit/blocks.py``):

    positions, with tables copied from the host, at each step  once per image size and prompt lengths (`Position`)
    prompt lengths read from the device at each step           once per prompt
    rows put together one by one                               one gather
    last norm and linear over text tokens too                  over the image tokens only

On fused kernels the image comes before the text, so that padding is at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0, Lumina2Transformer2DModel
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.models.lumina.attention import DispatchedProcessor
from ernie_accel.models.next_dit.blocks import Modulation, Names, RewrittenFeedForward, RewrittenNextBlock, run_blocks
from ernie_accel.models.next_dit.positions import Position, Rows, padding, table
from ernie_accel.models.next_dit.rewriting import LISTS, NextRewriting
from ernie_accel.models.rewriting import RewrittenForward
from ernie_accel.models.token_layout import LAYOUT, prompt_lengths


class LuminaTransformer(Protocol):
    """``Lumina2Transformer2DModel`` as a type checker sees it: diffusers' own classes come without types."""

    config: Any
    out_channels: int
    rope_embedder: Any
    time_caption_embed: nn.Module
    x_embedder: nn.Module
    noise_refiner: nn.ModuleList
    context_refiner: nn.ModuleList
    layers: nn.ModuleList
    norm_out: nn.Module


class _FeedForward(RewrittenFeedForward):
    taken = ("linear_1", "linear_2", "linear_3")
    fusible = ("linear_1", "linear_3")
    fused_name = "linear_13"


class RewrittenLuminaBlock(RewrittenNextBlock):
    """A `Lumina2TransformerBlock` rewritten; it takes the stock one's arguments, and lengths in place of a mask."""

    names = Names("attn", "feed_forward", ("norm1", "norm2", "ffn_norm1", "ffn_norm2"))
    feed_forward_class = _FeedForward

    def first_norm(self) -> nn.Module:
        """Return the norm before the attention, which may be within the layer of the modulation."""
        layer = self.get_submodule("norm1")
        return layer.get_submodule("norm") if "norm" in layer._modules else layer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: Tensor | None,
        temb: Tensor | None = None,
        lengths_b: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, S, H] after this block.

        Args:
            hidden_states: Hidden states [B, S, H].
            attention_mask: True where a token is real, [B, 1, 1, S] or [B, S]; None if all are, or if `lengths_b` says
                it.
            image_rotary_emb: RoPE table, in one of the forms of `Position`.
            temb: Embedded time [B, E].
            lengths_b: Real tokens of each row, for blocks that need no mask (not for these).
        """
        return self.compute(hidden_states, image_rotary_emb, self.modulation_of(temb), attention_mask, lengths_b)

    def modulation_of(self, condition: Tensor | None) -> Modulation | None:
        """Return the modulation by the embedded time [B, E]; None for a block without."""
        layer = self.get_submodule("norm1")
        if condition is None or "linear" not in layer._modules:
            return None
        return self.modulated(layer.get_submodule("linear")(F.silu(condition)))


# What `CaptureGraphs` asks of a rewritten family.
FORWARD_ARGUMENTS = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "attention_kwargs",
    "return_dict",
)
#: Other tensors in every step.
STEP_INPUTS = ("hidden_states", "timestep")
#: The same in all steps of a picture.
PICTURE_INPUT = "encoder_hidden_states"


@apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    attention_kwargs: Mapping[str, object] | None = None,
    return_dict: bool = True,
    at: Position | None = None,
) -> object:
    """Return the prediction [B, C, height, width] of a transformer with `RewrittenLuminaBlock` layers.

    Arguments and result are those of ``Lumina2Transformer2DModel.forward``, whose place it takes on an instance; with
    `at`, text and positions are those that `prepare` returned.
    """
    model = cast(LuminaTransformer, self)
    batch, channels, height, width = hidden_states.shape
    patch = int(model.config.patch_size)
    rows, columns = height // patch, width // patch
    if at is None:
        arguments = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        encoder_hidden_states, at = _prepared(self, arguments, for_graph=False)

    time_be, text_bth = model.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    patches = hidden_states.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
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
    sample: Tensor = (
        model.norm_out(x_bsh, time_be)
        .view(batch, rows, columns, patch, patch, model.out_channels)
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(batch, model.out_channels, height, width)
    )
    return as_output(sample, {"return_dict": return_dict})


def _picked(x_bsh: Tensor, at_bt: Tensor) -> Tensor:
    """Return the tokens of each row at the given places [B, T]."""
    return x_bsh.gather(1, at_bt[:, :, None].expand(-1, -1, x_bsh.shape[-1]))


def _lengths(mask_bt: Tensor) -> tuple[int, ...]:
    """Return how many tokens of each prompt are real, given its mask on the host.

    Raises:
        ErnieAccelError: Real tokens come after padding.
    """
    found = []
    for row in mask_bt.tolist():
        real = sum(map(bool, row))
        if not all(row[:real]):
            raise ErnieAccelError(
                f"a prompt of {real} tokens begins with padding (encoder_attention_mask {row[:8]}...): the rewritten "
                "blocks, as those of diffusers, take the first tokens of each row for the prompt. Pad on the right."
            )
        found.append(real)
    return tuple(found)


def _prepared(module: nn.Module, arguments: Mapping[str, Any], *, for_graph: bool) -> tuple[Tensor, Position]:
    """Return the text [B, T, C] and positions."""
    layout, text_btc = LAYOUT.required(module), cast(Tensor, arguments["encoder_hidden_states"])
    grid, lengths = _grid(module, arguments), prompt_lengths(arguments["encoder_attention_mask"], _lengths)
    rule, image_tokens = layout.padding_rule(), grid[0] * grid[1]
    stock_order = rule.padding_input == "mask"
    tokens = text_btc.shape[1] if stock_order else max(1, *lengths)
    rows = Rows.of(grid, image_tokens, lengths, tokens, rule, for_graph=for_graph)
    if rows.tokens != text_btc.shape[1]:
        text_btc = F.pad(text_btc, (0, 0, 0, rows.tokens - text_btc.shape[1]))  # or cuts off what is padding
    device, embed = text_btc.device, cast(LuminaTransformer, module).rope_embedder
    return text_btc, layout.positions.get((rows, device), lambda: _position(embed, rows, stock_order, device))


def _position(embed: Any, rows: Rows, stock_order: bool, device: torch.device) -> Position:
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
    freqs_bsp = embed._get_freqs_cis(ids)
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


def _grid(module: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int]:
    height, width = arguments["hidden_states"].shape[-2:]
    patch = int(cast(LuminaTransformer, module).config.patch_size)
    return height // patch, width // patch


def serves(arguments: Mapping[str, object]) -> bool:
    """Return whether `prepare` can serve these arguments of a forward."""
    return arguments.get("attention_kwargs") is None


def token_count(transformer: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Return the image tokens of all pictures of a batch."""
    height, width = _grid(transformer, arguments)
    return len(cast(Sequence[Tensor], arguments["hidden_states"])) * height * width


def host_facts(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Return what `prepare` depends on beside shapes: the prompt lengths."""
    return prompt_lengths(arguments["encoder_attention_mask"], _lengths)


def prepare(transformer: nn.Module, arguments: Mapping[str, object]) -> tuple[Tensor, Position]:
    """Return text and positions for `forward`: all that depends on how long each prompt is, and is no shape."""
    return _prepared(transformer, arguments, for_graph=True)


def as_output(sample: Tensor, arguments: Mapping[str, object]) -> object:
    """Return `sample` in the form that the caller of `forward` asked for."""
    return Transformer2DModelOutput(sample=sample) if arguments.get("return_dict", True) else (sample,)


class RewrittenLuminaForward(RewrittenForward):
    """`forward` as that of one transformer."""

    function = forward


_REWRITING = NextRewriting(
    Lumina2Transformer2DModel,
    RewrittenLuminaBlock,
    RewrittenLuminaForward,
    (Lumina2AttnProcessor2_0, DispatchedProcessor),
)
BLOCKS = LISTS
FUSED_LAYERS = _REWRITING.fused_layers
fits = _REWRITING.fits
is_rewritten = _REWRITING.is_rewritten
unsupported_reasons = _REWRITING.unsupported_reasons
to_be_fused = _REWRITING.to_be_fused
rewrite = _REWRITING.rewrite
