"""Swap the scheduler by name, keeping the checkpoint's schedule."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.samplers.solvers import SCHEDULERS
from ernie_accel.samplers.stepping import install, installed, start_at_a_step

#: Names of samplers in ComfyUI, A1111 and diffusers, normalised by `_alias_here`.
_NAMES_ELSEWHERE = {
    "eulera": "euler_ancestral",
    "flowmatch": "euler",
    "unipcbh2": "unipc",
    "dpmsolver": "dpmpp_2m",
    "dpmsolversde": "dpmpp_sde",
    "dpmpp3msde": "dpmpp_3m",
}
_SPACINGS = ("karras", "exponential", "beta")
TIMESTEP_SPACINGS = ("trailing",)


@dataclass(frozen=True, repr=False)
class SwapScheduler(Transform):
    """Swap the scheduler by name; keep the checkpoint's shift and all its other settings unless you give others.

    Every sampler runs on the sigmas of the checkpoint's own scheduler and ends at 0. Stochastic samplers derive their
    noise from the initial latents. So the pipeline's ``generator`` decides all of it, and a picture made in a batch
    equals the same one made alone; stock diffusers uses the global generator.

    Pays:
        Second-order samplers pay from 20 steps on, where they halve Euler's error at the same number of steps ("unipc",
        "dpmpp_2m"; "heun" at twice the cost). At 9 steps and shift 4 they gain next to nothing. Stochastic samplers
        are a matter of taste; "lcm" and "euler_ancestral" suit distilled checkpoints.

    Attributes:
        name: "euler", "euler_ancestral", "heun", "unipc", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_sde", "lcm".
        shift: Timestep shift, > 0; None keeps the checkpoint's.
        karras: Space the sigmas between the first and the last one as Karras et al. do (arXiv 2206.00364, rho 7).
        exponential: Space them evenly in their logarithm.
        beta: Space them by a beta distribution (arXiv 2407.12173); needs scipy.
        timestep_spacing: "trailing" puts the steps at 1, (n-1)/n, ..., 1/n before the shift, if the pipeline leaves
            that to the scheduler. ERNIE-Image, Z-Image and Lumina 2 pass these sigmas themselves. None: as stock.
    """

    phase: ClassVar[Phase] = Phase.SCHEDULER
    slot: ClassVar[str] = "scheduler"
    effect: ClassVar[Effect] = Effect.RESAMPLES

    name: str
    shift: float | None = field(default=None, kw_only=True)
    karras: bool = field(default=False, kw_only=True)
    exponential: bool = field(default=False, kw_only=True)
    beta: bool = field(default=False, kw_only=True)
    timestep_spacing: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.name not in SCHEDULERS:
            suggestion, note = _alias_here(str(self.name))
            raise UnknownNameError("scheduler", self.name, SCHEDULERS, note=note, suggestion=suggestion)
        if self.shift is not None and self.shift <= 0:
            raise ValueError(f"shift must be > 0 (1 is no shift), got {self.shift}")
        asked = [name for name in _SPACINGS if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} exclude each other: the sigmas have one spacing")
        if self.timestep_spacing not in (None, *TIMESTEP_SPACINGS):
            raise UnknownNameError("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = getattr(pipe, "scheduler", None)
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            found = type(scheduler).__name__
            return [
                said("needs a flow-matching pipeline (FlowMatchEulerDiscreteScheduler); it has {found}", found=found)
            ]
        reasons = context.missing("scipy") if self.beta else []
        if SCHEDULERS[self.name] is not None and _passes(pipe, "per_token_timesteps"):
            reasons.append(
                said(
                    "{pipe} gives each token a noise level of its own (per_token_timesteps), which only 'euler' knows",
                    pipe=type(pipe).__name__,
                )
            )
        if scheduler.config.invert_sigmas:
            reasons.append(
                said("its FlowMatchEulerDiscreteScheduler has invert_sigmas=True; solvers need falling sigmas")
            )
        if self.shift is not None and scheduler.config.use_dynamic_shifting:
            reasons.append(
                said(
                    "its FlowMatchEulerDiscreteScheduler shifts by resolution (use_dynamic_shifting=True), so that "
                    "shift={shift:g} would have no effect: leave it out",
                    shift=self.shift,
                )
            )
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        changes = self._changes(pipe.scheduler)
        if not changes:
            return Preview(
                (),
                note=said(
                    "the scheduler is {name!r} already, shift {shift:g}", name=self.name, shift=pipe.scheduler.shift
                ),
            )
        return Preview(changes, note=self._note())

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), scheduler=self.name)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        old = pipe.scheduler
        changes = self._changes(old)
        # As keywords: from_config drops what its first argument merely inherited as a default.
        scheduler = type(old).from_config(old.config, **self._settings())
        if self.shift is None:
            scheduler.set_shift(old.shift)  # the config does not show what set_shift changed
        if SCHEDULERS[self.name] is not None or self.timestep_spacing is not None:
            install(scheduler, self.name, trailing=self.timestep_spacing == "trailing")
        solver = SCHEDULERS[self.name]
        with Undo() as undo:
            undo.setattr(pipe, "scheduler", scheduler)
            if solver is not None and solver.evaluations > 1:
                start_at_a_step(pipe, undo)
        return Applied(changes, undo=undo, note=self._note())

    def _settings(self) -> dict[str, object]:
        """Return what the new scheduler's config says differently, whether or not the old one says it already."""
        settings: dict[str, object] = {"stochastic_sampling": self.name == "lcm"}  # what stock knows by that name
        if self.shift is not None:
            settings["shift"] = self.shift
        if self.karras or self.exponential or self.beta:
            settings |= {f"use_{name}_sigmas": getattr(self, name) for name in _SPACINGS}
        return settings

    def _changes(self, scheduler: Any) -> tuple[str, ...]:
        old = installed(scheduler)
        have = old.name if old else "euler"
        changes = [] if have == self.name else [f"scheduler.step {have} -> {self.name}"]
        if self.timestep_spacing is not None and not (old and old.trailing):
            changes.append(said("scheduler.timestep_spacing stock -> {spacing}", spacing=self.timestep_spacing))
        now = dict(scheduler.config) | {"shift": scheduler.shift}
        return tuple(changes) + tuple(
            f"scheduler.{key} {now[key]} -> {new}" for key, new in self._settings().items() if now[key] != new
        )

    def _note(self) -> str:
        solver = SCHEDULERS[self.name]
        if solver is None:
            return ""
        unseeded = said(" (stochastic, unseeded)") if self.name == "lcm" else ""
        return said(
            "{advice}; save_pretrained writes a stock FlowMatchEulerDiscreteScheduler{unseeded}: swap again after "
            "loading",
            advice=solver.advice,
            unseeded=unseeded,
        )


def _passes(pipe: Pipeline, keyword: str) -> bool:
    """Return whether the call of the pipe passes a keyword of this name to anything, by its compiled code."""
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    return code is not None and any(isinstance(names, tuple) and keyword in names for names in code.co_consts)


def _alias_here(name: str) -> tuple[str | None, str]:
    """Return the name that a class of diffusers, ComfyUI or A1111 has here ("DPM++ 2M SDE Karras"), and a hint."""
    text = re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp").removeprefix("k_"))
    spacing = next((word for word in _SPACINGS if text.endswith(word)), None)
    text = re.sub(r"(discrete|multistep|inverse|scheduler|gpu)", "", text.removesuffix(spacing or ""))
    text = re.sub(r"^flowmatch(?=.)", "", text)
    mine = {re.sub("_", "", each): each for each in SCHEDULERS} | _NAMES_ELSEWHERE
    return mine.get(text), f"Its sigmas: SwapScheduler(..., {spacing}=True)." if spacing else ""
