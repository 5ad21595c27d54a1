"""What an optimized pipe carries: its report, in one attribute, with the undo of every step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.planned import CARRIED, CarriesPlan, PlannedPipe
from ernie_accel.core.report import Report, planned_by


@dataclass(frozen=True)
class Carried(CarriesPlan):
    """The report of a pipe. The id distinguishes the pipe from a deep copy, which must not use its undo."""

    report: Report
    pipe_id: int

    @property
    def planned(self) -> PlannedPipe | None:
        return planned_by(self.report.entries)

    def __deepcopy__(self, memo: dict[int, object]) -> Carried:
        return self

    def __reduce__(self) -> tuple[type[Carried], tuple[Report, int]]:
        """Pickle the report without its undos, which hold live objects."""
        reason = said("this pipe came out of a pickle, and its undo stayed behind")
        return Carried, (_without_undo(self.report, reason), 0)


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

    The undo of a copied pipe would change the original, so a copy's report has none.
    """
    carried = CARRIED.of(pipe)
    if not isinstance(carried, Carried):
        return None
    if carried.pipe_id == id(pipe):
        return carried.report
    return _without_undo(carried.report, said("this pipe is a copy; restore the pipe it was copied from"))


def carry(pipe: Pipeline, report: Report) -> None:
    """Let `pipe` carry `report`."""
    CARRIED.put(pipe, Carried(report, id(pipe)))


def drop(pipe: Pipeline) -> None:
    """Let `pipe` carry nothing."""
    CARRIED.drop(pipe)
