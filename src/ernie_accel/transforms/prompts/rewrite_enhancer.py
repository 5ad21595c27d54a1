"""Make the prompt enhancer faster, batched and reproducible."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ernie_accel.common.language import joined, said
from ernie_accel.core.components import Pipeline, is_moved_in_parts
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import wrap_call
from ernie_accel.families import family_of
from ernie_accel.families.family import PromptEnhancement
from ernie_accel.models.ministral.enhancer import unsupported_reasons
from ernie_accel.models.ministral.stand_in import EnhancerStandIn


@dataclass(frozen=True, repr=False)
class RewriteEnhancer(Transform):
    """Decode the prompt enhancer with a static cache, all prompts of a call together, sampled on the device by seed.

    On CUDA a token is one graph launch. In bfloat16 or fp8-weight-only, the layers are fused kernels that read each
    weight once for up to 16 prompts. Greedy decoding gives the tokens of stock. Sampling draws from the same
    distribution, with random numbers from the seed of the call's generator; stock draws from torch's global generator.
    So a prompt and a seed always give the same words, whatever else is in the batch.

    Whether prompts are enhanced (``use_pe``) does not change. If this cannot replace an enhancer, stock's is used, and
    the plan says why.

    Pays:
        Wherever prompts are enhanced: on a fast card, stock's enhancer takes most of the time of a picture. Adding
        `Quantize("fp8-weight-only", components=("pe",))` halves the bytes that each token reads.

    Attributes:
        max_new_tokens: Tokens of an enhanced prompt at most, >= 1; None for what the tokenizer accepts, as in stock.
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "enhancer"
    effect: ClassVar[Effect] = Effect.RESAMPLES

    max_new_tokens: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return ("pe",)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []  # where it cannot stand in, stock enhances as before

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        how = _enhancement_of(pipe)
        if how is None:
            return Preview((), note=said("this {pipe} has no prompt enhancer", pipe=type(pipe).__name__))
        model = getattr(pipe, how.model)
        if is_moved_in_parts(model) or context.planned(pipe).offload in ("sequential", "group"):
            why = said(
                "{model} is offloaded or cast layer by layer: Offload('model') or 'stages' go with this",
                model=how.model,
            )
            return Preview((), note=why)
        problems = unsupported_reasons(model, getattr(pipe, how.tokenizer))
        return Preview((), note=joined(problems)) if problems else Preview(_changes(how))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned = context.planned(pipe)
        captures = context.device == "cuda" and planned.enhances_prompts
        return planned.compiling(self.slot) if captures else planned

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        how = _enhancement_of(pipe)
        if how is None:
            raise LookupError(f"this {type(pipe).__name__} has no prompt enhancer")
        stand_in = EnhancerStandIn(pipe, how, self.max_new_tokens)
        with Undo() as undo:
            undo.setattr(pipe, how.method, stand_in.enhance_one)
            wrap_call(pipe, "enhancer", stand_in.around, undo)
        return Applied(_changes(how), undo=undo)


def _enhancement_of(pipe: Pipeline) -> PromptEnhancement | None:
    """Return how this pipe enhances prompts, or None if it does not."""
    how = family_of(pipe).prompt_enhancement
    if how is None or getattr(pipe, how.model, None) is None or getattr(pipe, how.tokenizer, None) is None:
        return None
    return how


def _changes(how: PromptEnhancement) -> tuple[str, ...]:
    return (
        said("{method} one by one -> batched, by seed", method=how.method),
        said("{model} generate -> static cache", model=how.model),
    )
