"""Where child processes import from: what is tested here, and not an installed copy of it, and the tests."""

from __future__ import annotations

import os
from pathlib import Path

import ernie_accel

PYTHONPATH = os.pathsep.join(str(Path(module).parents[1]) for module in (__file__, ernie_accel.__file__))
