"""How close a changed pipe stays to the original, what the change buys, and what is wrong with a picture by itself.

compare.py, evaluation.py, metrics.py, render.py, artifacts.py   `evaluate` and what it writes
grid.py                                                          `grid_score`: the grid of distilled checkpoints
"""

from __future__ import annotations

from ernie_accel.fidelity.grid import VISIBLE, grid_score

__all__ = ["VISIBLE", "grid_score"]
