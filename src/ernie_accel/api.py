"""START HERE: change a pipeline by a list of transforms, say what was done, and give the original back.

    plan      ask every transform what it would do                       (core/plan.py; changes nothing)
    optimize  plan, then apply one after the other; on failure undo all  (core/apply.py)
    report    the receipts of what was applied                           (core/report.py)
    restore   undo in reverse order

What a transform is stands in ``core/transform.py``; all of them are in ``transforms/``, the presets in ``recipes/``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

from ernie_accel.core.apply import apply_request, report_of, undo_all
from ernie_accel.core.components import AnyPipeline, Pipeline, PipelineT, denoisers_of
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError
from ernie_accel.core.plan import Plan, check_pipeline, compose, machine_for, plan_request
from ernie_accel.core.preset import Preset
from ernie_accel.core.report import Report
from ernie_accel.core.transform import Transform
from ernie_accel.families import Family, family_of, give_family
from ernie_accel.plugins import load_plugins
from ernie_accel.recipes.presets import find_preset
from ernie_accel.recipes.recommend import fitting_preset


def plan(
    pipe: AnyPipeline,
    *transforms: Transform,
    preset: Preset | str | None = None,
    family: Family | None = None,
    context: Context | None = None,
) -> Plan:
    """Say what `optimize` would do with the same arguments. Changes nothing and needs no accelerator.

    Args:
        pipe: A diffusers pipeline, as it is now.
        *transforms: Transforms, in any order; beside a preset they replace those in the same slot.
        preset: A preset or its name.
        family: What is known of its architecture, where the library does not find that out; see `register_family`.
        context: The machine to plan for; default this one. ``Context.named("h200")`` plans for another.

    Returns:
        The plan; print it.

    Raises:
        UnknownNameError: There is no such preset.
        ConflictError: Two transforms want one slot.
        ErnieAccelError: A family was given, and the pipe has no transformer.
    """
    checked = check_pipeline(pipe)
    with _given(checked, family):
        named, wanted = _request(checked, transforms, preset)
        return plan_request(checked, wanted, named, context or machine_for(checked, wanted))


def optimize(
    pipe: PipelineT,
    *transforms: Transform,
    preset: Preset | str | None = None,
    on_unsupported: Literal["error", "skip"] = "error",
    family: Family | None = None,
    context: Context | None = None,
) -> PipelineT:
    """Make a pipeline faster or leaner in place, and return it.

    Everything is checked before anything is changed. Optimizing again with the same arguments changes nothing; with
    others, what no longer belongs is undone first, and put back if the new request is refused. What you change by hand
    on an optimized pipe (fusing a LoRA, replacing a component) is not noticed: restore it first.

    Args:
        pipe: A diffusers pipeline.
        *transforms: Transforms, in any order; beside a preset they replace those in the same slot.
        preset: A preset or its name; see ``ernie_accel.presets``.
        on_unsupported: "error" refuses the whole plan if a transform cannot run here; "skip" leaves such transforms
            out, and the report says why.
        family: What is known of its architecture, where the library does not find that out; see `register_family`. It
            is remembered until `restore`.
        context: The machine's facts; default: looked up.

    Returns:
        The same object.

    Raises:
        UnknownNameError: There is no such preset.
        ConflictError: Two transforms want one slot.
        UnsupportedError: A transform cannot run here (all reasons at once), or the pipe cannot run at all.
        ApplyError: A transform failed; the pipe is as it was before this call, or the error says what is not.
        RestoreError: An earlier transform would have to be undone and cannot be; nothing was undone.
        ErnieAccelError: Nothing was asked for, and nothing was applied before that this would undo.
    """
    if on_unsupported not in ("error", "skip"):
        raise UnknownNameError("value of on_unsupported", on_unsupported, ("error", "skip"))
    checked = check_pipeline(pipe)
    with _given(checked, family) as remember:
        named, wanted = _request(checked, transforms, preset)
        machine = context or machine_for(checked, wanted)
        if named is None and not wanted and not report_of(checked).entries:
            raise ErnieAccelError(
                "optimize was given nothing to apply: found no preset and no transform. Name a preset, for instance "
                f"optimize(pipe, preset={fitting_preset(machine).name!r}), which fits this machine "
                "(print(ernie_accel.presets) lists all), or pass transforms: optimize(pipe, ernie_accel.Compile())."
            )
        apply_request(checked, wanted, named, machine, skip_unsupported=on_unsupported == "skip")
        remember()
    return pipe


def report(pipe: AnyPipeline) -> Report:
    """Return what has been applied to `pipe`, skipped and why; print it. Empty for an untouched pipe."""
    return report_of(pipe)


def restore(pipe: PipelineT) -> PipelineT:
    """Undo in place everything `optimize` did, the last thing first, and return the pipe.

    If it is interrupted, the report lists what is still to be undone, and calling it again finishes the work.

    Raises:
        RestoreError: A transform has no undo; nothing was undone.
    """
    checked = check_pipeline(pipe)
    undo_all(checked)
    if getattr(checked, "transformer", None) is not None:
        give_family(checked.transformer, None)
    return pipe


def _request(
    pipe: Pipeline, transforms: tuple[Transform, ...], preset: Preset | str | None
) -> tuple[Preset | None, tuple[Transform, ...]]:
    """Return the preset, if one was named, and all transforms in the order they run."""
    load_plugins()
    named = find_preset(preset) if preset is not None else None
    return named, compose(transforms, named, family_of(pipe))


@contextlib.contextmanager
def _given(pipe: Pipeline, family: Family | None) -> Iterator[Callable[[], None]]:
    """Let `pipe` be of `family` within the block; afterwards too, if the yielded function was called."""
    if family is None:
        yield lambda: None
        return
    if getattr(pipe, "transformer", None) is None:
        denoisers = " and ".join(denoisers_of(pipe)) or "none"
        raise ErnieAccelError(
            f"family {family.name!r} was given, and this {type(pipe).__name__} has no transformer that could be of it "
            f"(its denoisers: {denoisers}): leave family= out"
        )
    remembered = False

    def remember() -> None:
        nonlocal remembered
        remembered = True

    before = give_family(pipe.transformer, family)
    try:
        yield remember
    finally:
        if not remembered:
            give_family(pipe.transformer, before)
