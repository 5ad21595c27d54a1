"""Replay the denoiser as one CUDA graph where launching its kernels takes longer than running them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ernie_accel.common.language import joined, listed, said
from ernie_accel.core.components import DENOISERS, Pipeline, other_denoisers_note
from ernie_accel.core.context import Context
from ernie_accel.core.planned import Blocks, PlannedPipe
from ernie_accel.core.stand_in import standing_in
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of
from ernie_accel.models.graphed_forward import FEW_TOKENS, MANY_TOKENS, GraphedForward
from ernie_accel.models.rewritten import rewritten_blocks, rewritten_model, whose

#: Components whose results the transformer takes as arguments that no graph is captured with.
_UNCAPTURED = ("siglip",)


@dataclass(frozen=True, repr=False)
class CaptureGraphs(Transform):
    """Capture the transformer's forward into a CUDA graph for each shape of its inputs, and replay it.

    The first step of a new shape runs uncaptured, the second is captured, and the others are replays. So of a picture
    of eight steps, six need no launches. Image size and prompt length make a shape; where `FuseKernels` pads tokens,
    64 prompt lengths share one. Only the graphs of the last few shapes are kept. Changes are noticed at the next step:
    weights that were moved or replaced, adapters that were loaded, scaled, switched or merged, another attention
    backend. If a layer has hooks, nothing is captured, nor are calls under autocast.

    Pays:
        Below about 700 x 700 pixels. At 256x256 a step takes 11.2 ms in compiled blocks and 10.9 with ``turbo-bf16``,
        which adds graphs; 7.7 with ``turbo-fp8``, where torchao's compiled fp8 without graphs takes 21.8. Above, where
        the host is slow, or busy with other things.

    Attributes:
        max_tokens: Images of more tokens (of 16 x 16 pixels), times the batch, are not captured. None: 2048, or 8448
            where attention is in fp8 and more than 8 GiB of the device's memory are free when such a picture is drawn.
            8448 is two pictures of about 1024 x 1024, or one with guidance.
        keep: How many shapes to keep graphs of.
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "graphs"
    effect: ClassVar[Effect] = Effect.EXACT

    max_tokens: int | None = field(default=None, kw_only=True)
    keep: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        if (self.max_tokens or 0) < 0 or self.keep < 1:
            raise ValueError(f"max_tokens must be >= 0 and keep >= 1, got {self.max_tokens} and {self.keep}")

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return DENOISERS

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []  # where it cannot work it does nothing, and the pipe computes the same

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        if context.device != "cuda":
            return Preview((), note=said("CUDA graphs need a CUDA device; this is {device}", device=context.device))
        if rewritten_model(pipe) is None:
            name = family_of(pipe).name_for(pipe)
            return Preview(
                (),
                note=said(
                    "it builds on rewritten blocks, and there are none for {name} {whose}", name=name, whose=whose(pipe)
                ),
            )
        planned = context.planned(pipe)
        if planned.blocks is Blocks.STOCK and not rewritten_blocks(pipe).is_rewritten(pipe.transformer):
            return Preview((), note=said("the stock forward cannot be captured: add RewriteBlocks()"))
        if planned.autocast is not None:
            return Preview(
                (),
                note=said("what runs under autocast, here to {autocast}, is not captured", autocast=planned.autocast),
            )
        if standing_in(pipe.transformer, GraphedForward) is not None:
            return Preview((), note=said("the transformer's forward is captured already"))
        return Preview(("transformer.forward",), note=joined((other_denoisers_note(pipe), _uncaptured_note(pipe))))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned = context.planned(pipe)
        most = self.max_tokens
        if most is None:
            most = MANY_TOKENS if planned.always_lengths else FEW_TOKENS
        planned = replace(planned, keeps_graphs=self.keep, graph_tokens=most)
        return planned.compiling(self.slot)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        transformer, blocks = pipe.transformer, rewritten_blocks(pipe)
        with Undo() as undo:
            GraphedForward(transformer, blocks, self.max_tokens, self.keep).install(undo)
        return Applied(("transformer.forward",), undo=undo)


def _uncaptured_note(pipe: Pipeline) -> str:
    """Return that calls that take results of other models of `pipe` are not captured; "" without such models."""
    found = [name for name in _UNCAPTURED if getattr(pipe, name, None) is not None]
    if not found:
        return ""
    return said("calls that take results of {names} are not captured", names=listed(found))
