"""Drop an attention mask that masks nothing: flash kernels refuse masks, and others are slower with one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ernie_accel.common.language import said
from ernie_accel.core.components import DENOISERS, Pipeline, other_denoisers_note
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of
from ernie_accel.models.masks import PaddingWatch, map_masks, masked_blocks, no_mask_reason, watch_padding


@dataclass(frozen=True, repr=False)
class ElideMask(Transform):
    """Drop the blocks' attention mask where no prompt of the batch is padded; keep it where one is.

    ERNIE-Image builds an all-True mask for every forward. Flash and sage kernels refuse any mask (diffusers issue
    13801), and cuDNN takes 1.6 times as long with one (0.72 instead of 0.44 ms at [1, 32, 4224, 128] on an H200).

    The pipeline pads on the host, so the host knows without a device synchronisation whether anything is padded. A
    compiled block has one graph with a mask and one without. On the CPU the bits stay the same; elsewhere torch may
    choose another kernel. If you call the transformer with tensors of your own, each call reads their lengths once; in
    a transformer that is compiled as a whole, such calls keep their mask.

    Pays:
        With one prompt per call, or prompts of one length, and no guidance, on every accelerator. With guidance, an
        empty negative prompt is always padded, so there is no gain. RewriteBlocks does the same by itself.
    """

    phase: ClassVar[Phase] = Phase.ATTENTION
    slot: ClassVar[str] = "attention-mask"
    effect: ClassVar[Effect] = Effect.ROUNDING

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return DENOISERS

    def keeps_compiled(self, pipe: Pipeline, context: Context) -> bool:
        return True

    def family_reasons(self, pipe: Pipeline) -> list[str]:
        return family_of(pipe).unknown_reasons(pipe, said("which masks can go is known family by family"))

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return self.family_reasons(pipe)

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        note = no_mask_reason(pipe, context)
        return Preview(() if note else self._changes(pipe), note=note or other_denoisers_note(pipe))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), elides_mask=said("{transform} drops it", transform=repr(self)))

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        how = family_of(pipe).always_masks
        if how is None:
            raise LookupError(f"{type(pipe).__name__} builds no mask that could be elided")
        with Undo() as undo:
            watch = watch_padding(pipe, how, undo)
            map_masks(pipe.transformer, Elision(watch), undo)
        return Applied(self._changes(pipe), undo=undo)

    def _changes(self, pipe: Pipeline) -> tuple[str, ...]:
        return tuple(f"transformer.{path}" for path, *_ in masked_blocks(pipe.transformer))


class Elision:
    """Mask -> None where the running forward pads nothing, else the mask."""

    def __init__(self, watch: PaddingWatch) -> None:
        self._watch = watch

    def __call__(self, mask: Tensor) -> Tensor | None:
        return None if self._watch.elided else mask
