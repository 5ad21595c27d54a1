"""Replace a pipeline's method that enhances one prompt: all prompts of a call are enhanced together, by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ernie_accel.core.components import Pipeline
from ernie_accel.core.wrap_call import Arguments, Call, wrapper
from ernie_accel.families.family import PromptEnhancement
from ernie_accel.models.ministral.enhancer import TEMPERATURE, TOP_P, EnhanceRequest, PromptEnhancer


class EnhancerStandIn:
    """What stands in for a pipeline's method that enhances one prompt."""

    def __init__(self, pipe: Pipeline, how: PromptEnhancement, max_new_tokens: int | None) -> None:
        self._pipe, self._how, self._max_new_tokens = pipe, how, max_new_tokens
        self._enhancer: PromptEnhancer | None = None
        self._requests: list[EnhanceRequest] = []  # the prompts of the call under way
        self._answers: list[str] = []  # to them, once the first was asked for
        self._asked = 0

    def around(self, call: Call, arguments: Arguments) -> object:
        """Call the pipe; the first prompt that it asks for, after its checks, has all its prompts enhanced together."""
        prompts = arguments["prompt"]
        if not arguments[self._how.switch] or prompts is None:
            return call(arguments)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = _seeds(arguments["generator"], len(prompts), arguments["num_images_per_prompt"])
        size = arguments["width"], arguments["height"]
        self._requests = [EnhanceRequest(prompt, *size, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        try:
            return call(arguments)
        finally:
            self._requests, self._answers, self._asked = [], [], 0

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
        if self._requests:
            self._answers = self._answers or self.enhance(self._requests)
            self._asked += 1
            return self._answers[(self._asked - 1) % len(self._answers)]  # `CheckFinite` may make a call twice
        request = EnhanceRequest(prompt, width, height, _fresh_seed())
        return self.enhance([request], system_prompt=system_prompt, temperature=temperature, top_p=top_p)[0]

    def enhance(
        self, requests: Sequence[EnhanceRequest], *, max_new_tokens: int | None = None, **settings: Any
    ) -> list[str]:
        """Return the enhanced prompts; see `PromptEnhancer.enhance`. The transform's limit of tokens is the default."""
        model = getattr(self._pipe, self._how.model)
        if self._enhancer is None or not self._enhancer.enhances_with(model):
            self._enhancer = PromptEnhancer(model, getattr(self._pipe, self._how.tokenizer))
        return self._enhancer.enhance(requests, max_new_tokens=max_new_tokens or self._max_new_tokens, **settings)

    def forget(self) -> None:
        """Free what is kept on the device between calls, and a model that is no longer the pipe's."""
        self._enhancer = None


def enhancer_of(pipe: Pipeline) -> EnhancerStandIn | None:
    """Return what replaces the prompt enhancement of `pipe`; None if nothing does."""
    return wrapper(pipe, "enhancer", EnhancerStandIn)


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, prompts: int, pictures: int) -> list[int]:
    """Return a seed for each prompt of a call, from its generators as they were seeded; a list of one is that one."""
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        (generator,) = generator
    if not generator:
        return [_fresh_seed() for _ in range(prompts)]
    if isinstance(generator, torch.Generator):
        return [(generator.initial_seed() + i) % 2**64 for i in range(prompts)]
    # If there are too few, the call itself raises an error.
    return [generator[min(i * pictures, len(generator) - 1)].initial_seed() for i in range(prompts)]


def _fresh_seed() -> int:
    return int(torch.randint(2**62, ()))  # of the global random numbers, so that torch.manual_seed covers it
