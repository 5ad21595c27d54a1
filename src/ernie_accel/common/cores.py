"""How many cores this process may run on, and how many of them work in the background while it imports."""

from __future__ import annotations

import os

#: More gain little: a few saturate a disk, and each thread needs memory of its own.
_MOST_IN_BACKGROUND = 8


def cores() -> int:
    """Return how many cores this process may run on, where the system says that; else all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def background_threads() -> int:
    """Return how many threads read or verify while the main one imports: a quarter of the cores, 2 to 8.

    With all of them, importing diffusers and transformers meanwhile took 10 s instead of 6 (16 cores, 12 GB).
    """
    return min(_MOST_IN_BACKGROUND, max(2, cores() // 4))
