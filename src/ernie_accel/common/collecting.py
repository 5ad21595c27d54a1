"""Python's search for garbage, which finds nothing while modules are imported and models are built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Do not search for garbage meanwhile; what is no longer referred to is freed as ever.

    Importing takes a tenth less: there are many new objects, and hardly any cycles.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
