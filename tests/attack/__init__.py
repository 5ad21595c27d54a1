"""Attacks: fuzzed inputs, kills, interrupts and hostile folders; nothing may get in, and nothing may be lost.

The default tests run a short form of each attack, ``nox -s attack`` the full one. Every attack draws from
`SEED`, which is printed with a failure: ``ERNIE_ACCEL_ATTACK_SEED=7 nox -s attack`` repeats a run.
"""

from __future__ import annotations

import os

FULL = os.environ.get("ERNIE_ACCEL_ATTACK") == "full"
SEED = int(os.environ.get("ERNIE_ACCEL_ATTACK_SEED", "20261128"))


def rounds(short: int, full: int) -> int:
    """Return how many rounds of an attack to run: `short` in the default tests, `full` in ``nox -s attack``."""
    return full if FULL else short
