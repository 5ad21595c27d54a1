"""START HERE: change a pipeline by a list of transforms, say what was done, and give the original back.

    plan      ask every transform what it would do                       (core/plan.py; changes nothing)
    optimize  plan, then apply one after the other; on failure undo all  (core/apply.py)
    report    the receipts of what was applied                           (core/report.py)
    restore   undo in reverse order                                      (core/apply.py)
    load      read a pipeline and optimize it on its way to the device   (storage/, memory/)

``core/transform.py`` says what a transform is; all of them are in ``transforms/``, the presets in ``recipes/``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ernie_accel.common.notes import Note
from ernie_accel.core.apply import apply_request, report_of, undo_all
from ernie_accel.core.carried import carried_report
from ernie_accel.core.compiled import seen_through
from ernie_accel.core.components import (
    AnyPipeline,
    CallablePipeline,
    Pipeline,
    PipelineT,
    denoisers_of,
    device_of,
    is_skeleton,
)
from ernie_accel.core.context import Context, is_here
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError, UnsupportedError
from ernie_accel.core.plan import Plan, check_pipeline, compose, machine_for, plan_request
from ernie_accel.core.preset import Preset
from ernie_accel.core.report import Report
from ernie_accel.core.transform import Transform
from ernie_accel.families import Family, give_family
from ernie_accel.memory.call import Call
from ernie_accel.memory.planner import available_on_host, budget_of, check_fits, free_on_device, places, plan_memory
from ernie_accel.models.lora_loading import read_loras, stop_reading_loras
from ernie_accel.plugins import load_plugins
from ernie_accel.recipes.presets import find_preset
from ernie_accel.recipes.recommend import fitting_preset, recommend
from ernie_accel.storage.loading import drop_enhancer, load_pipeline, refuse_transformer, was_saved_here
from ernie_accel.storage.meanwhile import prepare
from ernie_accel.storage.reading import forgetful
from ernie_accel.storage.reading import read as read_saved
from ernie_accel.transforms.weights.quantize import Quantize
from ernie_accel.transforms.weights.residency import Residency


def plan(
    pipe: AnyPipeline,
    *transforms: Transform,
    preset: Preset | str | None = None,
    family: Family | None = None,
    context: Context | None = None,
    memory: str | int | None = None,
    call: Call | None = None,
) -> Plan:
    """Say what `optimize` would do with the same arguments. Changes nothing and needs no accelerator.

    Args:
        pipe: A diffusers pipeline, as it is now.
        *transforms: Transforms, in any order; beside a preset they replace those in the same slot.
        preset: A preset or its name.
        family: What is known of its architecture, where the library does not find that out; see `register_family`.
        context: The machine to plan for; default this one. ``Context.named("h200")`` plans for another.
        memory: Work out what the device will hold, and choose where the weights live so that it fits: "auto", "12GiB",
            "-2GiB" to leave that free, or bytes; None: only where `optimize` would choose by itself.
        call: What will be asked of the pipe, for `memory`; default: one picture of 1024x1024.

    Returns:
        The plan; print it.

    Raises:
        UnknownNameError: There is no such preset.
        ConflictError: Two transforms want one slot.
        ErnieAccelError: A family was given, and the pipe has no transformer.
    """
    checked = check_pipeline(pipe)
    with _given(checked, family, lasting=False):
        named, wanted = _request(checked, transforms, preset, context)
        placing = _kept_placing(checked, transforms, memory, call) if context is None else None
        if placing is not None:
            together = compose((*transforms, *placing.chosen), named, seen_through(checked))
            return plan_request(checked, together, named, machine_for(checked, together))
        if memory is None and not _is_brought_over(checked, wanted, named, context):
            return plan_request(checked, wanted, named, context or machine_for(checked, wanted))
        _refuse_kept(checked)
        machine = context or _device_for(checked, wanted)
        free = free_on_device(checked, machine.torch_device) if context is None else None
        seen = seen_through(checked)
        found = plan_memory(seen, transforms, named, machine, "auto" if memory is None else memory, call, free=free)
        chosen = _Placing(memory, call or Call(), found.transforms).beside(transforms).chosen
        together = compose((*transforms, *chosen), named, seen)
        return replace(plan_request(checked, together, named, machine), memory=found)


def optimize(
    pipe: PipelineT,
    *transforms: Transform,
    preset: Preset | str | None = None,
    on_unsupported: Literal["error", "skip"] = "error",
    family: Family | None = None,
    context: Context | None = None,
    memory: str | int | None = "auto",
    call: Call | None = None,
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
        memory: Where the weights live. "auto": on a machine with an accelerator, a pipe on the host is brought there
            in the fastest way that fits if a preset is named, or if what you ask for runs only there; any other pipe
            stays where it is. "12GiB" or bytes: within that much of the device's memory; "-2GiB": all but that. None:
            the pipe stays where it was loaded, also on the host of such a machine. Once chosen, it stays as long as you
            do not ask for another. What a transform of yours says about it (`MoveTo`, `Offload`, ...) wins.
        call: What will be asked of the pipe, for `memory`; default: one picture of 1024x1024.

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
    _optimize(pipe, transforms, preset, on_unsupported, family=family, context=context, memory=memory, call=call)
    return pipe


def _optimize(
    pipe: AnyPipeline,
    transforms: tuple[Transform, ...],
    preset: Preset | str | None,
    on_unsupported: str,
    *,
    family: Family | None = None,
    context: Context | None = None,
    memory: str | int | None = None,
    call: Call | None = None,
    device: str | None = None,
) -> None:
    """Do what `optimize` says; with `device`, weights are placed there even where nothing else is asked for."""
    if on_unsupported not in ("error", "skip"):
        raise UnknownNameError("value of on_unsupported", on_unsupported, ("error", "skip"))
    checked = check_pipeline(pipe)
    if is_skeleton(checked):
        raise ErnieAccelError(f"this {type(pipe).__name__} was made without weights, for plans; load(...) reads them")
    skip = on_unsupported == "skip"
    with _given(checked, family, lasting=True):
        named, wanted = _request(checked, transforms, preset, context)
        placing = _placed(checked, transforms, wanted, named, context, memory, call, device, skip_unsupported=skip)
        if placing.chosen:
            wanted = compose((*transforms, *placing.chosen), named, seen_through(checked))
        machine = context or machine_for(checked, wanted)
        if named is None and not wanted and not report_of(checked).entries:
            raise ErnieAccelError(
                "optimize was given nothing to apply: found no preset and no transform. Name a preset, for instance "
                f"optimize(pipe, preset={fitting_preset(machine).name!r}), which fits this machine "
                "(print(ernie_accel.presets) lists all), or pass transforms: optimize(pipe, ernie_accel.Compile())."
            )
        before = PLACED.of(checked)
        try:
            if placing.chosen:  # before it is done: an interrupt may come right after, and must not lose the note
                PLACED.put(checked, placing)
            read_loras(checked)  # beneath what transforms put there
            apply_request(checked, wanted, named, machine, skip_unsupported=skip)
        except BaseException:  # Ctrl-C too: the note says what is true of the pipe as it is by then
            if before is None:
                PLACED.drop(checked)
            else:
                PLACED.put(checked, before)
            raise
        finally:
            if carried_report(checked) is None:  # it was refused, or everything was undone
                stop_reading_loras(checked)


def load(
    model: str | os.PathLike[str],
    *transforms: Transform,
    preset: Preset | str | None = None,
    memory: str | int | None = "auto",
    device: str | None = None,
    dtype: str = "auto",
    prompt_enhancer: bool = True,
    on_unsupported: Literal["error", "skip"] = "error",
    known: Iterable[type] = (),
    call: Call | None = None,
    transformer: str | os.PathLike[str] | None = None,
) -> CallablePipeline:
    """Read a pipeline and optimize it on its way to the device. Nothing that comes with it is run.

    A pipe that `save` wrote has the same bits and the same transforms as then; `transforms`, and those of `preset`,
    take the place of the saved ones in their slots. If `preset`, `memory` or `call` is given, its weights are mapped
    from their files and brought to where the plan says, one after the other; else they are read as a whole.

    Any other is read with its weights mapped from their files, and quantized layer by layer, so the device never holds
    more than what was planned and one layer, and the originals take no memory of their own.

    Args:
        model: A folder that `save` or ``save_pretrained`` wrote, or a hub id.
        *transforms: Transforms, beside the preset or the saved ones.
        preset: A preset or its name, or "auto" for the one that fits the machine. Of a pipe that `save` wrote, it must
            ask for the weights that were saved; "auto" takes it as it was saved.
        memory: As in `optimize`.
        device: Where to; None: the accelerator, where there is one; for a pipe that `save` wrote the CPU, unless
            `preset`, `memory` or `call` is given.
        dtype: Of the weights as they are read: "bfloat16", ...; "auto" is bfloat16 for an accelerator and float32 for
            the CPU.
        prompt_enhancer: Keep its prompt enhancer, if it has one; without it there is more memory for the rest.
        on_unsupported: What to do with a transform that cannot run here; as in ``optimize``.
        known: Classes that a folder that `save` wrote may name beside those that pipelines use.
        call: As in `optimize`.
        transformer: A single file with the transformer's weights, safetensors or GGUF, as ComfyUI keeps them; `model`,
            of the same architecture and size, gives everything else. What is quantized in it (fp8, int8, GGUF) is
            decoded to `dtype` on the host; `Quantize` makes it small again on its way to the device.

    Returns:
        The pipe. What was quantized on the way cannot be undone by ``restore``: the originals are in the files.

    Raises:
        SavedPipelineError: The folder is damaged, or names more than data, or needs what is not here.
        UnsupportedError: A transform cannot run here.
        ConflictError: Two of `transforms` want one slot.
        ErnieAccelError: There is no such model, or it does not fit; the error says what would.
    """
    if device is not None and not is_here(device):
        raise ErnieAccelError(f"there is no device {device!r} here: this machine has {Context.detect()}")
    machine = Context.detect(device=device)
    if machine.device == "cpu" and memory not in (None, "auto"):
        raise ErnieAccelError(f"memory={memory!r} is about an accelerator's memory, and this is {machine}")
    # What can be refused before anything is read:
    if machine.device != "cpu" and memory is not None:
        budget_of(memory, machine)
    named = find_preset(preset) if preset is not None and preset != "auto" else None
    if was_saved_here(model):
        refuse_transformer(model, None if transformer is None else Path(transformer))
        if dtype != "auto":
            raise ErnieAccelError(
                f"{os.fspath(model)} was written by ernie_accel.save and keeps its dtypes; found dtype={dtype!r}"
            )
        return _load_saved(
            model, transforms, preset, memory, device, prompt_enhancer, on_unsupported, tuple(known), call
        )
    likely = fitting_preset(machine) if preset == "auto" else named  # which of them fits, only the pipe can tell
    prepare(model, (*transforms, *(likely.transforms if likely is not None else ())), machine, device)
    pipe = load_pipeline(
        os.fspath(model),
        dtype,
        machine.torch_device,
        prompt_enhancer=prompt_enhancer,
        on_host=True,
        transformer=transformer,
    )
    named, wanted = _request(check_pipeline(pipe), transforms, preset, machine)
    asked = tuple(map(forgetful, wanted))
    if machine.device != "cpu" and memory is not None:
        where = device or machine.torch_device
        _optimize(pipe, asked, named, on_unsupported, memory=memory, call=call, device=where)
    elif wanted:
        _optimize(pipe, asked, named, on_unsupported, call=call)
    return pipe


def _load_saved(
    model: str | os.PathLike[str],
    transforms: tuple[Transform, ...],
    preset: Preset | str | None,
    memory: str | int | None,
    device: str | None,
    prompt_enhancer: bool,
    on_unsupported: Literal["error", "skip"],
    known: tuple[type, ...],
    call: Call | None,
) -> CallablePipeline:
    """Read a pipe that `save` wrote, and place its weights if anything says for what, or where."""
    asked = preset is not None or call is not None or memory not in (None, "auto")
    goes_to = device or next((each.moves_to for each in transforms if each.moves_to is not None), None)
    machine = Context.detect(device=goes_to or (None if asked and memory is not None else "cpu"))
    plans = asked and memory is not None and machine.device not in ("cpu", "rocm")
    mapped = plans or (device is None and goes_to is not None)
    named = find_preset(preset) if preset is not None and preset != "auto" else None
    prepare(model, transforms, machine, goes_to)
    place = None if mapped else device or (machine.torch_device if asked and memory is not None else "cpu")
    pipe, wanted = read_saved(model, transforms, machine, place, preset=named, known=known, elsewhere=plans)
    if not prompt_enhancer:
        drop_enhancer(pipe)
    if plans:
        where = device or machine.torch_device
        _optimize(pipe, wanted, named, on_unsupported, memory=memory, call=call, device=where)
    elif len(report_of(check_pipeline(pipe)).entries) < len(wanted):
        _optimize(pipe, wanted, named, on_unsupported)
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
    stop_reading_loras(checked)
    PLACED.drop(checked)
    if getattr(checked, "transformer", None) is not None:
        give_family(checked.transformer, None)
    return pipe


@dataclass(frozen=True)
class _Placing:
    """What was chosen so that a pipe fits, and for which `memory` and `call`."""

    memory: str | int | None
    call: Call
    chosen: tuple[Transform, ...]

    def beside(self, own: tuple[Transform, ...]) -> _Placing:
        """Return what is left of it beside transforms of the user's own, which win."""
        taken = {name for each in own if isinstance(each, Quantize) for name in each.components}
        slots = {each.occupies for each in own}
        chosen = (
            each
            for each in self.chosen
            if each.occupies not in slots
            and not (taken.intersection(each.components) if isinstance(each, Quantize) else any(map(places, own)))
        )
        return replace(self, chosen=tuple(chosen))


