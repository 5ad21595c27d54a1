"""Forecast the transformer's output at some steps from those before, instead of computing it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import wrap_call
from ernie_accel.families import family_of
from ernie_accel.transforms.call_defaults import CallDefaults
from ernie_accel.transforms.scheduler import SCHEDULERS, SwapScheduler
from ernie_accel.transforms.scheduler.stepping import installed

#: Calls of fewer steps compute all of them: neighbouring steps of a distilled checkpoint have little in common.
LEAST_STEPS = 20
#: Every how many steps one is computed -> floor in dB; see `CacheSteps.floor_db`.
FLOORS_DB: Mapping[int, float] = MappingProxyType({2: 30.0, 3: 25.0})


@dataclass(frozen=True, repr=False)
class CacheSteps(Transform):
    """Compute the transformer at every second step or so, and forecast its output at the others.

    The velocity that a flow-matching model predicts changes slowly along a trajectory, so the line through its last two
    computed values, over the noise level, tells the next: TaylorSeer (arXiv 2503.06923) of first order, of the whole
    output. Which steps are computed is fixed and needs no threshold, no look at the device and no second graph:
    compiled, captured, rewritten and fused blocks run as they are. State is kept from the start of a call to its end.

    The caches of diffusers 0.42 run on none of the three families: their pipelines open no ``cache_context``,
    ERNIE-Image's blocks are not registered, Z-Image returns lists. cache-dit patches classes. On the embedded model,
    two prompts at 64x64, 50 steps, guidance 4, latents against those of all steps: 27 computed steps give 63 dB,
    19 (``every=3``) 43 dB, cache-dit 1.5.3 with 28 (DBCache, threshold 0.04) 35 dB. In bfloat16 and 30 steps it is 35
    and 32 dB. Computing one of four steps would leave nothing of some pictures at 20 steps.

    Pays:
        For base checkpoints at 20 to 50 steps, where it saves nearly half of the time at ``every=2``. Not for distilled
        ones: it refuses below 20 planned steps, and a call that asks for fewer computes them all. No checkpoint of full
        size has been measured.

    Attributes:
        every: Compute every second (2) or third (3) step; the others are forecast.
        first: Steps at the start that are all computed, >= 2.
        last: Steps at the end that are all computed, >= 0.
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "step-cache"  # behind "compile" and "graphs" in its phase: it must not be captured
    effect: ClassVar[Effect] = Effect.LOSSY

    every: int = 2
    first: int = field(default=3, kw_only=True)
    last: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.every not in FLOORS_DB:
            raise ValueError(f"every must be {', '.join(map(str, FLOORS_DB))} (steps), got {self.every}")
        if self.first < 2:
            raise ValueError(f"first must be >= 2 steps, because a line takes two points; got {self.first}")
        if self.last < 0:
            raise ValueError(f"last must be >= 0, got {self.last}")

    @property
    def floor_db(self) -> float:
        """SQNR of the latents against those of all steps, earned on the embedded model at 30 and 50 steps."""
        return FLOORS_DB[self.every]

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        family, kind = family_of(pipe), type(pipe).__name__
        if family is None or family.text_argument is None:
            return [f"{kind} is of no known family, and what tells its prompts apart is known family by family"]
        reasons = []
        steps = planned_steps(pipe, context)
        if steps is not None and steps < LEAST_STEPS:
            reasons.append(
                f"{steps} steps are planned, and a cache pays from {LEAST_STEPS} on: leave it out, or plan more, as in "
                "CallDefaults('quality')"
            )
        noisy = _adds_noise(pipe, context)
        if noisy is not None:
            reasons.append(f"{noisy} adds noise at every step, so the outputs before do not tell the next: use another")
        if getattr(pipe.transformer, "is_cache_enabled", False) or hasattr(pipe.transformer, "_context_manager"):
            reasons.append(f"{type(pipe.transformer).__name__} has a cache of diffusers or cache-dit: disable it first")
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        if isinstance(vars(pipe.transformer).get("forward"), Forecast):
            return Preview((), note="steps are cached already")
        return Preview(("transformer.forward",), note=self._note(pipe, context))

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        family, transformer = family_of(pipe), pipe.transformer
        if family is None or family.text_argument is None:
            raise LookupError(f"{type(pipe).__name__} is of no known family")
        note = self._note(pipe, context)
        forecast = Forecast(self, pipe, family.text_argument)
        with Undo() as undo:
            # No hook of diffusers: in a deep copy of the pipe, that would run the transformer of the original.
            undo.setattr(transformer, "forward", forecast)
            undo.setattr(pipe, "_around_cached_steps", forecast.around)
            wrap_call(pipe, "_around_cached_steps", undo)
        return Applied(("transformer.forward",), undo=undo, note=note)

    def computes(self, step: int, steps: int) -> bool:
        """Return whether step number `step`, from 0, of `steps` is computed and not forecast."""
        if steps < LEAST_STEPS or step < self.first or step >= steps - self.last:
            return True
        return (step - self.first + 1) % self.every == 0

    def _note(self, pipe: Pipeline, context: Context) -> str:
        steps = planned_steps(pipe, context)
        if steps is None:
            return f"computes one of {self.every} steps and forecasts the others"
        computed = sum(self.computes(step, steps) for step in range(steps))
        fewer = f"calls of fewer than {LEAST_STEPS} steps compute all"
        return f"computes {computed} of {steps} steps and forecasts the others; {fewer}"


