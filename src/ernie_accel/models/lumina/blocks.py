"""The Lumina 2 transformer, on which NewBie-image runs, rewritten. ``RewriteBlocks`` installs it.

Beside what its blocks save (``next_dit/blocks.py``):

    positions, with tables copied from the host, at each step  once per image size and prompt lengths (`Position`)
    prompt lengths read from the device at each step           once per prompt
    rows put together one by one                               one gather
    last norm and linear over text tokens too                  over the image tokens only
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0, Lumina2Transformer2DModel
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.models.lumina.attention import DispatchedProcessor
from ernie_accel.models.next_dit.blocks import Modulation, Names, RewrittenFeedForward, RewrittenNextBlock
from ernie_accel.models.next_dit.positions import Position
from ernie_accel.models.next_dit.rewriting import LISTS, DiffusersRewriting
from ernie_accel.models.next_dit.text_first import TextFirst, positioned, predicted, real_lengths
from ernie_accel.models.rewriting import RewrittenForward
from ernie_accel.models.token_layout import prompt_lengths


class LuminaTransformer(TextFirst, Protocol):
    """``Lumina2Transformer2DModel`` as a type checker sees it: diffusers' own classes come without types."""

    config: Any
    rope_embedder: Any
    time_caption_embed: nn.Module
    norm_out: nn.Module


#: An argument of versions that know NewBie-image, as diffusers' open pull request 12803 calls it.
_POOLED = "pooled_projections"


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
#: Other tensors in every step, and the pooled prompt, which is written anew at each.
STEP_INPUTS = ("hidden_states", "timestep", _POOLED)
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
    pooled_projections: Tensor | None = None,
    at: Position | None = None,
) -> object:
    """Return the prediction [B, C, height, width] of a transformer with `RewrittenLuminaBlock` layers.

    Arguments and result are those of ``Lumina2Transformer2DModel.forward``, whose place it takes on an instance; with
    `at`, text and positions are those that `prepare` returned. Only versions of it that know NewBie-image take
    `pooled_projections` [B, E], and so does their embedding of the time.
    """
    model = cast(LuminaTransformer, self)
    if at is None:
        arguments = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        encoder_hidden_states, at = _prepared(self, arguments, for_graph=False)
    more = {} if pooled_projections is None else {_POOLED: pooled_projections}
    time_be, text_bth = model.time_caption_embed(hidden_states, timestep, encoder_hidden_states, **more)
    patch = int(model.config.patch_size)
    sample = predicted(model, hidden_states, patch, text_bth, time_be, at, model.norm_out)
    return as_output(sample, {"return_dict": return_dict})


def _lengths(mask_bt: Tensor) -> tuple[int, ...]:
    """Return how many tokens of each prompt are real, given its mask on the host.

    Raises:
        ErnieAccelError: Real tokens come after padding.
    """
    lengths = real_lengths(mask_bt)
    for row in mask_bt.tolist() if not lengths else ():
        real = sum(map(bool, row))
        if not all(row[:real]):
            raise ErnieAccelError(
                f"a prompt of {real} tokens begins with padding (encoder_attention_mask {row[:8]}...): the rewritten "
                "blocks, as those of diffusers, take the first tokens of each row for the prompt. Pad on the right."
            )
    return lengths


def _prepared(module: nn.Module, arguments: Mapping[str, Any], *, for_graph: bool) -> tuple[Tensor, Position]:
    """Return the text [B, T, C] and positions."""
    text_btc, lengths = arguments["encoder_hidden_states"], host_facts(arguments)
    embed = cast(LuminaTransformer, module).rope_embedder._get_freqs_cis
    return positioned(module, embed, text_btc, lengths, _grid(module, arguments), for_graph=for_graph)


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

    def __call__(self, *args: object, **kwargs: object) -> object:
        return super().__call__(**self.named(args, kwargs))  # another version may have another order


_REWRITING = DiffusersRewriting(
    RewrittenLuminaBlock,
    RewrittenLuminaForward,
    Lumina2Transformer2DModel,
    (Lumina2AttnProcessor2_0, DispatchedProcessor),
)
BLOCKS = LISTS
FUSED_LAYERS = _REWRITING.fused_layers
is_rewritten = _REWRITING.is_rewritten
unsupported_reasons = _REWRITING.unsupported_reasons
to_be_fused = _REWRITING.to_be_fused
rewrite = _REWRITING.rewrite


def fits(transformer: nn.Module) -> bool:
    """Return whether this is the implementation that is rewritten: its forward is diffusers' own, as known here."""
    if not _REWRITING.fits(transformer):
        return False
    embed = cast(LuminaTransformer, transformer).time_caption_embed
    takes = [_POOLED in inspect.signature(type(each).forward).parameters for each in (transformer, embed)]
    return takes[0] == takes[1]
