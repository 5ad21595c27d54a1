"""START HERE: change a pipeline by a list of transforms, say what was done, and give the original back.

    plan      ask every transform what it would do                       (plan.py; changes nothing)
    optimize  plan, then apply one after the other; on failure undo all
    report    the receipts of what was applied                           (report.py)
    restore   undo in reverse order

A pipe that was optimized carries its report, with the receipts in it, in one attribute. Asking again states the
whole wish anew: what both wishes begin with stays, the rest of the old one is undone, the rest of the new applied.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from ernie_accel.core.carried import carried_report, carry, drop, is_copy, split_entries
from ernie_accel.core.components import Pipeline, pipe_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ApplyError, RestoreError, UnknownNameError, UnsupportedError
from ernie_accel.core.plan import check_pipeline, compose, machine_for, plan_steps, title_of
from ernie_accel.core.preset import Preset, find_preset
from ernie_accel.core.report import Entry, Report
from ernie_accel.core.step import Step
from ernie_accel.core.transform import Phase, Transform


def optimize(
    pipe: Pipeline,
    *transforms: Transform,
    preset: Preset | str | None = None,
    on_unsupported: Literal["error", "skip"] = "error",
    context: Context | None = None,
) -> Pipeline:
    """Make a pipeline faster or leaner in place, and return it.

    Everything is checked before anything is touched. Optimizing again with the same arguments changes nothing; with
    others, what no longer belongs is undone first.

    Args:
        pipe: A diffusers pipeline.
        *transforms: Transforms, in any order; beside a preset they replace those in the same slot.
        preset: A preset or its name; see ``ernie_accel.presets``.
        on_unsupported: "error" refuses the whole plan if a transform cannot run here; "skip" leaves such transforms
            out, and the report says why.
        context: The machine's facts; default: looked up.

    Returns:
        The same object.

    Raises:
        UnknownNameError: There is no such preset.
        ConflictError: Two transforms want one slot.
        UnsupportedError: A transform cannot run here (all reasons at once), or the pipe cannot run at all.
        ApplyError: A transform failed; the pipe is as it was before this call.
        RestoreError: An earlier transform would have to be undone and cannot be; nothing was undone.
    """
    if on_unsupported not in ("error", "skip"):
        raise UnknownNameError("value of on_unsupported", on_unsupported, ("error", "skip"))
    wanted = compose(transforms, preset)
    check_pipeline(pipe)
    named = find_preset(preset) if preset is not None else None
    machine = context or machine_for(pipe, wanted)

    old = report(pipe)
    kept, removed = split_entries(old.entries, wanted)
    _undo(pipe, removed)
    now = machine.after(*(entry.step.transform for entry in kept if not entry.step.reasons))
    try:
        the_plan = plan_steps(pipe, wanted, named, machine, kept)
        if the_plan.blockers or (the_plan.problems and on_unsupported == "error"):
            raise UnsupportedError(the_plan)
        added = _apply(pipe, the_plan.steps[len(kept) :], now)
    except BaseException:  # Ctrl-C too: a wish that failed leaves the pipe as the one before it made it
        if removed:
            carry(pipe, replace(old, entries=kept + _apply(pipe, [entry.step for entry in removed], now)))
        raise
    carry(pipe, Report(title_of(wanted, named), type(pipe).__name__, machine, kept + added))
    return pipe


def report(pipe: Pipeline) -> Report:
    """Return what has been applied to `pipe`, skipped and why; print it. Empty for an untouched pipe."""
    check_pipeline(pipe)
    return carried_report(pipe) or Report("nothing applied", type(pipe).__name__, Context.detect(pipe), ())


def restore(pipe: Pipeline) -> Pipeline:
    """Undo in place everything `optimize` did, the last thing first, and return the pipe.

    Raises:
        RestoreError: A transform has no undo; nothing was undone.
    """
    _undo(pipe, report(pipe).entries)
    drop(pipe)
    return pipe


@contextlib.contextmanager
def suspended(pipe: Pipeline, after: Phase) -> Iterator[None]:
    """Undo, for the time of a with-block, what was applied after a phase, then apply it again.

    Raises:
        RestoreError: Something cannot be undone; nothing was.
    """
    old = report(pipe)
    stays = tuple(entry for entry in old.entries if entry.step.transform.phase <= after)
    rest = old.entries[len(stays) :]
    _undo(pipe, rest)
    try:
        yield
    finally:
        now = old.context.after(*(entry.step.transform for entry in stays if not entry.step.reasons))
        if rest:
            carry(pipe, replace(old, entries=stays + _apply(pipe, [entry.step for entry in rest], now)))


def _apply(pipe: Pipeline, steps: Iterable[Step], context: Context) -> tuple[Entry, ...]:
    """Apply `steps` in order, or none of them."""
    done: list[Entry] = []
    for step in steps:
        if step.verdict != "apply":
            done.append(Entry(step, None))
            continue
        before, start = pipe_bytes(pipe), time.perf_counter()
        try:
            applied = step.transform.apply(pipe, context)
            if not applied.changed:
                raise RuntimeError("it changed nothing, although its preview said it would")
        except BaseException as error:
            _undo(pipe, done)
            if not isinstance(error, Exception):
                raise
            so_far = Report("applied before the failure", type(pipe).__name__, context, tuple(done))
            raise ApplyError(step.transform, f"{type(error).__name__}: {error}", so_far) from error
        seconds = time.perf_counter() - start
        applied = replace(applied, seconds=seconds, bytes_before=before, bytes_after=pipe_bytes(pipe))
        done.append(Entry(step, applied))
        context = context.after(step.transform)
    return tuple(done)


def _undo(pipe: Pipeline, entries: Iterable[Entry]) -> None:
    """Undo `entries`, the last one first; refuse before the first undo if one of them cannot be undone."""
    undos = []
    for entry in entries:
        if entry.applied is None:
            continue
        if entry.applied.undo is None:
            raise RestoreError(entry.step.transform, str(entry.applied.no_undo))
        if is_copy(pipe):
            raise RestoreError(entry.step.transform, "this pipe is a deep copy; restore the pipe it was copied from")
        undos.append(entry.applied.undo)
    for undo in reversed(undos):
        undo()
