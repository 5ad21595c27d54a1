"""Do work on the device the first time as it is, then as a CUDA graph: one launch, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch


class Replayable(Protocol):
    """What `torch.cuda.CUDAGraph` is to those who replay it."""

    def pool(self) -> Any:
        """Return the memory it works in, for others to share."""

    def replay(self) -> None:
        """Do what was captured."""


#: Makes a graph of work, in the memory of another graph or of its own: (work, pool or None) -> graph, result.
Capture = Callable[[Callable[[], Any], Any], tuple[Replayable, Any]]


class Replays:
    """Graphs of pieces of work, by name. They share their memory, so a result is good until other work is done."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or capture_cuda
        self._graphs: dict[Hashable, tuple[Replayable, Any] | None] = {}  # None: done once, not captured yet

    def run(self, name: Hashable, work: Callable[[], Any]) -> Any:
        """Do `work`, and return what it returns: the first time as it is, which compiles its kernels, then as a graph.

        A graph remembers addresses: `work` may read nothing but what stays where it is, and what it makes itself. A
        replay overwrites what the capture returned. What raised, also while it was captured, counts as not done.
        """
        if name not in self._graphs:
            result = work()
            self._graphs[name] = None
            return result
        made = self._graphs[name]
        if made is None:
            pool = next((graph.pool() for graph, _ in filter(None, self._graphs.values())), None)
            made = self._graphs[name] = self._capture(work, pool)
        graph, result = made
        graph.replay()
        return result

    def forget(self, name: Hashable) -> None:
        """Let go of the graph of this name, if there is one."""
        self._graphs.pop(name, None)


def capture_cuda(work: Callable[[], Any], pool: Any) -> tuple[Replayable, Any]:
    """Capture `work` into a CUDA graph on the current device, which does not do it yet."""
    graph = torch.cuda.CUDAGraph()
    # "thread_local": what other threads do on the device meanwhile does not spoil the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()
    return graph, result
