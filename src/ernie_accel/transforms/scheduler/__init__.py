"""Other ways from noise to picture on the checkpoint's own schedule. ``swap.py`` is the transform; start there."""

from __future__ import annotations

from ernie_accel.transforms.scheduler.solvers import SCHEDULERS
from ernie_accel.transforms.scheduler.swap import SwapScheduler

__all__ = ["SCHEDULERS", "SwapScheduler"]
