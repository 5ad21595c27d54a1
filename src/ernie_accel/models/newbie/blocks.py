"""The transformer of NewBie-image's own code rewritten: the same numbers from fewer operations.

``RewriteBlocks`` installs it. Its blocks save what those of diffusers do (``next_dit/blocks.py``), except that queries,
keys and values are one product already. Besides:

    positions, with tables copied row by row, at each step  once per image size and prompt lengths (`Position`)
    prompt lengths read from the device at each step        once per prompt
    rates of the time's sinusoids copied from the host      once per image size and prompt lengths
    rows put together one by one                            one gather
    attention by the package flash_attn in half precision   by the backend that was chosen
    final layer over text tokens too                        over the image tokens only

The class comes with the checkpoint, so it is known by its name and its parts (`fits`). Images of several sizes in one
batch, and prompts that begin with padding, go through the stock forward, with these blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ernie_accel.models.next_dit.blocks import RewrittenAttention, RewrittenOriginalBlock
from ernie_accel.models.next_dit.positions import Position
from ernie_accel.models.next_dit.rewriting import LISTS, RemoteRewriting
from ernie_accel.models.next_dit.text_first import TextFirst, positioned, predicted, real_lengths
from ernie_accel.models.next_dit.time_rates import embedded_time
from ernie_accel.models.rewriting import RewrittenForward
from ernie_accel.models.token_layout import prompt_lengths


class OwnTransformer(TextFirst, Protocol):
    """``NextDiT_CLIP`` as a type checker sees it."""

    in_channels: int
    patch_size: int
    x_embedder: nn.Linear
    cap_embedder: nn.Sequential
    clip_text_pooled_proj: nn.Sequential
    time_text_embed: nn.Module
    t_embedder: nn.Module
    final_layer: nn.Module
    rope_embedder: Callable[[Tensor], Tensor]


class _Attention(RewrittenAttention):
    taken = ("qkv", "q_norm", "k_norm", "out")
    fusible = ()
    fused_name = "qkv"
    norm_names = ("q_norm", "k_norm")
    last_name = "out"
    heads_name = "n_local_heads"


class RewrittenNewbieBlock(RewrittenOriginalBlock):
    """A ``JointTransformerBlock`` rewritten; it takes the stock one's arguments, and lengths in place of a mask."""

    attention_class = _Attention

    def forward(
        self,
        x: Tensor,
        x_mask: Tensor | None,
        freqs_cis: Tensor | None,
        adaln_input: Tensor | None = None,
        lengths_b: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, S, H] after this block.

        Args:
            x: Hidden states [B, S, H].
            x_mask: True where a token is real, [B, 1, 1, S] or [B, S]; None if all are, or if `lengths_b` says it.
            freqs_cis: RoPE table, in one of the forms of `Position`.
            adaln_input: Embedded time [B or 1, E]; None for a block without modulation.
            lengths_b: Real tokens of each row, for blocks that need no mask (not for these).
        """
        if adaln_input is not None:
            adaln_input = adaln_input.expand(len(x), -1)
        return self.compute(x, freqs_cis, self.modulation_of(adaln_input), x_mask, lengths_b)


# What `CaptureGraphs` asks of a rewritten family.
#: Other tensors in every step, and the pooled prompt, which is written anew at each.
STEP_INPUTS = ("x", "t", "clip_text_pooled")
#: The same in all steps of a picture.
PICTURE_INPUT = "cap_feats"


def forward(
    self: nn.Module,
    x: Tensor,
    t: Tensor,
    cap_feats: Tensor,
    cap_mask: Tensor,
    *,
    at: Position | None = None,
    **kwargs: object,
) -> object:
    """Return the prediction [B, C, height, width] of a transformer with `RewrittenNewbieBlock` layers.

    Arguments and result are those of ``NextDiT_CLIP.forward``, whose place it takes on an instance, so that
    ``forward_with_cfg`` calls it; with `at`, captions and positions are those that `prepare` returned, and the result
    is in a tuple.
    """
    model = cast(OwnTransformer, self)
    arguments = {**kwargs, "x": x, "t": t, "cap_feats": cap_feats, "cap_mask": cap_mask}
    if at is None:
        if not serves(arguments):
            found: object = type(self).forward(self, x, t, cap_feats, cap_mask, **kwargs)
            return found
        cap_feats, position = _prepared(self, arguments, for_graph=False)
    else:
        position = at
    time_be, pooled = embedded_time(model.t_embedder, t, position.time_rates), kwargs.get("clip_text_pooled")
    text_bth = model.cap_embedder(cap_feats)
    if pooled is not None:
        time_be = model.time_text_embed(torch.cat([time_be, model.clip_text_pooled_proj(pooled)], -1))
    sample = predicted(model, x, model.patch_size, text_bth, time_be, position, model.final_layer)
    return sample if at is None else (sample,)


def _prepared(module: nn.Module, arguments: Mapping[str, object], *, for_graph: bool) -> tuple[Tensor, Position]:
    """Return the captions [B, T, C] and positions."""
    text_btc, grid = cast(Tensor, arguments["cap_feats"]), _grid(module, arguments)
    own, facts = cast(OwnTransformer, module), host_facts(arguments)
    return positioned(module, own.rope_embedder, text_btc, facts, grid, own.t_embedder, for_graph=for_graph)


def _grid(module: nn.Module, arguments: Mapping[str, object]) -> tuple[int, int]:
    height, width = cast(Tensor, arguments["x"]).shape[-2:]
    patch = cast(OwnTransformer, module).patch_size
    return height // patch, width // patch


def serves(arguments: Mapping[str, object]) -> bool:
    """Return whether `prepare` can serve these arguments of a forward: images of one size, prompts padded at the end.

    What else it is given, such as no time for each row, is left to the stock forward, which may refuse it.
    """
    x, t = arguments["x"], arguments["t"]
    if not isinstance(x, Tensor) or not isinstance(t, Tensor) or t.shape != (len(x),):
        return False
    return arguments.get("clip_img_pooled") is None and host_facts(arguments) != ()


def token_count(transformer: nn.Module, arguments: Mapping[str, object]) -> int:
    """Return the image tokens of all pictures of a batch."""
    height, width = _grid(transformer, arguments)
    return len(cast(Tensor, arguments["x"])) * height * width


def host_facts(arguments: Mapping[str, object]) -> tuple[int, ...]:
    """Return what `prepare` depends on beside shapes: the prompt lengths; empty if a prompt begins with padding."""
    return prompt_lengths(cast(Tensor, arguments["cap_mask"]), real_lengths)


def prepare(transformer: nn.Module, arguments: Mapping[str, object]) -> tuple[Tensor, Position]:
    """Return captions and positions for `forward`: all that depends on how long each prompt is, and is no shape."""
    return _prepared(transformer, arguments, for_graph=True)


def as_output(sample: Tensor, arguments: Mapping[str, object]) -> object:
    """Return `sample`, which is all that ``NextDiT_CLIP.forward`` returns."""
    return sample


class RewrittenNewbieForward(RewrittenForward):
    """`forward` as that of one transformer."""

    function = forward


_REWRITING = RemoteRewriting(
    RewrittenNewbieBlock,
    RewrittenNewbieForward,
    "NextDiT_CLIP",
    MappingProxyType(
        {
            "forward": ("self", "x", "t", "cap_feats", "cap_mask", "kwargs"),
            "patchify_and_embed": ("self", "x", "cap_feats", "cap_mask", "t"),
            "unpatchify": ("self", "x", "img_size", "cap_size", "return_tensor"),
        }
    ),
    (
        *("x_embedder", "t_embedder", "cap_embedder", "time_text_embed", "clip_text_pooled_proj"),
        *("norm_final", "final_layer"),
    ),
    "t_embedder",
    ("self", "x", "x_mask", "freqs_cis", "adaln_input"),
    ("self", "x", "x_mask", "freqs_cis"),
)
BLOCKS = LISTS
FUSED_LAYERS = _REWRITING.fused_layers
fits = _REWRITING.fits
is_rewritten = _REWRITING.is_rewritten
unsupported_reasons = _REWRITING.unsupported_reasons
to_be_fused = _REWRITING.to_be_fused
rewrite = _REWRITING.rewrite
