"""Print the seed of the attacks, so that a failure can be repeated."""

from __future__ import annotations

from tests.attack import FULL, SEED


def pytest_report_header() -> str:
    return f"attacks: {'full' if FULL else 'short'}, seed {SEED} (ERNIE_ACCEL_ATTACK_SEED)"
