"""What an optimized pipe carries with it: its report, in one attribute, and with it the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ernie_accel.core.components import Pipeline
from ernie_accel.core.planned import CARRIED, CarriesPlan, PlannedPipe
from ernie_accel.core.report import Report, planned_by


@dataclass(frozen=True)
class Carried(CarriesPlan):
    """The report of a pipe. The id tells the pipe itself from a deep copy, whose undo is not its own."""

    report: Report
    pipe_id: int

    @property
    def planned(self) -> PlannedPipe | None:
        return planned_by(self.report.entries)

    def __deepcopy__(self, memo: dict[int, object]) -> Carried:
        return self

    def __reduce__(self) -> tuple[type[Carried], tuple[Report, int]]:
        """Pickle the report without the way back, which is made of live objects."""
        return Carried, (_without_undo(self.report, "this pipe came out of a pickle, and its undo stayed behind"), 0)


def _without_undo(report: Report, reason: str) -> Report:
    """Return `report` as one whose entries cannot be undone, because of `reason`."""
    entries = tuple(
        entry
        if entry.applied is None or entry.applied.undo is None
        else replace(entry, applied=replace(entry.applied, undo=None, no_undo=reason))
        for entry in report.entries
    )
    return replace(report, entries=entries)


def carried_report(pipe: Pipeline) -> Report | None:
    """Return the report that `pipe` carries, or None if it was never optimized.

    The way back of a pipe that was copied leads to the original, so a copy's report has none.
    """
    carried = CARRIED.of(pipe)
    if not isinstance(carried, Carried):
        return None
    if carried.pipe_id == id(pipe):
        return carried.report
    return _without_undo(carried.report, "this pipe is a copy; restore the pipe it was copied from")


def carry(pipe: Pipeline, report: Report) -> None:
    """Let `pipe` carry `report`."""
    CARRIED.put(pipe, Carried(report, id(pipe)))


def drop(pipe: Pipeline) -> None:
    """Let `pipe` carry nothing."""
    CARRIED.drop(pipe)
