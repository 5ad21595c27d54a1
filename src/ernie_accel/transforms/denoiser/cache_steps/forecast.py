"""Forecast the transformer's output at some steps from earlier ones: no package, no threshold, no second graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.transforms.denoiser.cache_steps.backend import CacheBackend, CacheSettings, Forward, Run, Trajectory

#: ``every`` -> floor in dB; see `CacheSteps.floor_db`.
FLOORS_DB: Mapping[int, float] = MappingProxyType({2: 30.0, 3: 25.0})


class Forecast(CacheBackend):
    """The line through the last two computed outputs, over the noise level: TaylorSeer (arXiv 2503.06923), order 1."""

    name = "forecast"
    takes = frozenset({"every"})

    def floor_db(self, wanted: CacheSettings) -> float:
        return FLOORS_DB[wanted.every]

    def bad_values(self, wanted: CacheSettings) -> list[str]:
        if wanted.every not in FLOORS_DB:
            return [f"every must be {', '.join(map(str, FLOORS_DB))} (steps), got {wanted.every!r}"]
        return []

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []

    def note(self, wanted: CacheSettings, steps: int | None) -> str:
        if steps is None:
            return said("computes one of {every} steps and forecasts the others", every=wanted.every)
        computed = sum(wanted.computes(step, steps) for step in range(steps))
        return said("computes {computed} of {steps} steps and forecasts the others", computed=computed, steps=steps)

    def start(
        self, wanted: CacheSettings, transformer: torch.nn.Module, forward: Forward, trajectory: Trajectory
    ) -> Run:
        return _Line(wanted, forward, trajectory)


class _Line(Run):
    """The last two computed outputs as (sigma, output), the earlier first; an output is a tensor or a list of them.

    A forecast is returned as the forward returned what it computed: by itself, in a tuple, or (as without
    ``return_dict=False``) in the transformer's own output class, whose first field it is.
    """

    def __init__(self, wanted: CacheSettings, forward: Forward, trajectory: Trajectory) -> None:
        self._wanted, self._forward, self._trajectory = wanted, forward, trajectory
        self._points: list[tuple[float, Any]] = []
        self._wrap: Callable[[object], object] = _in_a_tuple

    def __call__(self, evaluation: int, *args: object, **kwargs: object) -> object:
        sigma, step = self._trajectory.sigmas[evaluation], self._trajectory.step_of(evaluation)
        if len(self._points) < 2 or self._wanted.computes(step, self._trajectory.steps):
            output = self._forward(*args, **kwargs)
            self._points = [*self._points[-1:], (sigma, output if isinstance(output, Tensor) else output[0])]
            self._wrap = _in_a_tuple if isinstance(output, tuple) else type(output)
            if isinstance(output, Tensor):
                self._wrap = _alone
            return output
        (before, old), (after, new) = self._points
        reach = (sigma - after) / (after - before)
        if isinstance(new, Tensor):
            return self._wrap(_beyond(old, new, reach))
        return self._wrap([_beyond(old_one, new_one, reach) for old_one, new_one in zip(old, new, strict=True)])


def _alone(value: object) -> object:
    return value


def _in_a_tuple(value: object) -> tuple[object]:
    return (value,)


def _beyond(old: Tensor, new: Tensor, reach: float) -> Tensor:
    line = new.float() + reach * (new.float() - old.float())
    return line.to(new.dtype)
