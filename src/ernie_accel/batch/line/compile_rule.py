"""Decide whether a job on a CPU is long enough for compiling to pay; only where nobody chose a preset by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ernie_accel.batch.input.row import Row

if TYPE_CHECKING:
    from ernie_accel.core.context import Context

_COMPILING_S = 40.0  # a job's first batches, on two cores: each new size of batch compiles anew
_SAVED_S = 0.03  # a picture of the embedded model of 128 x 128 px in 8 steps: a sixth of 0.2 s
_PIXELS, _STEPS = 128 * 128, 8


def skip_compile_reason(rows: Iterable[Row], context: Context) -> str | None:
    """Return why a job of the embedded model does without compiling, in words; None: it compiles, or could not anyway.

    All rows count, not only those that are left: a resumed job makes the same pictures. Larger models save minutes
    a picture, and always compile.
    """
    if context.device != "cpu" or context.no_compile is not None:
        return None
    rows = tuple(rows)
    saved_s = sum(_saved_s(row) for row in rows)
    if saved_s >= _COMPILING_S:
        return None
    pictures = "1 picture" if len(rows) == 1 else f"{len(rows):,} pictures"
    return (
        f"compiling takes some {_COMPILING_S:.0f} s on a CPU and would save some {saved_s:.1f} s on {pictures}; "
        "to compile all the same, name the preset"
    )


def _saved_s(row: Row) -> float:
    pixels = (row.width or 128) * (row.height or 128)
    return _SAVED_S * pixels / _PIXELS * (row.steps or _STEPS) / _STEPS