PLACED = Note("placed", _Placing, "pipe", "where its weights were put, so that asking again changes nothing")


def _kept_placing(
    pipe: Pipeline, own: tuple[Transform, ...], memory: str | int | None, call: Call | None
) -> _Placing | None:
    """Return how the weights of a pipe were placed before, which stays; None if they were not.

    Raises:
        ErnieAccelError: They were placed for another `memory` or `call`.
    """
    before = PLACED.of(pipe)
    in_place = [entry.step.transform for entry in report_of(pipe).entries]
    if before is None or not all(each in in_place for each in before.chosen):  # undone since, or never finished
        return None
    other = f"memory={memory!r}" if memory not in (None, "auto", before.memory) else None
    if call is not None and call != before.call:
        other = f"call={call!r}"
    if other is not None:
        raise ErnieAccelError(
            f"its weights were placed for memory={before.memory!r} and {before.call!r}, and now {other} is asked for: "
            "call ernie_accel.restore(pipe) first, or load it anew"
        )
    return before.beside(own)


def _placed(
    pipe: Pipeline,
    own: tuple[Transform, ...],
    wanted: tuple[Transform, ...],
    preset: Preset | None,
    context: Context | None,
    memory: str | int | None,
    call: Call | None,
    device: str | None,
    *,
    skip_unsupported: bool,
) -> _Placing:
    """Choose where the weights of a pipe go.

    Raises:
        UnsupportedError: It does not fit because a part of what would make it smaller cannot run here.
        ErnieAccelError: It does not fit, or its weights were placed otherwise before.
    """
    before = _kept_placing(pipe, own, memory, call) if memory is not None else None
    if before is not None:
        return before
    by_itself = device is not None or _is_brought_over(pipe, wanted, preset, context)
    if memory is None or (memory == "auto" and not by_itself):
        return _Placing(memory, call or Call(), ())
    machine = context or (_device_for(pipe, wanted) if device is None else Context.detect(device=device))
    if machine.device == "cpu":
        raise ErnieAccelError(f"memory={memory!r} is about an accelerator's memory, and this is {machine}")
    _refuse_kept(pipe)
    free = free_on_device(pipe, device or machine.torch_device) if context is None else None
    found = plan_memory(seen_through(pipe), own, preset, machine, memory, call, device, free)
    if not found.fits and not skip_unsupported:
        the_plan = plan_request(pipe, wanted, preset, machine)
        if not the_plan.ok:
            raise UnsupportedError(the_plan)
    fitting = check_fits(found, available_on_host() if context is None else None)
    return _Placing(memory, call or Call(), fitting.transforms).beside(own)


