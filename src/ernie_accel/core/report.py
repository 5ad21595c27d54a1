"""Say what was done to a pipe: the receipts of `optimize` as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ernie_accel.common.language import localized, say
from ernie_accel.common.text import effect_text, html_lines, html_table, human_bytes, summarise, table
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.step import Step
from ernie_accel.core.transform import Applied, Effect


@dataclass(frozen=True)
class Entry:
    """One transform that was asked for, and what became of it.

    Attributes:
        step: The step of the plan.
        applied: The receipt; None if it was skipped or there was nothing to do.
    """

    step: Step
    applied: Applied | None

    @property
    def status(self) -> str:
        """ "applied", "interrupted", "nothing to do" or "skipped"."""
        if self.applied is not None:
            return "interrupted" if self.applied.unfinished else "applied"
        return "skipped" if self.step.reasons else "nothing to do"


def planned_by(entries: Iterable[Entry]) -> PlannedPipe | None:
    """Return what a pipe was planned to be after the last of `entries` that was applied; None if none was."""
    planned = [entry.step.planned for entry in entries if entry.applied is not None and entry.step.planned is not None]
    return planned[-1] if planned else None


_HEADER = ("#", "transform", "effect", "status", "what changed, or why not", "ms", "weights")


@dataclass(frozen=True)
class Report:
    """What was applied to a pipe, skipped and why. Printing it gives a table; `to_json` the same as data.

    Attributes:
        title: What was asked for, in words ("preset 'turbo-bf16'").
        pipe_class: Class name of the pipe.
        context: The machine it was applied on, with the versions of torch, diffusers, ...
        entries: One for each transform asked for, in the order they ran.
    """

    title: str
    pipe_class: str
    context: Context
    entries: tuple[Entry, ...]

    @property
    def effect(self) -> Effect:
        """The strongest effect of what was applied."""
        effects = (entry.step.transform.effect for entry in self.entries if entry.applied is not None)
        return max(effects, key=lambda effect: effect.severity, default=Effect.EXACT)

    def __str__(self) -> str:
        header = tuple(map(say, _HEADER))
        return "\n".join([self._heading(), table(header, self._rows(), frozenset({0, 5})), *self._footnotes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        rows = html_table(tuple(map(say, _HEADER)), self._rows(), frozenset({0, 5}))
        return html_lines((), self._heading()) + rows + html_lines(self._footnotes())

    def _heading(self) -> str:
        versions = ", ".join(f"{name} {self.context.versions.get(name, '?')}" for name in ("torch", "diffusers"))
        return say(
            "Report: {title} on {pipe}, {machine}, {versions}",
            title=localized(self.title),
            pipe=self.pipe_class,
            machine=self.context.localized(),
            versions=versions,
        )

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for number, entry in enumerate(self.entries, start=1):
            transform, applied = entry.step.transform, entry.applied
            if applied is None:
                reasons = entry.step.reasons or ((entry.step.preview.note,) if entry.step.preview else ())
                why = "; ".join(map(localized, reasons))
                yield str(number), repr(transform), "-", say(entry.status), why, "", ""
                continue
            size = human_bytes(applied.bytes_before)
            if applied.bytes_after != applied.bytes_before:
                size += f" -> {human_bytes(applied.bytes_after)}"
            effect = localized(effect_text(transform.effect.value, transform.floor_db))
            what = summarise(applied.changed)
            if applied.skipped:
                what += say("; {count} left out", count=len(applied.skipped))
            yield str(number), repr(transform), effect, say(entry.status), what, f"{applied.seconds * 1e3:.0f}", size

    def _footnotes(self) -> Iterator[str]:
        for number, entry in enumerate(self.entries, start=1):
            if entry.applied is None:
                continue
            if entry.applied.note:
                yield f"{number}: {localized(entry.applied.note)}"
            by_reason: dict[str, list[str]] = {}
            for name, reason in entry.applied.skipped.items():
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                yield say("{number}: left out {names}: {reason}", number=number, names=summarise(names), reason=reason)
            if entry.applied.no_undo:
                yield say("{number}: cannot be undone: {reason}", number=number, reason=entry.applied.no_undo)

    def to_json(self) -> str:
        """Return the report as a JSON document."""
        document: dict[str, object] = {
            "report": self.title,
            "pipe": self.pipe_class,
            "device": self.context.device,
            "device_name": self.context.device_name,
            "versions": dict(self.context.versions),
            "effect": self.effect.value,
            "entries": [_entry_json(entry) for entry in self.entries],
        }
        return json.dumps(document, indent=2, ensure_ascii=False)


def _entry_json(entry: Entry) -> dict[str, object]:
    transform, applied = entry.step.transform, entry.applied
    document = transform.to_json() | {
        "status": entry.status,
        "effect": transform.effect.value,
        "floor_db": transform.floor_db,
        "reasons": entry.step.reasons,
    }
    if applied is None:
        return document | {"note": entry.step.preview.note if entry.step.preview else ""}
    return document | {
        "changed": applied.changed,
        "skipped": dict(applied.skipped),
        "note": applied.note,
        "details": [detail.to_json() for detail in applied.details],
        "ms": round(applied.seconds * 1e3, 3),
        "bytes_before": applied.bytes_before,
        "bytes_after": applied.bytes_after,
        "undo": applied.no_undo or True,
    }
