"""The ERNIE-Image transformer rewritten: the same numbers from fewer operations. ``RewriteBlocks`` installs it.

What stock diffusers does, and what is done here instead:

    to_q, to_k, to_v and gate, up as five products       two: the weights are concatenated (`FusedLinear`)
    RoPE angles -> cos, sin in every layer, for q and k  once per image size and prompt length (`Positions`)
    six modulation vectors copied to [S, B, H]           broadcast from [B, 1, H], cast and shifted once a step
    an all-True attention mask                           none, if no prompt of the batch is padded
    [S, B, H] between blocks, permuted in each           [B, S, H] throughout
    final norm and linear over text tokens too           over the image tokens only

Every arithmetic operation that is left has the operands and the rounding of stock. Shapes in names: b batch, s tokens
(image first, then text), h hidden size, n heads, d head size, f hidden size of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_ernie_image import (
    ErnieImageSingleStreamAttnProcessor,
    ErnieImageTransformer2DModelOutput,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.undo import Undo
from ernie_accel.models import rewriting
from ernie_accel.models.ernie_image.architecture import ErnieTransformer, transformer_of
from ernie_accel.models.ernie_image.positions import Position, RememberingPad, Rows, position
from ernie_accel.models.rewriting import Part, RewrittenBlock, RewrittenForward, SelfAttention
from ernie_accel.models.token_layout import LAYOUT, prompt_lengths

#: Six float32 tensors [B, 1, H], the same for all blocks: shift, 1 + scale, gate of the attention, then of the MLP.
Modulation = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class RewrittenAttention(SelfAttention):
    """Self-attention over [B, S, H]."""

    def forward(self, x_bsh: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, mask_b11s: Tensor | None) -> Tensor:
        q_bsnd, k_bsnd, v_bsnd = self.project(x_bsh)
        norm_q, norm_k = self.norms
        q_bsnd = rotate(norm_q(q_bsnd), cos_bs1d, sin_bs1d)
        k_bsnd = rotate(norm_k(k_bsnd), cos_bs1d, sin_bs1d)
        return self.last(self.attend(q_bsnd, k_bsnd, v_bsnd, mask_b11s))  # type: ignore[no-any-return]


class RewrittenFeedForward(Part):
    """down(up(x) * gelu(gate(x))) over [B, S, H]."""

    taken = ("gate_proj", "up_proj", "linear_fc2")
    fusible = ("gate_proj", "up_proj")
    fused_name = "gate_up_proj"
    gate_proj: nn.Linear
    up_proj: nn.Linear
    linear_fc2: nn.Linear

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.fused is not None:
            gate_bsf, up_bsf = self.fused(x_bsh).chunk(2, -1)
        else:
            gate_bsf, up_bsf = self.gate_proj(x_bsh), self.up_proj(x_bsh)
        # On the CPU torch's float32 GELU rounds differently over a view; compiled, the copy is no operation of its own.
        return self.linear_fc2(up_bsf * F.gelu(gate_bsf.contiguous()))  # type: ignore[no-any-return]


class RewrittenErnieBlock(RewrittenBlock):
    """One transformer block over [B, S, H]: the stock block's layers under the stock names, other arithmetic order."""

    part_names = ("self_attention", "mlp")

    def __init__(self, stock: nn.Module) -> None:
        super().__init__(stock)
        self.adaLN_sa_ln = stock.get_submodule("adaLN_sa_ln")
        self.self_attention = RewrittenAttention(stock.get_submodule("self_attention"))
        self.adaLN_mlp_ln = stock.get_submodule("adaLN_mlp_ln")
        self.mlp = RewrittenFeedForward(stock.get_submodule("mlp"))

    def forward(
        self,
        x_bsh: Tensor,
        cos_bs1d: Tensor,
        sin_bs1d: Tensor,
        modulation: Modulation,
        mask_b11s: Tensor | None = None,
        lengths_b: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states after this block.

        Args:
            x_bsh: Hidden states [B, S, H].
            cos_bs1d: Cosines of the RoPE angles [B, S, 1, D], in the dtype of `x_bsh`.
            sin_bs1d: Sines, likewise.
            modulation: See `Modulation`.
            mask_b11s: True where a token is real [B, 1, 1, S]; None if `lengths_b` says it, or if all are.
            lengths_b: Real tokens of each row, for blocks that need no mask (not for these). With both None all are.
        """
        shift_sa, scale_sa, gate_sa, shift_mlp, scale_mlp, gate_mlp = modulation
        h_bsh: Tensor
        h_bsh = (self.adaLN_sa_ln(x_bsh).float() * scale_sa + shift_sa).to(x_bsh.dtype)
        h_bsh = self.self_attention(h_bsh, cos_bs1d, sin_bs1d, mask_b11s)
        x_bsh = x_bsh + (gate_sa * h_bsh.float()).to(x_bsh.dtype)
        h_bsh = (self.adaLN_mlp_ln(x_bsh).float() * scale_mlp + shift_mlp).to(x_bsh.dtype)
        h_bsh = self.mlp(h_bsh)
        return x_bsh + (gate_mlp * h_bsh.float()).to(x_bsh.dtype)


#: The layers of a block that are one product where their parts are fused, by path within the block.
FUSED_LAYERS = (f"self_attention.{RewrittenAttention.fused_name}", f"mlp.{RewrittenFeedForward.fused_name}")


def rotate(x_bsnd: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor) -> Tensor:
    """Return `x_bsnd` rotated by RoPE in half-split layout: angles of dimension i and i + D/2 belong together."""
    first, second = x_bsnd.chunk(2, -1)
    return x_bsnd * cos_bs1d + torch.cat((-second, first), -1) * sin_bs1d


def forward(
    self: ErnieTransformer,
    hidden_states: Tensor,
    timestep: Tensor,
    text_bth: Tensor,
    text_lens: Tensor,
    return_dict: bool = True,
    at: Position | None = None,
) -> ErnieImageTransformer2DModelOutput | tuple[Tensor]:
    """Return the prediction [B, C, height, width] of a transformer with `RewrittenErnieBlock` layers.

    Arguments and result are those of ``ErnieImageTransformer2DModel.forward``, whose place it takes on an instance;
    with `at`, text and positions are those that `prepare` returned.
    """
    batch, _, height, width = hidden_states.shape
    patch, grid = self.patch_size, _grid(self, hidden_states)
    image_tokens = grid[0] * grid[1]
    if at is None:
        text_bth, rows = _pad(self, text_bth, text_lens, grid)
    if self.text_proj is not None and text_bth.numel() > 0:
        text_bth = self.text_proj(text_bth)
    x_bsh = torch.cat([self.x_embedder(hidden_states), text_bth], 1)
    if at is None:
        at = _position(self, rows, x_bsh)

    time_bh = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype))
    parts = [part.float().unsqueeze(1) for part in self.adaLN_modulation(time_bh).chunk(6, -1)]
    modulation = (parts[0], 1 + parts[1], parts[2], parts[3], 1 + parts[4], parts[5])
    for block in self.layers:
        x_bsh = block(x_bsh, at.cos_bs1d, at.sin_bs1d, modulation, at.mask_b11s, at.lengths_b)

    scale_bh, shift_bh = self.final_norm.linear(time_bh).chunk(2, -1)
    x_bsh = self.final_norm.norm(x_bsh[:, :image_tokens]) * (1 + scale_bh[:, None]) + shift_bh[:, None]
    patches = self.final_linear(x_bsh.to(hidden_states.dtype))
    sample: Tensor = (
        patches.view(batch, *grid, patch, patch, self.out_channels)
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(batch, self.out_channels, height, width)
    )
    return ErnieImageTransformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _position(transformer: ErnieTransformer, rows: Rows, like: Tensor) -> Position:
    known = LAYOUT.required(transformer).positions
    return known.get((rows, like.device, like.dtype), lambda: position(transformer.pos_embed, rows, like))


def _grid(transformer: ErnieTransformer, hidden_states: Tensor) -> tuple[int, int]:
    height, width = hidden_states.shape[-2:]
    return height // transformer.patch_size, width // transformer.patch_size


def _pad(
    transformer: ErnieTransformer,
    text_bth: Tensor,
    text_lens: Tensor,
    grid: tuple[int, int],
    *,
    for_graph: bool = False,
) -> tuple[Tensor, Rows]:
    """Return the text padded as the transformer's rule requires, and the layout of the padded rows.

    No other token sees the added ones, so their values do not matter.

    Args:
        transformer: Has the rule.
        text_bth: Text of each prompt.
        text_lens: Tokens of each prompt [B].
        grid: Height and width of the image in tokens.
        for_graph: If the blocks use lengths, pass them even if nothing is padded, so that padded batches can replay
            the same graph.
    """
    rule = LAYOUT.required(transformer).padding_rule()
    lengths, more = prompt_lengths(text_lens), -(grid[0] * grid[1] + text_bth.shape[1]) % rule.multiple_of
    if more:
        text_bth = F.pad(text_bth, (0, 0, 0, more))
    is_padded = any(length != text_bth.shape[1] for length in lengths)
    passes_padding = is_padded or rule.always_lengths or (for_graph and rule.padding_input == "lengths")
    return text_bth, Rows(grid, lengths, text_bth.shape[1], rule.padding_input if passes_padding else None)


#: Attributes of the transformer with the blocks.
BLOCKS = ("layers",)
# What `CaptureGraphs` asks of a rewritten family.
#: Other tensors in every step.
STEP_INPUTS = ("hidden_states", "timestep")
#: The same in all steps of a picture.
PICTURE_INPUT = "text_bth"


def token_count(transformer: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Return the image tokens of all pictures of a batch."""
    height, width = _grid(transformer_of(transformer), arguments["hidden_states"])
    return int(len(arguments["hidden_states"]) * height * width)


def host_facts(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Return what `prepare` depends on beside shapes: the prompt lengths."""
    return prompt_lengths(arguments["text_lens"])


def prepare(transformer: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, Position]:
    """Return text and positions for `forward`: all that depends on how long each prompt is, and is no shape."""
    hidden_states, model = arguments["hidden_states"], transformer_of(transformer)
    grid = _grid(model, hidden_states)
    text_bth, rows = _pad(model, arguments["text_bth"], arguments["text_lens"], grid, for_graph=True)
    like = hidden_states.new_empty(0, dtype=torch.promote_types(hidden_states.dtype, text_bth.dtype))
    return text_bth, _position(model, rows, like)


def as_output(sample: Tensor, arguments: Mapping[str, object]) -> ErnieImageTransformer2DModelOutput | tuple[Tensor]:
    """Return `sample` in the form that the caller of `forward` asked for."""
    return ErnieImageTransformer2DModelOutput(sample=sample) if arguments.get("return_dict", True) else (sample,)


def serves(arguments: Mapping[str, object]) -> bool:
    """Return whether `prepare` can serve these arguments of a forward."""
    return True


def fits(transformer: nn.Module) -> bool:
    """Return whether this is the implementation that is rewritten, as far as its arguments tell."""
    return rewriting.takes_all_of(forward, type(transformer).forward)


def is_rewritten(transformer: nn.Module) -> bool:
    """Return whether `rewrite` has been here."""
    return any(isinstance(block, RewrittenErnieBlock) for block in transformer_of(transformer).layers)


def unsupported_reasons(transformer: nn.Module) -> list[str]:
    """Return every reason why this stock transformer cannot be rewritten."""
    model, reasons = transformer_of(transformer), []
    axes, head_dim = tuple(model.config.rope_axes_dim), model.head_dim
    if sum(axes) != head_dim:
        reasons.append(
            said(
                "RoPE covers {axes} of {head_dim} dimensions of a head; only full rotation is rewritten",
                axes=sum(axes),
                head_dim=head_dim,
            )
        )
    processors = (ErnieImageSingleStreamAttnProcessor,)
    return reasons + rewriting.unsupported_reasons(transformer, BLOCKS, "self_attention", processors)


def to_be_fused(transformer: nn.Module, *, beneath_loras: bool = False) -> dict[str, tuple[str, ...]]:
    """Return which layers `rewrite` would make one: path of the one -> paths of its parts.

    With `beneath_loras`, also those that `FuseKernels` would.
    """
    return rewriting.to_be_fused(transformer, BLOCKS, RewrittenErnieBlock, beneath_loras=beneath_loras)


class RewrittenErnieForward(RewrittenForward):
    """`forward` as that of one transformer."""

    function = forward


def rewrite(pipe: Pipeline, undo: Undo, fuse: bool) -> dict[str, str]:
    """Rewrite the transformer of `pipe` in place and return what could not be fused: path -> reason."""
    skipped = rewriting.rewrite(pipe.transformer, BLOCKS, RewrittenErnieBlock, RewrittenErnieForward, undo, fuse)
    undo.setattr(pipe, "_pad_text", RememberingPad(pipe, "_pad_text"))
    return skipped