def _refuse_kept(pipe: Pipeline) -> None:
    """Refuse to plan memory for a pipe whose weights `Residency` keeps.

    Raises:
        ErnieAccelError: They are.
    """
    if any(isinstance(entry.step.transform, Residency) for entry in report_of(pipe).entries):
        raise ErnieAccelError(
            "memory is planned for a pipe whose weights are in one place, and Residency keeps those of this one: "
            "call ernie_accel.restore(pipe) first"
        )


def _is_brought_over(
    pipe: Pipeline, wanted: tuple[Transform, ...], preset: Preset | None, context: Context | None
) -> bool:
    """Return whether a pipe goes from the host to the accelerator by itself: for a preset, or what only runs there."""
    if context is not None or not _waits_on_host(pipe):
        return False
    if preset is not None:
        return True
    here = plan_request(pipe, wanted, None, machine_for(pipe, wanted))
    return not here.ok and plan_request(pipe, wanted, None, _device_for(pipe, wanted)).ok


def _waits_on_host(pipe: Pipeline) -> bool:
    """Return whether a pipe is on the CPU of a machine that has an accelerator."""
    return device_of(pipe).type == "cpu" and Context.detect().device not in ("cpu", "rocm")


def _device_for(pipe: Pipeline, wanted: tuple[Transform, ...]) -> Context:
    """Return the device that a pipe is on or is to be moved to; for one on the host, the machine's accelerator."""
    moves = any(transform.moves_to is not None for transform in wanted)
    return machine_for(pipe, wanted) if moves or device_of(pipe).type not in ("cpu", "meta") else Context.detect()


