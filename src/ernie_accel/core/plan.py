"""Say what would happen to a pipe, in which order and at what fidelity, before anything is touched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from ernie_accel.common.language import joined, localized, said, say
from ernie_accel.common.text import effect_text, html_lines, html_table, human_bytes, summarise, table
from ernie_accel.core.carried import carried_report
from ernie_accel.core.compiled import previewed, seen_through
from ernie_accel.core.components import (
    AnyPipeline,
    Pipeline,
    bare_float8,
    device_of,
    pipe_bytes,
)
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ConflictError, ErnieAccelError
from ernie_accel.core.owners import freed_elsewhere_reasons, sharing_problems, was_replaced
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.preset import Preset
from ernie_accel.core.report import Entry, Report, planned_by
from ernie_accel.core.step import Step
from ernie_accel.core.transform import Effect, Preview, Transform
from ernie_accel.families import family_of
from ernie_accel.families.family import UNKNOWN


class MemoryForecast(Protocol):
    """What a plan says of memory, where it was asked to."""

    @property
    def fits(self) -> bool:
        """Whether the device has enough."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""

    def _repr_html_(self) -> str:
        """Return what notebooks show."""


_HEADER = ("#", "transform", "effect", "what would change", "weights")


@dataclass(frozen=True)
class Plan:
    """What `optimize` would do with these transforms. Printing it gives a table; `to_json` the same as data.

    Attributes:
        pipe_class: Class name of the pipe.
        family: Name of its architecture family, or None if it is of none the library knows.
        context: The machine the plan is for.
        steps: The transforms in the order they would run.
        blockers: Reasons why this pipe cannot run at all, whatever the transforms.
        preset: The preset the transforms came from, if any.
        bytes_before: Bytes of the pipe's weights now.
        undoes: What an earlier `optimize` applied and this one would undo first. The steps are planned on the pipe as
            it is now, with these still in place.
        memory: What the device will hold and what was chosen so that it fits, if that was asked for.
    """

    pipe_class: str
    family: str | None
    context: Context
    steps: tuple[Step, ...]
    blockers: tuple[str, ...]
    preset: Preset | None
    bytes_before: int
    undoes: tuple[Transform, ...] = ()
    memory: MemoryForecast | None = None

    @property
    def problems(self) -> dict[Transform, tuple[str, ...]]:
        """The transforms that cannot run, each with all its reasons."""
        return {step.transform: step.reasons for step in self.steps if step.verdict == "unsupported"}

    @property
    def ok(self) -> bool:
        """Whether everything in the plan can run."""
        return not self.problems and not self.blockers

    @property
    def effect(self) -> Effect:
        """The strongest effect of the steps that would be applied, or are in place."""
        effects = (step.transform.effect for step in self.steps if step.verdict in ("apply", "in place"))
        return max(effects, key=lambda effect: effect.severity, default=Effect.EXACT)

    @property
    def title(self) -> str:
        """The request in words: the preset, or the transforms."""
        return title_of((step.transform for step in self.steps), self.preset)

    def problem_lines(self) -> Iterator[str]:
        """Yield all that stands in the way in the reader's language, indented, one reason a line."""
        for blocker in self.blockers:
            yield f"  - {localized(blocker)}"
        for transform, reasons in self.problems.items():
            yield f"  {transform!r}"
            for reason in reasons:
                yield f"    - {localized(reason)}"

    def __str__(self) -> str:
        header = tuple(map(say, _HEADER))
        lines = [self._heading(), *self._before(), table(header, self._rows(), frozenset({0})), *self._footnotes()]
        if self.memory is not None:
            lines.append(str(self.memory))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        parts = [
            html_lines(self._before(), self._heading()),
            html_table(tuple(map(say, _HEADER)), self._rows(), frozenset({0})),
        ]
        parts.append(html_lines(self._footnotes()))
        if self.memory is not None:
            parts.append(self.memory._repr_html_())
        return "".join(parts)

    def _heading(self) -> str:
        return say(
            "Plan: {title} for {pipe} ({family}) on {machine}",
            title=localized(self.title),
            pipe=self.pipe_class,
            family=self.family or say("of no known family"),
            machine=self.context.localized(),
        )

    def _before(self) -> Iterator[str]:
        yield from (f"  - {localized(blocker)}" for blocker in self.blockers)
        if self.undoes:
            undone = ", ".join(map(repr, self.undoes))
            yield say(
                "First undoes {undone}. The rows describe the pipe as it is now, and are planned again then.",
                undone=undone,
            )

    def _rows(self) -> Iterator[tuple[str, ...]]:
        before = self.bytes_before
        for number, step in enumerate(self.steps, start=1):
            effect = localized(effect_text(step.transform.effect.value, step.transform.floor_db))
            if step.in_place:
                yield str(number), repr(step.transform), "-", say("in place already"), ""
                continue
            if step.preview is None:
                yield str(number), repr(step.transform), "-", say("cannot: see below"), ""
                continue
            if not step.preview.changes:
                yield str(number), repr(step.transform), "-", say("nothing to do: {note}", note=step.preview.note), ""
                continue
            after = before if step.planned is None else step.planned.nbytes
            size = "" if after == before else f"{human_bytes(before)} -> {human_bytes(after)}"
            yield str(number), repr(step.transform), effect, summarise(step.preview.changes), size
            before = after

    def _footnotes(self) -> Iterator[str]:
        for number, step in enumerate(self.steps, start=1):
            if step.verdict == "apply" and step.preview is not None and step.preview.note:
                yield f"{number}: {localized(step.preview.note)}"
            for reason in step.reasons if step.verdict == "unsupported" else ():
                yield say("{number}: cannot: {reason}", number=number, reason=reason)
        if self.ok:
            yield say("Overall effect: {effect}.", effect=say(self.effect.value))

    def to_json(self) -> str:
        """Return the plan as a JSON document."""
        steps = [
            step.transform.to_json()
            | {
                "phase": step.transform.phase.name.lower(),
                "effect": step.transform.effect.value,
                "floor_db": step.transform.floor_db,
                "verdict": step.verdict,
                "reasons": step.reasons,
                "changes": step.preview.changes if step.preview else (),
                "bytes_after": step.planned.nbytes if step.planned else None,
                "note": step.preview.note if step.preview else "",
                "skipped": dict(step.preview.skipped) if step.preview else {},
            }
            for step in self.steps
        ]
        document: dict[str, object] = {
            "plan": self.preset.name if self.preset else None,
            "pipe": self.pipe_class,
            "family": self.family,
            "device": self.context.device,
            "device_name": self.context.device_name,
            "capability": self.context.capability,
            "versions": dict(self.context.versions),
            "ok": self.ok,
            "effect": self.effect.value,
            "blockers": self.blockers,
            "bytes_before": self.bytes_before,
            "undoes": [transform.to_json() for transform in self.undoes],
            "steps": steps,
        }
        if self.memory is not None:
            document["memory"] = self.memory.to_json()
        return json.dumps(document, indent=2, ensure_ascii=False)


