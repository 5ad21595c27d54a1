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

import torch

from ernie_accel.core.carried import carried_report, carry, drop, is_copy
from ernie_accel.core.components import Pipeline, pipe_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ApplyError, RestoreError, UnknownNameError, UnsupportedError
from ernie_accel.core.plan import check_pipeline, compose, keep_entries, machine_for, plan_steps, title_of
from ernie_accel.core.preset import Preset, find_preset
from ernie_accel.core.report import Entry, Report
from ernie_accel.core.step import Step
from ernie_accel.core.transform import Phase, Transform
from ernie_accel.families import family_of


def optimize(
    pipe: Pipeline,
    *transforms: Transform,
    preset: Preset | str | None = None,
    on_unsupported: Literal["error", "skip"] = "error",
    context: Context | None = None,
) -> Pipeline:
    """Make a pipeline faster or leaner in place, and return it.

    Everything is checked before anything is changed. Optimizing again with the same arguments changes nothing; with
    others, what no longer belongs is undone first, and put back if the new wish is refused. What you change by hand on
    an optimized pipe (fusing a LoRA, replacing a component) is not noticed: restore it first.

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
        ApplyError: A transform failed; the pipe is as it was before this call, or the error says what is not.
        RestoreError: An earlier transform would have to be undone and cannot be; nothing was undone.
    """
    if on_unsupported not in ("error", "skip"):
        raise UnknownNameError("value of on_unsupported", on_unsupported, ("error", "skip"))
    wanted = compose(transforms, preset, family_of(pipe))
    check_pipeline(pipe)
    named = find_preset(preset) if preset is not None else None
    machine = context or machine_for(pipe, wanted)

    old = report(pipe)
    kept, removed = keep_entries(pipe, old, wanted, machine)
    _rewind(pipe, old, keep=len(kept))
    now = machine.after(*(entry.step.transform for entry in kept if not entry.step.reasons))
    try:
        the_plan = plan_steps(pipe, wanted, named, machine, kept)
        if the_plan.blockers or (the_plan.problems and on_unsupported == "error"):
            raise UnsupportedError(the_plan)
        added = _apply(pipe, the_plan.steps[len(kept) :], now)
    except BaseException as error:  # Ctrl-C too: a wish that failed leaves the pipe as the one before it made it
        left = error.left if isinstance(error, ApplyError) else ()
        _put_back(pipe, replace(old, entries=kept + left), () if left else removed, now)
        raise
    if wanted:
        carry(pipe, Report(title_of(wanted, named), type(pipe).__name__, machine, kept + added))
    else:
        drop(pipe)
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
    _rewind(pipe, report(pipe), keep=0)
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
    _rewind(pipe, old, keep=len(stays))
    try:
        yield
    finally:
        now = old.context.after(*(entry.step.transform for entry in stays if not entry.step.reasons))
        _put_back(pipe, replace(old, entries=stays), old.entries[len(stays) :], now)


def _apply(pipe: Pipeline, steps: Iterable[Step], context: Context) -> tuple[Entry, ...]:
    """Apply `steps` in order, or none of them.

    Raises:
        ApplyError: One failed. Those before it are undone, down to the last one that has no undo.
    """
    done: list[Entry] = []
    for step in steps:
        if step.verdict != "apply":
            done.append(Entry(step, None))
            continue
        before, start = pipe_bytes(pipe), time.perf_counter()
        try:
            preview = step.transform.preview(pipe, context)  # again: a step before may have done this one's work
            if not preview.changes:
                done.append(Entry(replace(step, preview=preview), None))
                continue
            with torch.inference_mode(False):  # weights made inside would refuse gradients for ever
                applied = step.transform.apply(pipe, context)
            if not applied.changed:
                raise RuntimeError("it changed nothing, although its preview said it would")
        except BaseException as error:
            so_far = Report("applied before the failure", type(pipe).__name__, context, tuple(done))
            while done and (done[-1].applied is None or done[-1].applied.undo is not None):
                _undo(done.pop())
            if not isinstance(error, Exception):
                raise
            raise ApplyError(step.transform, f"{type(error).__name__}: {error}", so_far, tuple(done)) from error
        seconds = time.perf_counter() - start
        applied = replace(applied, seconds=seconds, bytes_before=before, bytes_after=pipe_bytes(pipe))
        done.append(Entry(replace(step, preview=preview), applied))
        context = context.after(step.transform)
    return tuple(done)


def _rewind(pipe: Pipeline, carried: Report, keep: int) -> None:
    """Undo all but the first `keep` entries, the last one first; the report that the pipe carries stays true.

    Raises:
        RestoreError: One of them cannot be undone; none was.
    """
    for entry in carried.entries[keep:]:
        if entry.applied is not None and entry.applied.undo is None:
            raise RestoreError(entry.step.transform, str(entry.applied.no_undo))
        if entry.applied is not None and is_copy(pipe):
            raise RestoreError(entry.step.transform, "this pipe is a copy; restore the pipe it was copied from")
    for index in reversed(range(keep, len(carried.entries))):
        _undo(carried.entries[index])
        carry(pipe, replace(carried, entries=carried.entries[:index]))


def _undo(entry: Entry) -> None:
    if entry.applied is not None and entry.applied.undo is not None:
        with torch.inference_mode(False):
            entry.applied.undo()


def _put_back(pipe: Pipeline, carried: Report, removed: tuple[Entry, ...], context: Context) -> None:
    """Carry `carried`, and apply again what was undone for a wish that failed, or for a while."""
    if carried.entries or removed:
        carry(pipe, carried)
    if removed:
        again = _apply(pipe, [entry.step for entry in removed], context)
        carry(pipe, replace(carried, entries=carried.entries + again))
