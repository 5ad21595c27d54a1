"""Swap the scheduler for another one of the flow-matching kind, keeping the checkpoint's shift."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar

import torch

from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo

#: Name -> configuration of ``FlowMatchEulerDiscreteScheduler``. "euler_ancestral" is what other front ends call it:
#: at every step the predicted picture is mixed with fresh noise.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "euler": {"stochastic_sampling": False},
    "euler_ancestral": {"stochastic_sampling": True},
}


@dataclass(frozen=True, repr=False)
class SwapScheduler(Transform):
    """Swap the scheduler by name; the checkpoint's shift and all its other settings stay unless given.

    "euler_ancestral" draws its noise from the initial latents, so that the pipeline's ``generator`` decides all of
    it and a picture made in a batch equals the same one made alone; stock diffusers uses the global generator.

    Attributes:
        name: "euler" or "euler_ancestral".
        shift: Timestep shift, > 0; None keeps the checkpoint's.
    """

    phase: ClassVar[Phase] = Phase.SCHEDULER
    slot: ClassVar[str] = "scheduler"
    effect: ClassVar[Effect] = Effect.RESAMPLES

    name: str
    shift: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.name not in SCHEDULERS:
            raise UnknownNameError("scheduler", self.name, SCHEDULERS)
        if self.shift is not None and self.shift <= 0:
            raise ValueError(f"shift must be > 0 (1 is no shift), got {self.shift}")

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = getattr(pipe, "scheduler", None)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return []
        return [f"needs a flow-matching pipeline (FlowMatchEulerDiscreteScheduler); it has {type(scheduler).__name__}"]

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        changes = self._changes(pipe)
        if not changes:
            return Preview((), note=f"the scheduler is {self.name!r} already, shift {pipe.scheduler.shift:g}")
        return Preview(changes, note=self._note())

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        from diffusers import FlowMatchEulerDiscreteScheduler

        changes = self._changes(pipe)
        # As keywords: from_config drops what its first argument merely inherited as a default.
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **self._settings())
        if scheduler.config.stochastic_sampling:
            # On the instance: the class stays diffusers' own, and what save_pretrained writes can be loaded.
            scheduler.step = MethodType(_seeded_step, scheduler)
        with Undo() as undo:
            undo.setattr(pipe, "scheduler", scheduler)
        return Applied(changes, undo=undo, note=self._note())

    def _settings(self) -> dict[str, Any]:
        return SCHEDULERS[self.name] | ({} if self.shift is None else {"shift": self.shift})

    def _changes(self, pipe: Pipeline) -> tuple[str, ...]:
        have = pipe.scheduler.config
        return tuple(
            f"scheduler.{key} {have[key]} -> {new}" for key, new in self._settings().items() if have[key] != new
        )

    def _note(self) -> str:
        if self.name == "euler_ancestral":
            return "euler_ancestral suits distilled checkpoints; others lose variance (contrast, texture)"
        return ""


def _seeded_step(self: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
    """Do a stochastic ``step`` with noise that the initial latents decide, one generator per picture.

    The first sample [B, C, H, W] of a run is drawn from the pipeline's generator, so hashing it carries the seed over
    without the pipeline's help (ErnieImagePipeline passes none to ``step``). An explicit ``generator`` wins.
    """
    if kwargs.get("generator") is None:
        if self.step_index is None:
            self._noise = [torch.Generator().manual_seed(_seed(latents)) for latents in sample]
        kwargs["generator"] = self._noise
    return type(self).step(self, model_output, timestep, sample, **kwargs)


def _seed(latents: torch.Tensor) -> int:
    """Return a 63-bit seed from the bytes of one picture's latents [C, H, W]."""
    raw = latents.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "little") >> 1
