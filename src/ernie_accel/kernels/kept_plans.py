"""Keep the last plans of a library that plans for each shape, and those that captured graphs read for as long as they.

A captured graph remembers the code and the constants of a plan, so a plan must outlive it. Whoever captures collects
the plans that were used meanwhile (`collected_plans`), and keeps them beside the graph. Plans of graphs that somebody
else captures are kept for good.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

import torch

P = TypeVar("P")

_collecting: contextvars.ContextVar[list[object] | None] = contextvars.ContextVar("collecting", default=None)


@contextlib.contextmanager
def collected_plans() -> Iterator[list[object]]:
    """Yield a list of the plans that this thread uses in the block; they stay good while the list is kept."""
    found: list[object] = []
    token = _collecting.set(found)
    try:
        yield found
    finally:
        _collecting.reset(token)


class KeptPlans(Generic[P]):
    """The plans that were used last."""

    def __init__(self, keep: int, drain: Callable[[], object]) -> None:
        """Keep so many.

        Args:
            keep: >= 1.
            drain: Waits until the device has done all that it was given, so that nothing that runs reads a plan that
                is dropped.
        """
        self._keep, self._drain = keep, drain
        self._plans: OrderedDict[Hashable, P] = OrderedDict()
        self._for_good: list[P] = []
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return how many there are, beside those that graphs keep."""
        return len(self._plans)

    def get(self, key: Hashable, make: Callable[[], P]) -> P:
        """Return the plan of this key, made if it is not there; then the one that was not used for longest goes."""
        with self._lock:
            if key not in self._plans:
                self._plans[key] = make()
            self._plans.move_to_end(key)
            plan = self._plans[key]
            found, captures = _collecting.get(), _is_capturing()
            if found is not None:
                found.append(plan)
            elif captures and not any(plan is kept for kept in self._for_good):
                self._for_good.append(plan)
            if len(self._plans) > self._keep and not captures:  # nobody may wait for a device that captures
                self._drain()
                while len(self._plans) > self._keep:
                    self._plans.popitem(last=False)
            return plan


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