def _request(
    pipe: Pipeline, transforms: tuple[Transform, ...], preset: Preset | str | None, context: Context | None
) -> tuple[Preset | None, tuple[Transform, ...]]:
    """Return the preset, if one was named, and all transforms in the order they run."""
    load_plugins()
    seen = seen_through(pipe)
    if preset == "auto":
        preset = recommend(context or _device_for(pipe, transforms), seen).preset
    named = find_preset(preset) if preset is not None else None
    return named, tuple(_as_loaded(pipe, compose(transforms, named, seen)))


def _as_loaded(pipe: Pipeline, wanted: tuple[Transform, ...]) -> Iterator[Transform]:
    """Yield the transforms of a request; of a loaded pipe, those that it was loaded with where they make the same.

    Their originals are in files, so that it makes no difference whether a request would keep them.
    """
    loaded = {
        entry.step.transform.occupies: entry.step.transform
        for entry in report_of(pipe).entries
        if entry.applied is not None and entry.applied.undo is None
    }
    for transform in wanted:
        there = loaded.get(transform.occupies)
        yield transform if there is None or forgetful(there) != forgetful(transform) else there


@contextlib.contextmanager
def _given(pipe: Pipeline, family: Family | None, *, lasting: bool) -> Iterator[None]:
    """Let `pipe` be of `family` within the block; with `lasting`, also after a block that succeeds.

    Raises:
        ErnieAccelError: The pipe has no transformer.
    """
    if family is None:
        yield
        return
    if getattr(pipe, "transformer", None) is None:
        denoisers = " and ".join(denoisers_of(pipe)) or "none"
        raise ErnieAccelError(
            f"family {family.name!r} was given, and this {type(pipe).__name__} has no transformer that could be of it "
            f"(its denoisers: {denoisers}): leave family= out"
        )
    before, stays = give_family(pipe.transformer, family), False
    try:
        yield
        stays = lasting
    finally:
        if not stays:
            give_family(pipe.transformer, before)
