"""Python's search for garbage, which finds nothing while modules are imported and models are built."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Search:
    """The search for garbage of this process, which several threads may turn off at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turned_off = 0  # by how many
        self._was_on = False  # before the first of them

    def turn_off(self) -> None:
        with self._lock:
            if not self._turned_off:
                self._was_on = gc.isenabled()
                gc.disable()
            self._turned_off += 1

    def turn_back_on(self) -> None:
        with self._lock:
            self._turned_off -= 1
            if self._was_on and not self._turned_off:
                gc.enable()


_search = _Search()


@contextmanager
def without_collecting() -> Iterator[None]:
    """Turn the search off within the block, in the whole process; what is no longer referred to is freed as ever.

    Importing takes a tenth less time: there are many new objects, and hardly any cycles. Blocks of several threads may
    overlap: the last one to end turns the search on again, if it was on before the first one.
    """
    _search.turn_off()
    try:
        yield
    finally:
        _search.turn_back_on()
