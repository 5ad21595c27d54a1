"""Skip work at some steps of a picture; a backend approximates the result."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from ernie_accel.common.language import joined, said
from ernie_accel.core.captured import Fingerprint
from ernie_accel.core.compiled import is_compiled_whole
from ernie_accel.core.components import DENOISERS, Pipeline, uncached_denoisers_note
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.stand_in import StandInForward, shadow, standing_in
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import Arguments, Call, wrap_call
from ernie_accel.families import family_of
from ernie_accel.samplers.solvers import SCHEDULERS
from ernie_accel.samplers.stepping import installed
from ernie_accel.transforms.denoiser.cache_steps.backend import MOST_THRESHOLD, CacheBackend, Run, Trajectory
from ernie_accel.transforms.denoiser.cache_steps.db_cache import DbCache
from ernie_accel.transforms.denoiser.cache_steps.first_block import FirstBlock
from ernie_accel.transforms.denoiser.cache_steps.forecast import Forecast

#: All backends by name, the default first.
BACKENDS: Mapping[str, CacheBackend] = MappingProxyType(
    {backend.name: backend for backend in (Forecast(), DbCache(), FirstBlock())}
)
#: Calls of fewer steps compute all of them: neighbouring steps of a distilled checkpoint have little in common.
LEAST_STEPS = 20


@dataclass(frozen=True, repr=False)
class CacheSteps(Transform):
    """Compute the transformer in full at some steps only, and approximate its output at the others.

    There are three backends. Each starts anew with every call of the pipe, and is off in calls of fewer than 20 steps.
    Of image to image at a strength below 1, only the steps that the call runs count: 24 of 40 at 0.6.

    - "forecast" (the default): the velocity that a flow-matching model predicts changes slowly along a trajectory. So
      the line through its last two computed values, over the noise level, predicts the next one. This is TaylorSeer
      (arXiv 2503.06923) of first order, applied to the whole output. The computed steps are fixed. There is no
      threshold, no device synchronisation and no second graph, so compiled, captured, rewritten and fused blocks run
      unchanged.
    - "cache-dit": DBCache of that package with its Taylor calibrator. The first block runs at every step. If its
      residual changed by less than `threshold`, the others are skipped, but never at two steps in a row.
    - "diffusers": its first-block cache. It works the same way without a calibrator, and may skip any number of steps
      in a row.

    The last two read a value from the device at every step, so they cannot be combined with captured graphs. Neither
    package patches a class here. ``docs/concepts.md`` says what both do on their own, and why that does not work. A
    transformer that your script compiles as a whole after ``optimize`` computes all of its steps, and a warning says
    so: leave the compiling to ``Compile()``.

    Distance of the latents from those of all steps, on the embedded model, two prompts at 64x64, guidance 4: at 50
    steps, forecast has 63 dB with 27 computed steps and 43 dB with 19 (``every=3``), cache-dit 1.5.3 has 57 dB with 29,
    and diffusers 50 dB with 25. In bfloat16 at 30 steps these are 35, 32, 35 and 35 dB. Computing one of four steps
    would destroy some pictures at 20 steps.

    Pays:
        For base checkpoints at 20 to 50 steps, of which ``every=2`` computes little more than half. Not for distilled
        ones: it refuses below 20 planned steps, and a call with fewer steps computes them all. No checkpoint of full
        size has been measured, and thresholds only on the embedded model.

    Attributes:
        every: For "forecast": compute every second (2) or third (3) step; the others are forecast.
        backend: "forecast", "cache-dit" (needs the extra of that name) or "diffusers".
        threshold: For "cache-dit" and "diffusers": the mean change of the first block's residual, relative to its mean,
            up to which the other blocks are skipped; above 0, at most 0.05. A lower value is more accurate and saves
            less.
        first: Steps at the start that are all computed, >= 2.
        last: Steps at the end that are all computed, >= 0.
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "step-cache"  # behind "compile" and "graphs" in its phase: it must not be captured
    effect: ClassVar[Effect] = Effect.LOSSY

    every: int = 2
    backend: str = field(default="forecast", kw_only=True)
    threshold: float = field(default=MOST_THRESHOLD, kw_only=True)
    first: int = field(default=3, kw_only=True)
    last: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        known = BACKENDS
        if self.backend not in known:
            raise UnknownNameError("backend of CacheSteps", self.backend, known)
        takers = {name: [each.name for each in known.values() if name in each.takes] for name in ("every", "threshold")}
        wrong = [
            f"{f.name}={getattr(self, f.name)} is for backend={' or '.join(map(repr, takers[f.name]))}, not for "
            f"{self.backend!r}: leave it out"
            for f in fields(self)
            if f.name in takers and self.backend not in takers[f.name] and getattr(self, f.name) != f.default
        ]
        wrong += known[self.backend].bad_values(self)
        if self.first < 2:
            wrong.append(f"first must be >= 2 steps, because a line takes two points; got {self.first!r}")
        if self.last < 0:
            wrong.append(f"last must be >= 0, got {self.last!r}")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def floor_db(self) -> float:
        """SQNR of the latents against those of all steps, earned on the embedded model at 20, 30 and 50 steps."""
        return BACKENDS[self.backend].floor_db(self)

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return DENOISERS

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        family = family_of(pipe)
        if family.text_argument is None:
            unknown = family.unknown_reasons(pipe, said("which argument holds the prompts is known for each family"))
            return unknown or [
                said("{name} does not say which argument holds the prompts (Family.text_argument)", name=family.name)
            ]
        reasons = []
        steps = context.planned(pipe).num_inference_steps
        if steps is not None and steps < LEAST_STEPS:
            reasons.append(
                said(
                    "{steps} steps are planned, and a cache pays from {least_steps} on: leave it out, or plan more, as "
                    "in CallDefaults('quality')",
                    steps=steps,
                    least_steps=LEAST_STEPS,
                )
            )
        noisy = _adds_noise(pipe, context)
        if noisy is not None:
            reasons.append(
                said(
                    "{noisy} adds noise at every step, so earlier outputs do not predict the next: use another",
                    noisy=noisy,
                )
            )
        if getattr(pipe.transformer, "is_cache_enabled", False) or hasattr(pipe.transformer, "_context_manager"):
            reasons.append(
                said(
                    "{transformer} has a cache of diffusers or cache-dit: disable it first",
                    transformer=type(pipe.transformer).__name__,
                )
            )
        return reasons + BACKENDS[self.backend].unsupported(pipe, context)

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        if standing_in(pipe.transformer, CachedForward) is not None:
            return Preview((), note=said("steps are cached already"))
        return Preview(("transformer.forward",), note=self._note(pipe, context))

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        text_argument = family_of(pipe).text_argument
        if text_argument is None:
            raise LookupError(f"the prompts of {type(pipe).__name__} cannot be told apart")
        note = self._note(pipe, context)
        cached = CachedForward(self, pipe, text_argument)
        with Undo() as undo:
            # No hook of diffusers: in a deep copy of the pipe, that would run the transformer of the original.
            cached.install(undo)
            wrap_call(pipe, "cached_steps", cached.around, undo)
        return Applied(("transformer.forward",), undo=undo, note=note)

    def computes(self, step: int, steps: int) -> bool:
        """Return whether step number `step`, from 0, of `steps` is computed and not forecast."""
        if steps < LEAST_STEPS or step < self.first or step >= steps - self.last:
            return True
        return (step - self.first + 1) % self.every == 0

    def _note(self, pipe: Pipeline, context: Context) -> str:
        steps = context.planned(pipe).num_inference_steps
        note = joined((BACKENDS[self.backend].note(self, steps), uncached_denoisers_note(pipe)))
        if "strength" in inspect.signature(type(pipe).__call__).parameters:
            return said(
                "{note}; calls that run fewer than {least_steps} steps, at a strength below 1 too, compute all",
                note=note,
                least_steps=LEAST_STEPS,
            )
        return (
            note
            if steps is None
            else said("{note}; calls of fewer than {least_steps} steps compute all", note=note, least_steps=LEAST_STEPS)
        )