def title_of(transforms: Iterable[Transform], preset: Preset | None) -> str:
    """Return a request in words: the name of its preset, else its transforms."""
    if preset is not None:
        return said("preset {name!r}", name=preset.name)
    return ", ".join(map(repr, transforms)) or said("nothing")


def compose(
    transforms: tuple[Transform, ...], preset: Preset | None = None, pipe: Pipeline | None = None
) -> tuple[Transform, ...]:
    """Return the transforms of a request for `pipe`, or one of no known family, in the order they run.

    A transform given beside a preset replaces the preset's own in the same slot.

    Raises:
        ConflictError: Two of `transforms` want one slot.
        TypeError: Something given is not a transform.
    """
    by_slot: dict[str, Transform] = {}
    for transform in transforms:
        if not isinstance(transform, Transform):
            hint = f"; for a preset write preset={transform!r}" if isinstance(transform, str) else ""
            raise TypeError(f"expected transforms such as Compile(), got {transform!r}{hint}")
        if transform.occupies in by_slot:
            raise ConflictError(transform.occupies, (by_slot[transform.occupies], transform))
        by_slot[transform.occupies] = transform
    if preset is not None:
        for transform in preset.transforms_for(UNKNOWN) if pipe is None else preset.transforms_on(pipe):
            by_slot.setdefault(transform.occupies, transform)
    return tuple(sorted(by_slot.values(), key=lambda t: (t.phase, t.occupies)))


