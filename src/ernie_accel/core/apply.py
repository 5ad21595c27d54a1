"""Apply a plan to a pipe. Whatever interrupts, the pipe is unchanged, or its report can restore it.

An optimized pipe carries its report, receipts included, in one attribute. A second request replaces the first: the
transforms that both begin with stay in place, the rest of the old ones are undone, and the rest of the new ones are
applied.

After an interrupt (Ctrl-C at any line), either the pipe is as it was, or its report lists everything that was applied,
even in part, and `undo_all` restores the original. For that, the undo of each change is recorded in the report before
the change is made.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ernie_accel.common.language import said
from ernie_accel.core.carried import carried_report, carry, drop
from ernie_accel.core.compiled import apply_inside, previewed, seen_through
from ernie_accel.core.components import AnyPipeline, Pipeline, pipe_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ApplyError, ErnieAccelError, RestoreError, UnsupportedError
from ernie_accel.core.owners import claim, release, sharing_problems
from ernie_accel.core.plan import check_pipeline, keep_entries, plan_steps, reason_not_to_undo, title_of
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.preset import Preset
from ernie_accel.core.report import Entry, Report
from ernie_accel.core.step import Step
from ernie_accel.core.transform import Applied, Phase, Transform
from ernie_accel.core.turns import stop_taking_turns, take_turns
from ernie_accel.core.undo import Replaced, Undo, recorded


def apply_request(
    pipe: Pipeline, wanted: tuple[Transform, ...], preset: Preset | None, machine: Context, *, skip_unsupported: bool
) -> None:
    """Make a pipe what `wanted` asks for, in place; see ``ernie_accel.optimize``.

    Args:
        pipe: A diffusers pipeline.
        wanted: All transforms in the order they run.
        preset: Where they came from, for the title of the report.
        machine: The machine's facts.
        skip_unsupported: Leave out what cannot run here, and say why in the report.
    """
    old = report_of(pipe)
    old = replace(old, entries=tuple(map(_settled, old.entries)))
    kept, resumed, removed = keep_entries(pipe, old, wanted, machine)
    _check_can_rewind(removed)
    try:
        _rewind(pipe, replace(old, entries=kept + removed), keep=len(kept))
        the_plan = plan_steps(pipe, wanted, preset, machine, kept)
        if the_plan.blockers or (the_plan.problems and not skip_unsupported):
            raise UnsupportedError(the_plan)
        new = Report(title_of(wanted, preset), type(pipe).__name__, machine, kept)
        _apply(pipe, new, the_plan.steps[len(kept) :])
        if not wanted:
            _let_go(pipe)
    except BaseException:  # Ctrl-C too: a request that failed leaves the pipe as the one before it made it
        left = _rewind(pipe, report_of(pipe), keep=len(kept))
        if left:
            carry(pipe, replace(old, entries=kept + left))
        else:
            _put_back(pipe, replace(old, entries=kept + resumed), removed)
        raise


def report_of(pipe: AnyPipeline) -> Report:
    """Return the report that a pipe carries, an empty one for an untouched pipe."""
    checked = check_pipeline(pipe)
    return carried_report(checked) or Report(said("nothing applied"), type(pipe).__name__, Context.detect(checked), ())


def undo_all(pipe: Pipeline) -> None:
    """Undo in place everything that was applied, the last thing first; see ``ernie_accel.restore``."""
    carried = report_of(pipe)
    _check_can_rewind(carried.entries)
    _rewind(pipe, carried, keep=0)
    _let_go(pipe)


@contextlib.contextmanager
def suspended(pipe: Pipeline, after: Phase) -> Iterator[None]:
    """Undo what was applied after a phase for the length of a with-block, then apply it again.

    Raises:
        RestoreError: Something cannot be undone; nothing was.
    """
    old = report_of(pipe)
    stays = tuple(entry for entry in old.entries if entry.step.transform.phase <= after)
    away = old.entries[len(stays) :]
    _check_can_rewind(away)
    try:
        _rewind(pipe, old, keep=len(stays))
        yield
    finally:
        _rewind(pipe, report_of(pipe), keep=len(stays))  # finishes the first one, if that was interrupted
        _put_back(pipe, replace(old, entries=stays), away)


def _let_go(pipe: Pipeline) -> None:
    """Return a pipe from which everything was undone to its state before the first request."""
    stop_taking_turns(pipe)
    drop(pipe)


def _apply(pipe: Pipeline, base: Report, steps: Iterable[Step]) -> None:
    """Apply `steps` in order on a pipe to which `base` was applied, or none of them.

    At every moment the pipe carries a report that can undo everything that may have changed.

    Raises:
        ApplyError: One failed. Those before it are undone, down to the last one that has no undo.
    """
    current: Step | None = None
    try:
        done: tuple[Entry, ...] = ()
        carry(pipe, base)
        take_turns(pipe)
        for step in steps:
            current = step
            done = (*done, _apply_step(pipe, replace(base, entries=base.entries + done), step))
            carry(pipe, replace(base, entries=base.entries + done))
    except BaseException as error:  # Ctrl-C too: what was begun is undone, whatever ended it
        left = _rewind(pipe, report_of(pipe), keep=len(base.entries))
        if current is None or not isinstance(error, Exception):
            raise
        so_far = Report(said("applied before the failure"), type(pipe).__name__, base.context, done)
        stays = tuple(entry.step.transform for entry in left if entry.applied is not None)
        raise ApplyError(current.transform, f"{type(error).__name__}: {error}", so_far, stays) from error


def _apply_step(pipe: Pipeline, so_far: Report, step: Step) -> Entry:
    """Apply one step; meanwhile the pipe carries an entry that can undo what was done so far."""
    if step.verdict != "apply":
        return Entry(step, None)
    context = replace(so_far.context, state=PlannedPipe.of(pipe))  # what was planned, with what can be seen
    seen = seen_through(pipe)
    preview = previewed(pipe, step.transform, seen, context)  # again: a step before may have done this one's work
    if not preview.changes:
        return Entry(replace(step, preview=preview, planned=None), None)
    shared = sharing_problems(pipe, preview.changes)
    if shared:
        raise ErnieAccelError("; ".join(shared))
    step = replace(step, preview=preview, planned=step.transform.planned(seen, context))
    under_way = UnderWay()
    carry(pipe, replace(so_far, entries=(*so_far.entries, under_way.entry(step, preview.changes))))
    claim(pipe, step.transform, preview.changes)  # once the report lists the step: undoing that releases the claim
    before, start = pipe_bytes(pipe), time.perf_counter()
    with torch.inference_mode(False):  # weights made inside would refuse gradients forever
        applied = recorded(under_way.journal, lambda: apply_inside(pipe, step.transform, context))
    if not applied.changed:
        raise RuntimeError("it changed nothing, although its preview said it would")
    seconds = time.perf_counter() - start
    replaced = frozenset[Replaced]().union(*(undo.replaced for undo in under_way.journal))
    after = pipe_bytes(pipe)
    applied = replace(applied, seconds=seconds, replaced=replaced, bytes_before=before, bytes_after=after)
    return Entry(step, applied)


class UnderWay:
    """The undo of a transform that has not returned its receipt yet: all the `Undo`s it has made so far."""

    def __init__(self) -> None:
        self.journal: list[Undo] = []

    def entry(self, step: Step, changes: tuple[str, ...]) -> Entry:
        """Return what the pipe's report says about the transform in the meantime."""
        return Entry(step, Applied(changes, undo=self, unfinished=True))

    @property
    def no_way_back(self) -> str | None:
        """Why what was done so far cannot be undone; None if it can."""
        reason = next((undo.no_way_back for undo in self.journal if undo.no_way_back is not None), None)
        return None if reason is None else said("it was interrupted half-way, and {reason}", reason=reason)

    def objections(self) -> Iterator[str]:
        """Yield why the changes cannot be taken back without losing something."""
        for undo in self.journal:
            yield from undo.objections()

    def __call__(self) -> None:
        for undo in reversed(self.journal):
            undo()