@dataclass
class _Picture:
    """What is remembered during one call of a pipe.

    Attributes:
        of: The stand-in whose pipe is called. Others over the same transformer compute their steps in full.
        trajectory: The steps of the call; None before the first.
        begins_at: Index of the first evaluation in the schedule.
        runs: By the kind of output and the identity of the encoded prompts, which are kept so that no other tensor
            takes it.
        seen: What the transformer was when the runs began.
    """

    of: CachedForward
    trajectory: Trajectory | None = None
    begins_at: int = 0
    runs: dict[tuple[int, ...], tuple[tuple[Tensor, ...], Run]] = field(default_factory=dict)
    seen: Fingerprint | None = None


#: The call that is running. Of this thread: another one may draw with the same transformer and another pipe.
_picture: contextvars.ContextVar[_Picture | None] = contextvars.ContextVar("picture", default=None)


class CachedForward(StandInForward):
    """The forward of a transformer that leaves each prompt's steps, within a call of its pipe, to a `Run`."""

    def __init__(self, wanted: CacheSteps, pipe: Pipeline, text_argument: str) -> None:
        self._wanted, self._pipe, self._text = wanted, pipe, text_argument
        super().__init__(pipe.transformer)

    def around(self, call: Call, arguments: Arguments) -> object:
        """Call the pipe; whatever is remembered of the picture is forgotten afterwards."""
        picture = _Picture(self)
        before = _picture.set(picture)
        try:
            result = call(arguments)
        finally:
            _picture.reset(before)
        if picture.trajectory is None and is_compiled_whole(self._pipe.transformer):
            warnings.warn(
                f"{self._wanted!r} approximated no step: the transformer was compiled as a whole after optimize, so "
                "all of its steps were computed. Leave the compiling to Compile(), which compiles its blocks",
                UserWarning,
                stacklevel=2,
            )
        return result

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what the transformer computes, or an approximation of it."""
        if torch.compiler.is_compiling():
            return self.inner_forward(*args, **kwargs)
        picture = _picture.get()
        arguments = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        if picture is None or picture.of is not self:
            return self.inner_forward(*args, **kwargs)
        scheduler = self._pipe.scheduler
        # Image to image begins in the middle of the schedule; before the first step, it has only said so.
        at = scheduler.begin_index or 0 if scheduler.step_index is None else scheduler.step_index
        if picture.trajectory is None:  # the one look at the device of a picture
            picture.begins_at = at
            order = scheduler.order  # some samplers evaluate twice a step, not in the last
            picture.trajectory = Trajectory(
                tuple(scheduler.sigmas.tolist()[at:]), steps=-(-(len(scheduler.timesteps) - at) // order), order=order
            )
        # Lumina 2 asks for the two halves of guidance one after the other: each prompt is a run of its own.
        text = arguments.get(self._text)
        if text is None or picture.trajectory.steps < LEAST_STEPS:
            return self.inner_forward(*args, **kwargs)
        now = Fingerprint.of(self.module, places=False)  # offloading may move the weights at every step
        if now != picture.seen:
            picture.runs.clear()
            picture.seen = now
        texts = tuple(text) if isinstance(text, (list, tuple)) else (text,)
        key = (bool(arguments.get("return_dict", True)), *map(id, texts))
        if key not in picture.runs:
            picture.runs[key] = texts, self._run(picture.trajectory)
        return picture.runs[key][1](at - picture.begins_at, *args, **kwargs)

    def _run(self, trajectory: Trajectory) -> Run:
        """Return a new run; if it replaces blocks, on a transformer of its own with the same weights.

        So other threads that draw with the transformer meanwhile do not see the replaced blocks.
        """
        backend, mine = BACKENDS[self._wanted.backend], self
        if backend.replaces_blocks:
            with contextlib.suppress(LookupError):  # somebody's function is below, which calls the module itself
                mine = self.on(shadow(self.module))
        return backend.start(self._wanted, mine.module, mine.inner_forward, trajectory)


def _adds_noise(pipe: Pipeline, context: Context) -> str | None:
    """Return the scheduler that the pipe will have by then, in words, if it is a stochastic one."""
    chosen, own = context.planned(pipe).scheduler, installed(pipe.scheduler)
    name = chosen or (own.name if own is not None else "euler")
    solver = SCHEDULERS[name]
    if solver is not None and solver.stochastic:
        return f"SwapScheduler({name!r})" if chosen else said("the scheduler ({name!r})", name=name)
    if chosen is None and pipe.scheduler.config.get("stochastic_sampling"):
        return said("the scheduler (stochastic_sampling=True)")
    return None
