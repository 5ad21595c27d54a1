"""Let the prompt enhancer write faster, for many prompts at once, and reproducibly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ernie_accel.core.components import Pipeline, is_moved_in_parts
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import wrap_call
from ernie_accel.families import family_of
from ernie_accel.families.family import PromptEnhancement
from ernie_accel.models.ministral.enhancer import TEMPERATURE, TOP_P, PromptEnhancer, Wish, why_not


@dataclass(frozen=True, repr=False)
class RewriteEnhancer(Transform):
    """Decode the prompt enhancer with a static cache, all prompts of a call together, sampled on the device by seed.

    On CUDA a token is one graph launch, and in bfloat16 or fp8-weight-only its layers are fused kernels that read each
    weight once for up to 16 prompts. Greedy decoding gives the tokens of stock. Sampling draws from the same
    distribution, with random numbers of the call's generator's seed, so that a prompt and a seed always give the same
    words, whatever else is in the batch; stock draws from torch's global random numbers. Whether prompts are enhanced
    (``use_pe``) stays as it is. An enhancer that it cannot stand in for is left to stock, and the plan says why.

    Pays:
        Wherever prompts are enhanced: there, on a fast card, stock's enhancer takes most of the time of a picture.
        `Quantize("fp8-weight-only", components=("pe",))` beside it halves what a token reads.

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

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []  # where it cannot stand in, stock enhances as before

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        how = _enhancement_of(pipe)
        if how is None:
            return Preview((), note=f"this {type(pipe).__name__} has no prompt enhancer")
        model = getattr(pipe, how.model)
        if is_moved_in_parts(model) or context.planned(pipe).offload in ("sequential", "group"):
            why = f"{how.model} is offloaded or cast layer by layer: Offload('model') or 'stages' go with this"
            return Preview((), note=why)
        problems = why_not(model, getattr(pipe, how.tokenizer))
        return Preview((), note="; ".join(problems)) if problems else Preview(_changes(how))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned = context.planned(pipe)
        captures = context.device == "cuda" and planned.enhances_prompts
        return planned.compiling(self.slot) if captures else planned

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        how = _enhancement_of(pipe)
        if how is None:
            raise LookupError(f"this {type(pipe).__name__} has no prompt enhancer")
        stand_in = _StandIn(pipe, how, self.max_new_tokens)
        with Undo() as undo:
            undo.setattr(pipe, how.method, stand_in.enhance_one)
            undo.setattr(pipe, "_enhance_prompts", stand_in.enhance)
            undo.setattr(pipe, "_forget_enhancer", stand_in.forget)
            undo.setattr(pipe, "_around_enhancer", stand_in.around)
            wrap_call(pipe, "_around_enhancer", undo)
        return Applied(_changes(how), undo=undo)


class _StandIn:
    """What stands in for a pipeline's method that enhances one prompt."""

    def __init__(self, pipe: Pipeline, how: PromptEnhancement, max_new_tokens: int | None) -> None:
        self._pipe, self._how, self._max_new_tokens = pipe, how, max_new_tokens
        self._enhancer: PromptEnhancer | None = None
        self._wishes: list[Wish] = []  # the prompts of the call under way
        self._answers: list[str] = []  # to them, once the first was asked for
        self._asked = 0

    def around(self, call: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> Any:
        """Call the pipe; what it asks for first, after its checks, enhances all its prompts together."""
        prompts = arguments["prompt"]
        if not arguments[self._how.switch] or prompts is None:
            return call(arguments)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = _seeds(arguments["generator"], len(prompts), arguments["num_images_per_prompt"])
        size = arguments["width"], arguments["height"]
        self._wishes = [Wish(prompt, *size, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        try:
            return call(arguments)
        finally:
            self._wishes, self._answers, self._asked = [], [], 0

    def enhance_one(
        self,
        prompt: str,
        device: torch.device,
        width: int = 1024,
        height: int = 1024,
        system_prompt: str | None = None,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
    ) -> str:
        """Return the enhanced prompt, as the pipeline's own method; outside of a call, sampled by a fresh seed."""
        if self._wishes:
            self._answers = self._answers or self.enhance(self._wishes)
            self._asked += 1
            return self._answers[(self._asked - 1) % len(self._answers)]  # `CheckFinite` may make a call twice
        wish = Wish(prompt, width, height, _fresh_seed())
        return self.enhance([wish], system_prompt=system_prompt, temperature=temperature, top_p=top_p)[0]

    def enhance(self, wishes: Sequence[Wish], *, max_new_tokens: int | None = None, **settings: Any) -> list[str]:
        """Return the enhanced prompts; see `PromptEnhancer.enhance`. The transform's limit of tokens is the default."""
        model = getattr(self._pipe, self._how.model)
        if self._enhancer is None or not self._enhancer.enhances_with(model):
            self._enhancer = PromptEnhancer(model, getattr(self._pipe, self._how.tokenizer))
        return self._enhancer.enhance(wishes, max_new_tokens=max_new_tokens or self._max_new_tokens, **settings)

    def forget(self) -> None:
        """Let go of what is kept on the device between calls, and of a model that is no longer the pipe's."""
        self._enhancer = None


def _enhancement_of(pipe: Pipeline) -> PromptEnhancement | None:
    """Return how this pipe enhances prompts, or None if it does not."""
    family = family_of(pipe)
    how = None if family is None else family.prompt_enhancement
    if how is None or getattr(pipe, how.model, None) is None or getattr(pipe, how.tokenizer, None) is None:
        return None
    return how


def _changes(how: PromptEnhancement) -> tuple[str, ...]:
    return (f"{how.method} one by one -> batched, by seed", f"{how.model} generate -> static cache")


def _seeds(generator: Any, prompts: int, pictures: int) -> list[int]:
    """Return a seed for each prompt of a call, from its generators as they were seeded; a list of one is that one."""
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        (generator,) = generator
    if not generator:
        return [_fresh_seed() for _ in range(prompts)]
    if isinstance(generator, torch.Generator):
        return [(generator.initial_seed() + i) % 2**64 for i in range(prompts)]
    # Too few are an error of the call, which says so itself.
    return [generator[min(i * pictures, len(generator) - 1)].initial_seed() for i in range(prompts)]


def _fresh_seed() -> int:
    return int(torch.randint(2**62, ()))  # of the global random numbers, so that torch.manual_seed covers it