def plan_request(pipe: Pipeline, wanted: tuple[Transform, ...], preset: Preset | None, machine: Context) -> Plan:
    """Say what a request would do to a pipe as it is; see ``ernie_accel.plan``. Changes nothing."""
    carried = carried_report(pipe)
    kept, _, removed = keep_entries(pipe, carried, wanted, machine) if carried else ((), (), ())
    the_plan = plan_steps(pipe, wanted, preset, machine, kept)
    stuck = tuple(
        said("{transform} would have to be undone first: {reason}", transform=repr(entry.step.transform), reason=reason)
        for entry in removed
        if (reason := reason_not_to_undo(entry)) is not None
    )
    undoes = tuple(entry.step.transform for entry in removed if entry.applied is not None)
    return replace(the_plan, blockers=the_plan.blockers + stuck, undoes=undoes)


def machine_for(pipe: Pipeline, wanted: Iterable[Transform]) -> Context:
    """Look at the device the pipe lives on, or at the one where a transform among `wanted` will have it run."""
    wanted = tuple(wanted)
    moves_to = next((t.moves_to for t in wanted if t.moves_to is not None), None)
    if moves_to is None and device_of(pipe).type == "cpu" and any(t.runs_on_accelerator for t in wanted):
        return Context.detect()
    return Context.detect(pipe, moves_to)


def keep_entries(
    pipe: Pipeline, carried: Report, wanted: tuple[Transform, ...], machine: Context
) -> tuple[tuple[Entry, ...], tuple[Entry, ...], tuple[Entry, ...]]:
    """Sort the entries of `carried` by what happens to them when `wanted` is requested.

    A skipped entry stays while it is still unsupported; one with nothing to do stays on the same machine.

    Returns:
        Those that `wanted` begins with and that still hold; one that was interrupted and is requested again, and will
        finish its work; and those to be undone.
    """
    same, now, seen = 0, replace(machine, state=PlannedPipe.seen(pipe, None)), seen_through(pipe)
    for entry, transform in zip(carried.entries, wanted, strict=False):
        skipped = entry.status == "skipped"
        if entry.step.transform != transform or (skipped and not transform.unsupported(seen, now)):
            break
        if entry.applied is not None and entry.applied.unfinished and entry.applied.undo is not None:
            break
        if entry.applied is not None and entry.applied.unfinished:
            return carried.entries[:same], (entry,), carried.entries[same + 1 :]
        if entry.status == "nothing to do" and carried.context != machine:
            break
        if entry.applied is not None and not _still_in_place(pipe, entry, carried.entries[same + 1 :]):
            break
        same += 1
        now = now if entry.step.planned is None else replace(now, state=entry.step.planned)
    return carried.entries[:same], (), carried.entries[same:]


def _still_in_place(pipe: Pipeline, entry: Entry, later: Iterable[Entry]) -> bool:
    """Return whether what an entry changed is still there: no script has replaced it, or a component, since."""
    changes = () if entry.step.preview is None else entry.step.preview.changes
    if was_replaced(pipe, entry.step.transform, changes):
        return False
    is_in_place = getattr(None if entry.applied is None else entry.applied.undo, "is_in_place", None)
    beneath = {each for other in later if other.applied is not None for each in other.applied.replaced}
    return is_in_place is None or bool(is_in_place(beneath))