def _check_can_rewind(entries: Iterable[Entry]) -> None:
    """Refuse before anything is undone.

    Raises:
        RestoreError: One of the entries cannot be undone, or not without losing what a script did since.
    """
    for entry in map(_settled, entries):
        reason = reason_not_to_undo(entry)
        if reason is not None:
            raise RestoreError(entry.step.transform, reason)


def _settled(entry: Entry) -> Entry:
    """Return an entry that is no longer under way: one that can be undone, or the reason why it cannot."""
    way = entry.applied.undo if entry.applied is not None else None
    if entry.applied is None or not isinstance(way, UnderWay) or way.no_way_back is None:
        return entry
    return replace(entry, applied=replace(entry.applied, undo=None, no_undo=way.no_way_back))


def _rewind(pipe: Pipeline, carried: Report, keep: int) -> tuple[Entry, ...]:
    """Undo all but the first `keep` entries, last first, as far as possible.

    At every moment the pipe carries the entries that are still in place, wholly or in part.

    Returns:
        The entries after the first `keep` that stay, because the last of them has no undo.
    """
    entries = tuple(map(_settled, carried.entries))
    while len(entries) > keep:
        applied = entries[-1].applied
        if applied is not None and applied.undo is None:
            break
        if applied is not None and applied.undo is not None:
            with torch.inference_mode(False):
                applied.undo()
        undone, entries = entries[-1], entries[:-1]
        carry(pipe, replace(carried, entries=entries))
        release(pipe, undone.step.transform)
    return entries[keep:]


def _put_back(pipe: Pipeline, base: Report, removed: tuple[Entry, ...]) -> None:
    """Carry `base`, and apply again what was undone for a request that failed, or for a while."""
    if not base.entries and not removed:
        _let_go(pipe)
        return
    _apply(pipe, base, [entry.step for entry in removed])
