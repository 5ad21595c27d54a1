"""Keep the timesteps where a pipeline reads them, so that no step waits for the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of

_CHANGES = (said("scheduler.timesteps device -> host"),)


@dataclass(frozen=True, repr=False)
class KeepTimestepsOnHost(Transform):
    """Keep the scheduler's timesteps in host memory, where ``ErnieImagePipeline`` reads one before every step.

    Stock keeps them on the device, so each ``t.item()`` waits until the previous step is finished. Only then does the
    host launch the next step, and the device is idle until its first, small kernels arrive. The sigmas, which step the
    latents, stay on the device, because a scalar on the host would be rounded differently.

    Pays:
        Where steps are short or the host is slow: with captured graphs, no step waits for the device any more. It is a
        no-op on a CPU, and for a pipeline that reads its timesteps on the device.
    """

    phase: ClassVar[Phase] = Phase.SCHEDULER
    slot: ClassVar[str] = "timesteps"  # sorts after "scheduler", so that it changes the new scheduler
    effect: ClassVar[Effect] = Effect.EXACT

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        if not _reads_on_host(pipe):
            return Preview((), note=said("{pipe} is not known to read them on the host", pipe=type(pipe).__name__))
        if context.device == "cpu":
            return Preview((), note=said("the device is cpu, so they are there already"))
        if isinstance(vars(pipe.scheduler).get("set_timesteps"), _OnHost):
            return Preview((), note=said("they are kept there already"))
        return Preview(_CHANGES)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        scheduler = pipe.scheduler
        with Undo() as undo:
            undo.setattr(scheduler, "set_timesteps", _OnHost(scheduler, scheduler.set_timesteps))
        return Applied(_CHANGES, undo=undo)


class _OnHost:
    """A scheduler's ``set_timesteps``, whose result is in host memory; an object, so that a deep copy has its own."""

    def __init__(self, scheduler: Any, set_timesteps: Callable[..., None]) -> None:
        self._scheduler, self._set_timesteps = scheduler, set_timesteps
        self.__signature__ = inspect.signature(set_timesteps)  # pipelines inspect its arguments

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Make the schedule, in place."""
        self._set_timesteps(*args, **kwargs)
        self._scheduler.timesteps = self._scheduler.timesteps.cpu()


def _reads_on_host(pipe: Pipeline) -> bool:
    return family_of(pipe).reads_timesteps and getattr(pipe, "scheduler", None) is not None
