"""Compute both halves of guidance as one batch, where the pipeline calls its transformer once for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ernie_accel.common.language import said
from ernie_accel.core.components import DENOISERS, Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.planned import Blocks, PlannedPipe
from ernie_accel.core.stand_in import standing_in
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import wrap_call
from ernie_accel.families import family_of
from ernie_accel.models.guided_forward import EncodeBoth, GuidedForward
from ernie_accel.models.rewritten import attends_by_lengths, rewritten_blocks, rewritten_model, whose


@dataclass(frozen=True, repr=False)
class BatchGuidance(Transform):
    """Compute both calls of a guided step, with the prompt and with the negative one, as one batch of two.

    Lumina 2's pipelines, on which NewBie-image runs in diffusers, call the transformer twice a step; ERNIE-Image's,
    Z-Image's and that of NewBie-image's authors make one batch of both themselves. At the first call of a step, the
    second is predicted and computed along with it, and its result waits until it is asked for. It is returned only if
    latents, time step, prompt, adapters and hooks are what was predicted; any other call is computed on its own. A step
    that does not ask for the second call (``cfg_trunc_ratio``) costs one half that is not needed; the steps after it
    are computed one by one.

    Prompts of unequal lengths share a batch by their lengths, on fused kernels with attention by lengths, or by a mask,
    on the CPU. Elsewhere a mask would slow attention down, so only prompts of equal lengths are computed together.
    Activations take the memory of two rows. The backends "cache-dit" and "diffusers" of `CacheSteps` judge each half on
    its own, so they compute it on its own.

    Pays:
        Below about 700 x 700 pixels, where one row leaves the GPU partly idle. It needs `RewriteBlocks`, and on a GPU
        `FuseKernels` with the extra "cudnn".
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "guidance"  # behind "graphs" in its phase: the batch of two is captured
    effect: ClassVar[Effect] = Effect.ROUNDING

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return DENOISERS

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []  # where it cannot work it does nothing, and the pipe computes the same

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        family = family_of(pipe)
        name, calls = family.name_for(pipe), family.guidance_calls
        if calls is None:
            return Preview(
                (), note=said("nothing says that {name} calls its transformer for each half of guidance", name=name)
            )
        if rewritten_model(pipe) is None:
            return Preview(
                (),
                note=said(
                    "it builds on rewritten blocks, and there are none for {name} {whose}", name=name, whose=whose(pipe)
                ),
            )
        planned = context.planned(pipe)
        if planned.blocks is Blocks.STOCK and not rewritten_blocks(pipe).is_rewritten(pipe.transformer):
            return Preview((), note=said("it builds on rewritten blocks: add RewriteBlocks()"))
        if standing_in(pipe.transformer, GuidedForward) is not None:
            return Preview((), note=said("both halves of guidance are one batch already"))
        masks = context.device != "cpu" and not attends_by_lengths(pipe, context)
        equal = said("where prompt and negative prompt have equally many tokens: others would need a mask")
        note = equal if masks else ""
        return Preview(("transformer.forward", said("guidance two calls -> one batch")), note=note)

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), batches_guidance=True)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        family = family_of(pipe)
        calls, found = family.guidance_calls, self.preview(pipe, context)
        if calls is None:
            raise LookupError(f"how {type(pipe).__name__} guides is not known")
        guided = GuidedForward(pipe.transformer, family.rewritten, calls)
        with Undo() as undo:
            guided.install(undo)
            if callable(getattr(type(pipe), calls.method, None)):
                undo.setattr(pipe, calls.method, EncodeBoth(pipe, calls.method, calls.prompt_of(pipe.transformer)))
            wrap_call(pipe, "guidance", guided.around, undo)
        return Applied(found.changes, undo=undo, note=found.note)
