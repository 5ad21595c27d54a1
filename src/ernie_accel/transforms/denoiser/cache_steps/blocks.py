"""What the two caches of blocks share: they run the first block, compare, and may leave out the others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch

from ernie_accel.common.language import said
from ernie_accel.core.components import GROUP_OFFLOAD_HOOKS, Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.core.stand_in import standing_in
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.transforms.denoiser.cache_steps.backend import (
    MOST_THRESHOLD,
    CacheBackend,
    CacheSettings,
    Forward,
    Run,
    Trajectory,
)

#: The attribute of a transformer that holds the blocks which all of its tokens run through.
BLOCKS = "layers"


class BlockCache(CacheBackend):
    """A cache that decides at every step, by how much the first block's residual has changed since a computed one."""

    takes = frozenset({"threshold"})
    replaces_blocks = True
    promised_db: ClassVar[float]

    def floor_db(self, wanted: CacheSettings) -> float:
        return self.promised_db

    def bad_values(self, wanted: CacheSettings) -> list[str]:
        if 0 < wanted.threshold <= MOST_THRESHOLD:
            return []
        return [
            f"threshold must be above 0 and at most {MOST_THRESHOLD}, because no floor was found for more; got "
            f"{wanted.threshold}"
        ]

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = []
        name = type(pipe.transformer).__name__
        blocks = getattr(pipe.transformer, BLOCKS, None)
        if not isinstance(blocks, torch.nn.ModuleList) or len(blocks) < 2:
            reasons.append(
                said(
                    "{name} has no list {blocks!r} of two blocks or more, of which all but the first can rest",
                    name=name,
                    blocks=BLOCKS,
                )
            )
        if getattr(pipe, "controlnet", None) is not None:
            reasons.append(
                said(
                    "a ControlNet adds to the output of single blocks, which a cache of blocks may skip: use "
                    "backend='forecast'"
                )
            )
        if context.planned(pipe).keeps_graphs or standing_in(pipe.transformer, GraphedForward) is not None:
            reasons.append(
                said(
                    "captured graphs replay all blocks, whatever a cache of blocks decides: leave CaptureGraphs out, "
                    "or use backend='forecast'"
                )
            )
        grouped = _grouped(pipe, context)
        if grouped is not None:
            reasons.append(
                said(
                    "{grouped} fetches the next block while one runs, and some would not: use 'forecast'",
                    grouped=grouped,
                )
            )
        return reasons

    def note(self, wanted: CacheSettings, steps: int | None) -> str:
        return said(
            "computes the first block of every step, and the others where it changed by more than {threshold}",
            threshold=wanted.threshold,
        )

    def start(
        self, wanted: CacheSettings, transformer: torch.nn.Module, forward: Forward, trajectory: Trajectory
    ) -> Run:
        return _Steps(wanted, forward, self.cached(wanted, transformer, forward, trajectory), trajectory)

    @abstractmethod
    def cached(
        self, wanted: CacheSettings, transformer: torch.nn.Module, forward: Forward, trajectory: Trajectory
    ) -> Forward:
        """Return `forward` with a cache of its own. The transformer is as it was whenever that is not running."""


def _grouped(pipe: Pipeline, context: Context) -> str | None:
    """Return what brings the transformer's blocks to the device a group at a time, in words; None if nothing does."""
    if context.planned(pipe).offload == "group":
        return "Offload('group')"
    if any(library_hooks(part).named(*GROUP_OFFLOAD_HOOKS) for part in pipe.transformer.modules()):
        return said("group offloading, which is on,")
    return None


class _Steps(Run):
    """The cached forward at all steps but the last ones."""

    def __init__(self, wanted: CacheSettings, whole: Forward, cached: Forward, trajectory: Trajectory) -> None:
        self._whole, self._cached, self._trajectory = whole, cached, trajectory
        self._last = trajectory.steps - wanted.last

    def __call__(self, evaluation: int, *args: object, **kwargs: object) -> object:
        forward = self._cached if self._trajectory.step_of(evaluation) < self._last else self._whole
        return forward(*args, **kwargs)


@contextmanager
def kept(*held: dict[str, torch.nn.Module | None]) -> Iterator[None]:
    """Give each of these dictionaries back its content, in its order, after the body."""
    before = list(map(dict, held))
    try:
        yield
    finally:
        for each, content in zip(held, before, strict=True):
            each.clear()
            each.update(content)