class Forecast:
    """The forward of a transformer that forecasts its output at the steps that are not computed."""

    def __init__(self, wanted: CacheSteps, pipe: Pipeline, text_argument: str) -> None:
        self._wanted, self._pipe, self._text = wanted, pipe, text_argument
        self._forward = pipe.transformer.forward
        self.__signature__ = inspect.signature(self._forward)
        self._sigmas: list[float] | None = None  # of the call that is running
        self._runs: dict[tuple[int, ...], _Run] = {}
        self._in_call = False

    def around(self, call: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> Any:
        """Call the pipe; whatever was computed for another picture, or is left of this one, is forgotten."""
        self._sigmas, self._runs, self._in_call = None, {}, True
        try:
            return call(arguments)
        finally:
            self._sigmas, self._runs, self._in_call = None, {}, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the transformer computes, or the forecast of it."""
        arguments = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        if not self._in_call or arguments.get("return_dict", True) or torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        scheduler = self._pipe.scheduler
        if self._sigmas is None:
            self._sigmas = scheduler.sigmas.tolist()  # one look at the device a picture
        step = scheduler.step_index or 0
        # Lumina 2 asks for the two halves of guidance one after the other: each prompt is a run of its own.
        text = arguments.get(self._text)
        if text is None:
            return self._forward(*args, **kwargs)
        texts = tuple(text) if isinstance(text, (list, tuple)) else (text,)
        run = self._runs.setdefault(tuple(map(id, texts)), _Run(texts))
        steps = -(-len(scheduler.timesteps) // scheduler.order)  # some samplers evaluate twice a step, not in the last
        if len(run.points) < 2 or self._wanted.computes(step // scheduler.order, steps):
            output = self._forward(*args, **kwargs)
            run.points = [*run.points[-1:], (self._sigmas[step], output[0])]
            return output
        return (run.forecast(self._sigmas[step]),)


@dataclass
class _Run:
    """The last computed outputs of one prompt, or of one batch of them.

    Attributes:
        texts: What its outputs were computed for; kept, so that no other tensor takes its identity.
        points: (sigma, output), the earlier first; an output is a tensor, or a list of one tensor a picture.
    """

    texts: tuple[Tensor, ...]
    points: list[tuple[float, Any]] = field(default_factory=list)

    def forecast(self, sigma: float) -> Any:
        """Return the value at `sigma` of the line through the two points."""
        (before, old), (after, new) = self.points
        reach = (sigma - after) / (after - before)
        if isinstance(new, Tensor):
            return _beyond(old, new, reach)
        return [_beyond(old_one, new_one, reach) for old_one, new_one in zip(old, new, strict=True)]


def _beyond(old: Tensor, new: Tensor, reach: float) -> Tensor:
    line = new.float() + reach * (new.float() - old.float())
    return line.to(new.dtype)


def planned_steps(pipe: Pipeline, context: Context) -> int | None:
    """Return how many steps a call takes that says nothing of them; None where the pipe has no such default."""
    defaults = context.planned_one(CallDefaults)
    wanted = defaults.wanted(pipe).get("num_inference_steps") if defaults is not None else None
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    found = wanted if wanted is not None else parameter.default if parameter is not None else None
    return found if isinstance(found, int) else None


def _adds_noise(pipe: Pipeline, context: Context) -> str | None:
    """Return the scheduler that the pipe will have by then, in words, if it is a stochastic one."""
    swap, own = context.planned_one(SwapScheduler), installed(pipe.scheduler)
    name = swap.name if swap is not None else own.name if own is not None else "euler"
    solver = SCHEDULERS[name]
    if solver is not None and solver.stochastic:
        return repr(swap) if swap is not None else f"the scheduler ({name!r})"
    if swap is None and pipe.scheduler.config.get("stochastic_sampling"):
        return "the scheduler (stochastic_sampling=True)"
    return None
