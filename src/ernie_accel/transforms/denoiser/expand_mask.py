"""Expand attention masks for kernels that refuse to broadcast them, as those of Ascend NPUs do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ernie_accel.common.language import listed, said
from ernie_accel.core.components import DENOISERS, Pipeline, denoisers_of
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of
from ernie_accel.models.fused_npu import prepared
from ernie_accel.models.masks import PaddingWatch, map_masks, masked_blocks, watch_padding
from ernie_accel.models.processors import passed_by, send_through_dispatcher

#: An additive mask masks a token out by adding this or less; anything between it and 0 is a bias.
MASKED_BELOW = -1e4


@dataclass(frozen=True, repr=False)
class ExpandAttentionMask(Transform):
    """Expand the blocks' masks from [B, S] or [B, 1, 1, S] to contiguous bool [B, 1, S, S], True where attended.

    On Ascend, FlashAttentionScore computes both ``scaled_dot_product_attention`` and ``npu_fusion_attention``. It
    accepts [B, N, Sq, Skv], [B, 1, Sq, Skv], [1, 1, Sq, Skv] and [Sq, Skv] only, and refuses a broadcast mask
    (``get unsupported atten_mask shape, the shape is [16, 1, 1, 1500]``; ops-transformer,
    flash_attention_score_tiling_general.cpp). In the fusion kernel, True means masked out. The "npu" backend of
    diffusers inverts the mask it gets, but reads 0 and -inf of an additive mask as the opposite of what they mean. So
    additive masks become bool here.

    The mask is expanded and inverted once for all blocks, and in ERNIE-Image once for all steps of a picture. Both
    masks take S * S bytes per prompt (18 MB at 1024x1024). With ``SetAttention("npu")`` the fused kernel gets the
    inverted mask as it is, or none where nothing is padded. diffusers alone checks in every layer whether a mask masks
    anything, which waits for the device, and expands and inverts it. Compiled blocks expand inside their graphs.

    Pays:
        On Ascend, where a padded batch does not run without it. Nowhere else, because other kernels broadcast.
    """

    phase: ClassVar[Phase] = Phase.ATTENTION
    slot: ClassVar[str] = "attention-mask-shape"
    effect: ClassVar[Effect] = Effect.ROUNDING

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return DENOISERS

    def keeps_compiled(self, pipe: Pipeline, context: Context) -> bool:
        return True

    def family_reasons(self, pipe: Pipeline) -> list[str]:
        return [] if family_of(pipe).is_known else self._reasons(pipe)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return self._reasons(pipe)

    def _reasons(self, pipe: Pipeline) -> list[str]:
        masked = self._masked(pipe)
        if not masked:
            denoisers = listed(denoisers_of(pipe)) or "transformer"
            return [
                said(
                    "{pipe}: no block of its {denoisers} takes an attention mask",
                    pipe=type(pipe).__name__,
                    denoisers=denoisers,
                )
            ]
        blocks = (block for denoiser in masked.values() for _, block, *_ in masked_blocks(denoiser))
        own = {type(block).__name__ for block in blocks} & EXPAND_THEMSELVES
        if own:
            return [said("{own} expands its mask to [B, 1, S, S] itself: leave this out", own=listed(sorted(own)))]
        folding = dict.fromkeys(name for denoiser in masked.values() for name in passed_by(denoiser))
        return [
            said("{name} folds every mask to [B, 1, 1, S] itself, after which it cannot be expanded", name=name)
            for name in folding
        ]

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        note = (
            ""
            if context.device == "npu"
            else said("only Ascend's kernels need this, and this is {device}", device=context.device)
        )
        return Preview(self._changes(pipe), note=note)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        how = family_of(pipe).always_masks
        with Undo() as undo:
            watch = watch_padding(pipe, how, undo) if how is not None else None
            for name, denoiser in self._masked(pipe).items():
                send_through_dispatcher(denoiser, undo)
                # The family knows the padding of its transformer. Another denoiser has masks and a memory of its own.
                map_masks(denoiser, Expansion(watch if name == "transformer" else None), undo)
        return Applied(self._changes(pipe), undo=undo)

    def _changes(self, pipe: Pipeline) -> tuple[str, ...]:
        masked = self._masked(pipe).items()
        return tuple(f"{name}.{path}" for name, denoiser in masked for path, *_ in masked_blocks(denoiser))

    def _masked(self, pipe: Pipeline) -> dict[str, nn.Module]:
        """Return the denoisers with blocks that take a mask."""
        return {name: denoiser for name, denoiser in denoisers_of(pipe).items() if any(masked_blocks(denoiser))}


#: Blocks of diffusers that take a mask [B, S] and make the products of its rows and columns themselves (Chroma).
EXPAND_THEMSELVES = frozenset({"ChromaTransformerBlock", "ChromaSingleTransformerBlock"})


class Expansion:
    """Mask -> [B, 1, S, S], remembered while the same batch is being denoised."""

    def __init__(self, watch: PaddingWatch | None) -> None:
        self._watch = watch
        #: Source of the mask, and the mask. One value, because another thread may put its own in the place.
        self._known: tuple[object, Tensor] | None = None

    def __call__(self, mask: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return expand(mask)
        # The padding of a batch outlives the mask, which the transformer builds anew for every step.
        padding = self._watch.padding if self._watch is not None else None
        source = mask if padding is None else padding
        known = self._known
        if known is not None and known[0] is source:
            expanded_b1ss = known[1]
            if expanded_b1ss.shape[-1] == mask.shape[-1] and expanded_b1ss.device == mask.device:
                return expanded_b1ss
        expanded_b1ss = prepared(expand(mask), pads=padding is None or padding.padded)
        self._known = source, expanded_b1ss
        return expanded_b1ss


def expand(mask: Tensor) -> Tensor:
    """Return a self-attention mask as contiguous bool [B, 1 or N, S, S], True where attended.

    Args:
        mask: [B, S], [B, S, S] or [B, 1 or N, 1 or S, S]. Bool or integer: nonzero attends. Floating point: additive,
            as ``scaled_dot_product_attention`` takes it: 0 attends, -1e4 and less does not.

    Raises:
        ErnieAccelError: A floating-point mask holds biases, which no bool can express.
    """
    attended = is_attended(mask)
    if attended.ndim == 2:
        attended = attended[:, None, None, :]
    elif attended.ndim == 3:
        attended = attended[:, None]
    return attended.expand(-1, -1, attended.shape[-1], -1).contiguous()


def is_attended(mask: Tensor) -> Tensor:
    """Return a mask of any dtype as bool of the same shape, True where attended; see `expand`."""
    if not mask.is_floating_point():
        return mask != 0
    attended = mask == 0
    if not torch.compiler.is_compiling() and not bool((attended | (mask <= MASKED_BELOW)).all()):
        low, high = mask.min().item(), mask.max().item()
        raise ErnieAccelError(
            f"ExpandAttentionMask() got an additive mask with biases (values from {low:g} to {high:g}); expected 0 for "
            f"attended and {MASKED_BELOW:g} or less for masked tokens. Pass a bool mask."
        )
    return attended
