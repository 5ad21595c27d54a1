"""The Z-Image transformer rewritten: the same numbers from fewer operations. ``RewriteBlocks`` installs it.

Beside what its blocks save (``next_dit/blocks.py``):

    positions and pad masks of every row at each step    once per image size and prompt lengths (`Position`)
    rows cut, padded and put together one by one         pictures of one size as one batch throughout
    final layer over text tokens too                     over the image tokens only

Rows of the omni variant, and pictures of several sizes in one batch, go through the stock forward, with these blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    ZImageTransformer2DModel,
    ZSingleStreamAttnProcessor,
    select_per_token,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.models.next_dit.blocks import Modulation, RewrittenOriginalBlock, run_blocks
from ernie_accel.models.next_dit.positions import Position, Rows, padding, table
from ernie_accel.models.next_dit.rewriting import LISTS, DiffusersRewriting
from ernie_accel.models.rewriting import RewrittenForward
from ernie_accel.models.token_layout import LAYOUT


class ZImageTransformer(Protocol):
    """``ZImageTransformer2DModel`` as a type checker sees it: diffusers' own classes come without types."""

    out_channels: int
    t_scale: float
    gradient_checkpointing: bool
    x_pad_token: Tensor
    cap_pad_token: Tensor
    all_x_embedder: nn.ModuleDict
    all_final_layer: nn.ModuleDict
    t_embedder: nn.Module
    cap_embedder: nn.Module
    noise_refiner: nn.ModuleList
    context_refiner: nn.ModuleList
    layers: nn.ModuleList
    rope_embedder: nn.Module


class RewrittenZImageBlock(RewrittenOriginalBlock):
    """A `ZImageTransformerBlock` rewritten; it takes the arguments of the stock one, and lengths in place of a mask."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        freqs_cis: Tensor | None,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
        lengths_b: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, S, H] after this block.

        Args:
            x: Hidden states [B, S, H].
            attn_mask: True where a token is real, [B, 1, 1, S] or [B, S]; None if all are, or if `lengths_b` says it.
            freqs_cis: RoPE table, in one of the forms of `Position`.
            adaln_input: Embedded time [B, E], for all tokens alike.
            noise_mask: Of the omni variant [B, S]: 1 where `adaln_noisy` counts, 0 where `adaln_clean` does.
            adaln_noisy: Embedded time of noisy tokens.
            adaln_clean: Embedded time of clean ones.
            lengths_b: Real tokens of each row, for blocks that need no mask (not for these).
        """
        if noise_mask is None:
            return self.compute(x, freqs_cis, self.modulation_of(adaln_input), attn_mask, lengths_b)
        noisy, clean = self.modulation_of(adaln_noisy), self.modulation_of(adaln_clean)
        modulation = None
        if noisy is not None and clean is not None:
            pairs = zip(noisy, clean, strict=True)
            modulation = Modulation(
                *(select_per_token(a.squeeze(1), b.squeeze(1), noise_mask, x.shape[1]) for a, b in pairs)
            )
        return self.compute(x, freqs_cis, modulation, attn_mask, lengths_b)


# What `CaptureGraphs` asks of a rewritten family.
#: Other tensors in every step.
STEP_INPUTS = ("x", "t", "controlnet_block_samples")
#: The same in all steps of a picture.
PICTURE_INPUT = "cap_feats"
_DEFAULTS: Mapping[str, int] = MappingProxyType({"patch_size": 2, "f_patch_size": 1})


@apply_lora_scale("joint_attention_kwargs")  # type: ignore[untyped-decorator]
def forward(
    self: nn.Module,
    x: list[Tensor],
    t: Tensor,
    cap_feats: Any,
    return_dict: bool = True,
    controlnet_block_samples: Mapping[int, Tensor] | None = None,
    siglip_feats: object = None,
    image_noise_mask: object = None,
    patch_size: int = 2,
    f_patch_size: int = 1,
    joint_attention_kwargs: Mapping[str, object] | None = None,
    at: Position | None = None,
) -> object:
    """Return the predictions of a transformer with `RewrittenZImageBlock` layers.

    Arguments and result are those of ``ZImageTransformer2DModel.forward``, whose place it takes on an instance; with
    `at`, captions [B, T, C] and positions are those that `prepare` returned, and the result is a tensor in a tuple.
    """
    if at is None and not _is_one_batch(x):
        stock = inspect.unwrap(type(self).forward)
        return stock(
            self, x, t, cap_feats, return_dict, controlnet_block_samples, siglip_feats, image_noise_mask, patch_size,
            f_patch_size, joint_attention_kwargs,
        )  # fmt: skip
    arguments = {"x": x, "cap_feats": cap_feats, "patch_size": patch_size, "f_patch_size": f_patch_size}
    if at is None:
        text_btc, position = _prepared(self, arguments, for_graph=False)
    else:
        text_btc, position = cast(Tensor, cap_feats), at
    sample = _predict(self, torch.stack(list(x)), t, text_btc, position, controlnet_block_samples, arguments)
    return (sample,) if at is not None else as_output(sample, {"return_dict": return_dict})


