"""What an optimized pipe carries with it: its report, in one attribute, and with it the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ernie_accel.core.components import Pipeline
from ernie_accel.core.report import Entry, Report

_ATTRIBUTE = "_ernie_accel"


@dataclass(frozen=True)
class Carried:
    """The report of a pipe. The id tells the pipe itself from a deep copy, whose undo is not its own."""

    report: Report
    pipe_id: int

    def __deepcopy__(self, memo: dict[int, object]) -> Carried:
        return self

    def __reduce__(self) -> tuple[type[Carried], tuple[Report, int]]:
        """Pickle the report without the way back, which is made of live objects."""
        return Carried, (replace(self.report, entries=tuple(map(_without_undo, self.report.entries))), 0)


def _without_undo(entry: Entry) -> Entry:
    if entry.applied is None or entry.applied.undo is None:
        return entry
    stayed = "this pipe came out of a pickle, and its undo stayed behind"
    return replace(entry, applied=replace(entry.applied, undo=None, no_undo=stayed))


def carried_report(pipe: Pipeline) -> Report | None:
    """Return the report that `pipe` carries, or None if it was never optimized."""
    carried = vars(pipe).get(_ATTRIBUTE)
    return carried.report if isinstance(carried, Carried) else None


def is_copy(pipe: Pipeline) -> bool:
    """Return whether the report that `pipe` carries is that of the pipe it was copied from."""
    carried = vars(pipe).get(_ATTRIBUTE)
    return isinstance(carried, Carried) and carried.pipe_id != id(pipe)


def carry(pipe: Pipeline, report: Report) -> None:
    """Let `pipe` carry `report`."""
    object.__setattr__(pipe, _ATTRIBUTE, Carried(report, id(pipe)))  # past the pipeline's config bookkeeping


def drop(pipe: Pipeline) -> None:
    """Let `pipe` carry nothing."""
    if _ATTRIBUTE in vars(pipe):
        object.__delattr__(pipe, _ATTRIBUTE)