def reason_not_to_undo(entry: Entry) -> str | None:
    """Return why an entry cannot be undone, or not without losing what was done since; None if it can."""
    if entry.applied is None:
        return None
    if entry.applied.undo is None:
        return entry.applied.no_undo
    objections = getattr(entry.applied.undo, "objections", None)
    return None if objections is None else next(iter(objections()), None)


def _as_it_stands(entry: Entry) -> Step:
    return entry.step if entry.applied is None else replace(entry.step, in_place=True)


def _ask(
    pipe: Pipeline, transform: Transform, context: Context, *, seen: Pipeline, optional: bool, off: frozenset[str]
) -> Step:
    """Ask one transform; an optional one is left out of a pipe of no known family, with the reason."""
    unknown = transform.family_reasons(seen) if optional else []
    if unknown:
        return Step(transform, (), Preview((), note=joined(unknown)))
    reasons = tuple(freed_elsewhere_reasons(pipe, transform) or transform.unsupported(seen, context))
    if reasons:
        return Step(transform, reasons, None)
    preview = previewed(pipe, transform, seen, context, off)
    shared = tuple(sharing_problems(pipe, preview.changes))
    if shared:
        return Step(transform, shared, None)
    planned = transform.planned(seen, context) if preview.changes else None
    return Step(transform, (), preview, planned=planned)


def plan_steps(
    pipe: Pipeline,
    wanted: tuple[Transform, ...],
    preset: Preset | None,
    context: Context,
    kept: tuple[Entry, ...] = (),
) -> Plan:
    """Ask every transform, each in the context that the ones before it leave behind.

    Args:
        pipe: The pipeline; `kept` is in place on it.
        wanted: All transforms in order, those of `kept` first.
        preset: Where they came from.
        context: The machine.
        kept: What an earlier `optimize` did and that stays.
    """
    seen = seen_through(pipe)
    by_preset = preset.transforms_on(seen) if preset is not None else ()
    now = replace(context, state=PlannedPipe.seen(pipe, planned_by(kept)))
    off: frozenset[str] = frozenset()
    steps = [_as_it_stands(entry) for entry in kept]
    for transform in wanted[len(kept) :]:
        step = _ask(pipe, transform, now, seen=seen, optional=transform in by_preset, off=off)
        steps.append(step)
        if step.verdict == "apply" and not transform.keeps_compiled(seen, now):
            off = off.union(transform.changes_inside)
        if step.planned is not None:
            now = replace(now, state=step.planned)
    family = family_of(pipe)
    return Plan(
        pipe_class=type(pipe).__name__,
        family=family.name if family.is_known else None,
        context=context,
        steps=tuple(steps),
        blockers=tuple(_blockers(pipe)),
        preset=preset,
        bytes_before=pipe_bytes(pipe),
    )


def check_pipeline(pipe: AnyPipeline) -> Pipeline:
    """Return a pipeline under its type; refuse anything else, and say what was found.

    Raises:
        ErnieAccelError: `pipe` has no components.
    """
    if not isinstance(getattr(pipe, "components", None), dict):
        raise ErnieAccelError(
            f"expected a diffusers pipeline (with .components), got {type(pipe).__name__}. "
            "Load one with DiffusionPipeline.from_pretrained(...); to optimize a bare model, put it into its pipeline."
        )
    return cast(Pipeline, pipe)


def _blockers(pipe: Pipeline) -> Iterator[str]:
    names = bare_float8(pipe)
    if names:
        yield (
            said(
                "{names}: weights were cast to float8 without scales (torch_dtype=torch.float8_...), and no kernel "
                "can run that. Load with torch_dtype=torch.bfloat16 and quantize instead: ernie_accel.optimize(pipe, "
                "preset='turbo-fp8'), or ernie_accel.Quantize('fp8') among your transforms",
                names=", ".join(names),
            )
        )