def _predict(
    module: nn.Module,
    x_bcfhw: Tensor,
    t: Tensor,
    text_btc: Tensor,
    at: Position,
    controls: Mapping[int, Tensor] | None,
    arguments: Mapping[str, Any],
) -> Tensor:
    self = cast(ZImageTransformer, module)
    grid, patch = _grid(arguments), (arguments["f_patch_size"], arguments["patch_size"], arguments["patch_size"])
    key, image_tokens = f"{patch[1]}-{patch[0]}", grid[0] * grid[1] * grid[2]
    batch, channels = x_bcfhw.shape[:2]
    time_be = self.t_embedder(t * self.t_scale).type_as(x_bcfhw)

    x_bsh = (
        x_bcfhw.view(batch, channels, grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
        .permute(0, 2, 4, 6, 3, 5, 7, 1)
        .reshape(batch, image_tokens, -1)
    )
    if at.image_pads is not None:
        x_bsh = F.pad(x_bsh, (0, 0, 0, len(at.image_pads) - image_tokens))
    x_bsh = self.all_x_embedder[key](x_bsh)
    if at.image_pads is not None:
        x_bsh = torch.where(at.image_pads[:, None], self.x_pad_token, x_bsh)
    x_bsh = run_blocks(self.noise_refiner, x_bsh, None, at.rope_image, time_be)

    text_bth = self.cap_embedder(text_btc)
    if at.text_pads is not None:
        text_bth = torch.where(at.text_pads[:, :, None], self.cap_pad_token, text_bth)
    text_bth = run_blocks(self.context_refiner, text_bth, at.text_mask, at.rope_text, lengths_b=at.text_lengths)

    x_bsh = torch.cat([x_bsh, text_bth], 1)
    if controls is None:
        x_bsh = run_blocks(self.layers, x_bsh, at.mask, at.rope, time_be, at.lengths)
    for i, block in enumerate(self.layers if controls is not None else ()):
        x_bsh = block(x_bsh, at.mask, at.rope, time_be, lengths_b=at.lengths)
        if controls is not None and i in controls:
            x_bsh = x_bsh + F.pad(controls[i], (0, 0, 0, x_bsh.shape[1] - controls[i].shape[1]))

    patches = self.all_final_layer[key](x_bsh[:, :image_tokens], c=time_be)
    sample: Tensor = (
        patches.view(batch, *grid, *patch, self.out_channels)
        .permute(0, 7, 1, 4, 2, 5, 3, 6)
        .reshape(batch, self.out_channels, *x_bcfhw.shape[2:])
    )
    return sample


def _is_one_batch(x: object) -> bool:
    """Return whether `x` is a list of pictures of one size, not of lists as in the omni variant."""
    pictures = cast(Sequence[Tensor], x)
    return all(isinstance(each, Tensor) and each.shape == pictures[0].shape for each in pictures)


def _grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    _, frames, height, width = (int(size) for size in arguments["x"][0].shape)
    patch, deep = (int(arguments.get(name, default)) for name, default in _DEFAULTS.items())
    return frames // deep, height // patch, width // patch


def _filled(tokens: int) -> int:
    return int(tokens + -tokens % SEQ_MULTI_OF)


def _prepared(module: nn.Module, arguments: Mapping[str, Any], *, for_graph: bool) -> tuple[Tensor, Position]:
    """Return captions [B, T, C] and positions.

    Every prompt is filled up to a multiple of 32 tokens, which count; what is beyond is padding.
    """
    captions: Sequence[Tensor] = arguments["cap_feats"]
    lengths, device = tuple(len(caption) for caption in captions), arguments["x"][0].device
    tokens, at = positioned(module, _grid(arguments), lengths, device, for_graph=for_graph)
    return torch.stack([F.pad(caption, (0, 0, 0, tokens - len(caption))) for caption in captions]), at


def positioned(
    module: nn.Module, grid: tuple[int, int, int], lengths: tuple[int, ...], device: torch.device, *, for_graph: bool
) -> tuple[int, Position]:
    """Return the tokens that captions of such lengths are to be padded to, and positions.

    Args:
        module: The rewritten transformer.
        grid: Of the pictures, in tokens: frames, height and width.
        lengths: Tokens of each caption.
        device: Of the positions.
        for_graph: Give blocks that use lengths these even if nothing is padded.
    """
    layout, image_tokens = LAYOUT.required(module), grid[0] * grid[1] * grid[2]
    filled = tuple(map(_filled, lengths))
    rule = layout.padding_rule()
    rows = Rows.of(grid, _filled(image_tokens), filled, max(filled), rule, for_graph=for_graph)
    embed = cast(ZImageTransformer, module).rope_embedder
    at = layout.positions.get((rows, lengths, device), lambda: _position(embed, rows, lengths, image_tokens, device))
    return rows.tokens, at


def _position(
    embed: nn.Module, rows: Rows, lengths: tuple[int, ...], image_tokens: int, device: torch.device
) -> Position:
    axes = (torch.arange(size, dtype=torch.int32, device=device) for size in rows.grid)
    ids = torch.zeros(len(lengths), rows.image_tokens + rows.tokens, 3, dtype=torch.int32, device=device)
    ids[:, :image_tokens] = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(image_tokens, 3)
    filled_b = torch.tensor(rows.lengths, dtype=torch.int32, device=device)[:, None]
    ids[:, :image_tokens, 0] += filled_b + 1  # pad tokens of an image are at the origin, as are those of a prompt
    text = torch.arange(1, rows.tokens + 1, dtype=torch.int32, device=device)
    ids[:, rows.image_tokens :, 0] = torch.where(text <= filled_b, text, 0)
    freqs_bsp = embed(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
    image_pads = text_pads = None
    if rows.image_tokens > image_tokens:
        image_pads = torch.arange(rows.image_tokens, device=device) >= image_tokens
    # Also where nothing is filled up, so that prompts of other lengths share a captured graph.
    text_pads = torch.arange(rows.tokens, device=device) >= torch.tensor(lengths, device=device)[:, None]
    return Position(
        table(freqs_bsp[:, : rows.image_tokens].contiguous()),
        table(freqs_bsp[:, rows.image_tokens :].contiguous()),
        table(freqs_bsp),
        **padding(rows, device),
        image_pads=image_pads,
        text_pads=text_pads,
    )


def serves(arguments: Mapping[str, object]) -> bool:
    """Return whether `prepare` can serve these arguments of a forward."""
    others = ("siglip_feats", "image_noise_mask", "joint_attention_kwargs")
    usual = all(arguments.get(name, size) == size for name, size in _DEFAULTS.items())
    return usual and _is_one_batch(arguments["x"]) and all(arguments.get(name) is None for name in others)


def token_count(transformer: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Return the image tokens of all pictures of a batch."""
    frames, height, width = _grid(arguments)
    return len(arguments["x"]) * frames * height * width


def host_facts(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Return what `prepare` depends on beside the shapes of step inputs: the prompt lengths."""
    return tuple(len(caption) for caption in arguments["cap_feats"])


def prepare(transformer: nn.Module, arguments: Mapping[str, object]) -> tuple[Tensor, Position]:
    """Return captions and positions for `forward`: all that depends on how long each prompt is, and is no shape."""
    return _prepared(transformer, arguments, for_graph=True)


def as_output(sample: Tensor, arguments: Mapping[str, object]) -> object:
    """Return `sample` [B, C, F, H, W] in the form that the caller of `forward` asked for."""
    pictures = list(sample.unbind(0))
    return Transformer2DModelOutput(sample=pictures) if arguments.get("return_dict", True) else (pictures,)


class RewrittenZImageForward(RewrittenForward):
    """`forward` as that of one transformer."""

    function = forward


_REWRITING = DiffusersRewriting(
    RewrittenZImageBlock, RewrittenZImageForward, ZImageTransformer2DModel, (ZSingleStreamAttnProcessor,)
)
BLOCKS = LISTS
FUSED_LAYERS = _REWRITING.fused_layers
fits = _REWRITING.fits
is_rewritten = _REWRITING.is_rewritten
unsupported_reasons = _REWRITING.unsupported_reasons
to_be_fused = _REWRITING.to_be_fused
rewrite = _REWRITING.rewrite
