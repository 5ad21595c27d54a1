"""Turn Python's search for garbage off, where it finds nothing (imports, loading) or must free nothing (captures)."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Blocks that import fewer modules than this, as every load but the first, leave little that is old.
_MANY_MODULES = 100


class _Search:
    """The search for garbage of this process, which several threads may turn off at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turned_off = 0  # by how many
        self._was_on = False  # before the first of them
        self._modules = 0  # that were imported before it

    def turn_off(self) -> None:
        with self._lock:
            if not self._turned_off:
                self._was_on, self._modules = gc.isenabled(), len(sys.modules)
                gc.disable()
            self._turned_off += 1

    def turn_back_on(self, *, keeping: bool) -> None:
        with self._lock:
            self._turned_off -= 1
            if self._was_on and not self._turned_off:
                imported = len(sys.modules) - self._modules >= _MANY_MODULES
                if keeping and imported and not gc.get_freeze_count():  # what others froze must stay frozen
                    # Together they only move all objects to the oldest generation.
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()


_search = _Search()


@contextmanager
def without_collecting() -> Iterator[None]:
    """Turn the search off within the block, in the whole process; what is no longer referred to is freed as ever.

    Importing takes less time so: there are many new objects, and hardly any cycles. Nor does it free what would break
    work under way, such as a CUDA graph while another one is captured. Blocks of several threads may overlap: the last
    one to end turns the search on again, if it was on before the first one.

    Once many modules were imported, all objects count as old, which only a full search looks at: else the next two
    searches would go through all of them. After a block that imported little or failed, none do, so that pipes that
    were dropped, and what a failure leaves, are found soon.
    """
    _search.turn_off()
    keeping = False
    try:
        yield
        keeping = True
    finally:
        _search.turn_back_on(keeping=keeping)
