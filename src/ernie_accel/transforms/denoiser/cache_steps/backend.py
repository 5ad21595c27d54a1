"""The interface of a step cache's backend. Each has a module of its own; `CacheSteps` chooses one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import torch

from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context

#: Largest threshold of a cache of blocks that has a floor, and its default.
MOST_THRESHOLD = 0.05

#: The forward of a transformer.
Forward: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Trajectory:
    """The steps that one call of a pipe runs; image to image at a strength below 1 leaves out those before.

    Attributes:
        sigmas: Noise level of each evaluation of the transformer.
        steps: Steps that the call runs.
        order: Evaluations per step; if there are two, the last step still has one.
    """

    sigmas: tuple[float, ...]
    steps: int
    order: int

    def step_of(self, evaluation: int) -> int:
        """Return the step, from 0, that evaluation number `evaluation`, from 0, belongs to."""
        return evaluation // self.order


class CacheSettings(Protocol):
    """The settings of `CacheSteps`; see there."""

    @property
    def every(self) -> int: ...
    @property
    def threshold(self) -> float: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...

    def computes(self, step: int, steps: int) -> bool:
        """Return whether step number `step`, from 0, of `steps` is computed and not forecast."""


class Run(ABC):
    """The state of one prompt, or of one batch, from the first step of a picture to the last."""

    @abstractmethod
    def __call__(self, evaluation: int, *args: object, **kwargs: object) -> object:
        """Return the transformer's output for these arguments, or an approximation of it."""


class CacheBackend(ABC):
    """One way to compute fewer steps in full. It has no state: that is in the `Run` of each picture.

    Class-level facts:
        name: What ``CacheSteps(backend=...)`` calls it.
        takes: Arguments of `CacheSteps` that it supports, beside those that all backends support.
        replaces_blocks: Whether it replaces the transformer's blocks for the time of a forward.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]]
    replaces_blocks: ClassVar[bool] = False

    @abstractmethod
    def floor_db(self, wanted: CacheSettings) -> float:
        """Return the promised SQNR of the latents for the settings in `wanted`."""

    @abstractmethod
    def bad_values(self, wanted: CacheSettings) -> list[str]:
        """Return what is wrong with the settings that only this backend has."""

    @abstractmethod
    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        """Return every reason why it cannot run on this pipe and machine. Changes nothing."""

    @abstractmethod
    def note(self, wanted: CacheSettings, steps: int | None) -> str:
        """Return the note for a plan; `steps` are the planned steps, if known."""

    @abstractmethod
    def start(
        self, wanted: CacheSettings, transformer: torch.nn.Module, forward: Forward, trajectory: Trajectory
    ) -> Run:
        """Return a new run through `forward`, which computes a step of `transformer` in full."""
