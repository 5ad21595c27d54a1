"""A disk that is full: files can be opened and not written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def disk_full_when(full: Callable[[int], bool]) -> Iterator[None]:
    """Refuse to write the files for whose number, from 1, `full` says so."""
    real, written = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal written
        written += 1
        if full(written):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield
