"""Run work on the device normally the first time, then as a CUDA graph: one launch, whatever it consists of.

This is the only cache of graphs. `core.captured` knows whether what they read is still there; the owner of the cache
has to ask it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from ernie_accel.common.collecting import without_collecting
from ernie_accel.kernels.kept_plans import collected_plans

#: What the work reads, and what it returns.
Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


class Replayable(Protocol):
    """The part of `torch.cuda.CUDAGraph` that replaying needs."""

    def pool(self) -> object:
        """Return the memory it works in, for others to share."""

    def replay(self) -> None:
        """Do what was captured."""


class Capture(Protocol):
    """Makes a graph of work."""

    def __call__(self, work: Callable[[], Result], pool: object, /) -> tuple[Replayable, Result]:
        """Capture `work` in the memory of another graph (`pool`), or of its own (None); return graph and result."""


@dataclass
class _Entry(Generic[Inputs, Result]):
    inputs: Inputs | None = None
    made: tuple[Replayable, Result] | None = None  # None: not captured yet
    is_done: bool = False  # once, as it is


class Replays(Generic[Inputs, Result]):
    """Graphs of pieces of work, by name. They share their memory, so a result is good until other work is done."""

    def __init__(self, keep: int, capture: Capture | None = None) -> None:
        """Keep graphs of the last `keep` names; make them with `capture`, or as CUDA graphs."""
        self._keep = keep
        self._capture: Capture = capture or capture_cuda
        self._entries: OrderedDict[Hashable, _Entry[Inputs, Result]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many graphs there are."""
        return sum(entry.made is not None for entry in self._entries.values())

    @property
    def names(self) -> tuple[Hashable, ...]:
        """Names that are known, the least recently used first; not all of them have a graph yet."""
        return tuple(self._entries)

    def inputs(self, name: Hashable, make: Callable[[], Inputs]) -> Inputs:
        """Return the inputs of the work of this name, allocated by `make` the first time; the caller fills them.

        They outlive the call, so they are made outside the caller's inference mode.
        """
        entry = self._entry(name)
        if entry.inputs is None:
            with torch.inference_mode(False), torch.no_grad():
                entry.inputs = make()
        return entry.inputs

    def run(self, name: Hashable, work: Callable[[], Result]) -> Result:
        """Run `work` and return its result: normally the first time, which compiles its kernels, then as a graph.

        A graph remembers addresses, so `work` may read only what stays where it is and what it makes itself. A replay
        overwrites what the capture returned. Work that raised, even while it was captured, counts as not done.
        """
        entry = self._entry(name)
        with torch.inference_mode(False), torch.no_grad():  # of both, so that the capture compiles nothing anew
            if not entry.is_done:
                result = work()
                entry.is_done = True
                return result
            if entry.made is None:
                pool = next((other.made[0].pool() for other in self._entries.values() if other.made is not None), None)
                # Graphs of a pipe that was dropped are freed by the search for garbage, which would break the capture.
                with without_collecting():
                    entry.made = self._capture(work, pool)
            graph, result = entry.made
            graph.replay()
        return result

    def clear(self) -> None:
        """Free all graphs and their memory."""
        self._entries.clear()

    def _entry(self, name: Hashable) -> _Entry[Inputs, Result]:
        entry = self._entries.setdefault(name, _Entry[Inputs, Result]())
        self._entries.move_to_end(name)
        while len(self._entries) > self._keep:
            self._entries.popitem(last=False)
        return entry


@dataclass(frozen=True)
class _WithPlans:
    """A graph, and the plans of attention that it reads."""

    graph: torch.cuda.CUDAGraph
    plans: list[object]

    def pool(self) -> object:
        return self.graph.pool()

    def replay(self) -> None:
        self.graph.replay()


def capture_cuda(work: Callable[[], Result], pool: Any, /) -> tuple[Replayable, Result]:
    """Capture `work` into a CUDA graph on the current device, without running it."""
    graph = torch.cuda.CUDAGraph()
    # "thread_local": what other threads do on the device meanwhile does not break the capture. In a batch they wait for
    # events of the pictures before, which a global capture forbids.
    with collected_plans() as plans, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()
    return _WithPlans(graph, plans), result
