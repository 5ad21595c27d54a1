"""Limits that a busy machine does not break: on the processor time of this process, not on the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def little_work(seconds: float, what: str = "this") -> Iterator[None]:
    """Fail if the block takes more than so many seconds of this process's processor time, all threads together."""
    begun = time.process_time()
    yield
    took = time.process_time() - begun
    assert took < seconds, f"{what} took {took:.2f} s of processor time"
