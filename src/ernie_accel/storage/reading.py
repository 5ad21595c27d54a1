"""Read a folder that `save` wrote: build empty models, rewrite them as before, and copy the saved bits into them.

A blank quantized layer is put where a receipt says so, and the transforms that follow quantization are applied again.
The folder may come from anywhere: everything in it is checked before it is used (`manifest`, `vetting`), and nothing
that it names is run, opened elsewhere or looked up on a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ernie_accel.common.collecting import without_collecting
from ernie_accel.common.language import said
from ernie_accel.common.packages import packages_looked_up_once
from ernie_accel.core.apply import apply_request, report_of
from ernie_accel.core.carried import carry
from ernie_accel.core.components import CallablePipeline, modules_of
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError, SavedPipelineError, UnknownNameError
from ernie_accel.core.plan import compose, title_of
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.preset import Preset
from ernie_accel.core.report import Entry, Report
from ernie_accel.core.step import Step
from ernie_accel.core.transform import (
    Applied,
    LayerReceipt,
    Phase,
    Preview,
    Transform,
    machine_local_fields,
    undeclared_paths,
)
from ernie_accel.core.undo import Undo
from ernie_accel.models.adapters import check_adapters
from ernie_accel.models.lora_loading import read_loras
from ernie_accel.storage.assembly import assemble, reading
from ernie_accel.storage.folders import current
from ernie_accel.storage.layers import repeats_rewriting
from ernie_accel.storage.manifest import INDEX, MANIFEST, WEIGHTS, Manifest, SavedTransform, Verification, open_manifest
from ernie_accel.storage.read_ahead import ReadAhead
from ernie_accel.storage.vetting import Index, check_links, vet
from ernie_accel.storage.weights import SavedWeights

_NOT_SAVED = said("loaded as it was saved: the folder does not hold the originals")


def load(
    folder: str | os.PathLike[str],
    *transforms: Transform,
    device: str = "cpu",
    on_unsupported: Literal["error", "skip"] = "error",
    known: Iterable[type] = (),
) -> CallablePipeline:
    """Read a pipe that `save` wrote: the same bits, the same transforms.

    The folder is only data, whoever made it: none of its code is run, and it cannot name a place on this machine. It
    can still cost much memory and time, as a large picture can.

    Args:
        folder: The folder.
        *transforms: Transforms that replace the saved ones in their slots, or are added after quantization. Give what
            belongs to this machine here, as in ``load(folder, Compile(cache=...))``.
        device: Where to; layers are read straight onto it.
        on_unsupported: What to do with a transform after quantization that cannot run here; as in ``optimize``.
        known: Classes the folder may name that it could not otherwise: transforms of your own, and models of
            transformers that are not among those that pipelines are known to use.

    Returns:
        The pipe. Its report says what it was made with; ``restore`` cannot undo what was saved.

    Raises:
        SavedPipelineError: The folder is foreign, damaged, of a newer version, or needs what is not here.
        UnsupportedError: A transform cannot run here.
        ConflictError: Two of `transforms` want one slot.
    """
    if on_unsupported not in ("error", "skip"):
        raise UnknownNameError("value of on_unsupported", on_unsupported, ("error", "skip"))
    machine = Context.detect(device=device)
    pipe, wanted = read(folder, transforms, machine, device, known=known)
    if len(report_of(pipe).entries) < len(wanted):
        apply_request(pipe, wanted, None, machine, skip_unsupported=on_unsupported == "skip")
    return pipe


@without_collecting()
@packages_looked_up_once()
def read(
    folder: str | os.PathLike[str],
    transforms: Iterable[Transform],
    machine: Context,
    device: str | None,
    *,
    preset: Preset | None = None,
    known: Iterable[type] = (),
    elsewhere: bool = False,
) -> tuple[CallablePipeline, tuple[Transform, ...]]:
    """Read a pipe that `save` wrote, and apply nothing that follows quantization.

    While files are verified and weights begin to arrive, the library reads what is small and builds models without
    weights; a file's weights are used once it is verified. Nothing is quantized, fused or cast anew.

    Args:
        folder: The folder.
        transforms: See `load`.
        machine: Where the pipe will run.
        device: Where to; None leaves the weights in their files, mapped into memory, for what brings them to a device.
        preset: What is asked for beside `transforms`.
        known: See `load`.
        elsewhere: Whether the weights are about to be placed anew: leave out what the folder says about that.

    Returns:
        The pipe, and all its transforms in the order they run: those of its report first, then those to be applied.

    Raises:
        SavedPipelineError: See `load`.
    """
    known = tuple(known)
    own = [cls for cls in known if issubclass(cls, Transform)]
    _check_declared(own)
    source = current(Path(folder))
    check_links(source)
    manifest = open_manifest(source)
    largest_first = sorted(manifest.components, key=lambda name: -manifest.files[f"{name}/{WEIGHTS}"].bytes)
    large = (source / name / WEIGHTS for name in largest_first)
    with Verification(source, manifest.files) as files, ReadAhead(large, device) as ahead:
        files.verify(*(name for name in manifest.files if not name.endswith(WEIGHTS)))
        index = vet(source, [cls for cls in known if not issubclass(cls, Transform)])
        _check_they_agree(source, manifest, index)
        pipe = assemble(source, index, lambda name, cls: empty_model(source / name, cls))
        given = _beside_preset(transforms, preset, pipe)
        wanted, saved = _with_given(source, manifest.transforms, given, own, elsewhere)
        receipts = {name: model.receipts() for name, model in manifest.components.items()}
        _check_can_run(source, receipts.values(), machine)
        early = _rewritten(pipe, manifest, saved, machine)
        files.use_all_cores()
        for name in largest_first:
            files.verify(f"{name}/{WEIGHTS}")
            with reading(source, f"{name}/{WEIGHTS}"):
                weights = SavedWeights(source, name, manifest.components[name].aliases, receipts[name])
                weights.fill(getattr(pipe, name), device, machine.torch_device, ahead)
    if device is not None:
        pipe.to(device)
    quantized = [name for name, of in receipts.items() if of]
    if quantized:
        from ernie_accel.quantization.guard import refuse_casts
        from ernie_accel.quantization.refusals import refuse_loras, refuse_saving

        for refuse in (refuse_casts, refuse_saving, refuse_loras):
            refuse(pipe, quantized, Undo())
        for module in modules_of(pipe, quantized).values():
            check_adapters(module, Undo())
    details = tuple(receipt for of in receipts.values() for receipt in of.values())
    entries = tuple(_entries(pipe, saved, early, details, machine))
    carry(pipe, Report(title_of(wanted, None), type(pipe).__name__, machine, entries))
    read_loras(pipe)
    return pipe, wanted


def _rewritten(
    pipe: CallablePipeline,
    manifest: Manifest,
    saved: Iterable[tuple[Transform, SavedTransform]],
    machine: Context,
) -> dict[Transform, PlannedPipe | None]:
    """Repeat what changes the module tree, on models without weights, and return what each step left behind.

    The weights find their places only afterwards. On the meta device nothing is computed and no memory is taken.
    """
    rewrites = {transform for transform, data in saved if data.changed and repeats_rewriting(transform)}
    if not rewrites:
        return {}
    for name, model in manifest.components.items():
        _cast_without_weights(getattr(pipe, name), getattr(torch, model.dtype))
    again = {forgetful(transform): transform for transform in rewrites}
    apply_request(pipe, compose(tuple(again), None), None, machine, skip_unsupported=False)
    return {again[entry.step.transform]: entry.step.planned for entry in report_of(pipe).entries}


def _beside_preset(
    given: Iterable[Transform], preset: Preset | None, pipe: CallablePipeline
) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
    """Return the transforms that were given, and those of a preset in the other slots."""
    given = tuple(given)
    if preset is None:
        return given, ()
    taken = {transform.occupies for transform in given}
    return given, tuple(each for each in preset.transforms_on(pipe) if each.occupies not in taken)


def _check_declared(own: Iterable[type[Transform]]) -> None:
    """Refuse a transform class that a folder could make with a path of the folder's choosing.

    Raises:
        ErnieAccelError: A field looks like a path and is not declared as local to the machine.
    """
    for cls in own:
        names = undeclared_paths(cls)
        if names:
            fix = f"declare it: {names[0]}: ... = field(default=None, metadata=ernie_accel.MACHINE_LOCAL)"
            raise ErnieAccelError(
                f"{cls.__name__}.{names[0]} looks like a path, which no folder may choose; {fix}. It is given to load "
                f"instead, as in load(folder, {cls.__name__}({names[0]}=...))"
            )


def _check_they_agree(folder: Path, manifest: Manifest, index: Index) -> None:
    """Refuse a folder whose two lists of components differ."""
    if manifest.pipeline != index.pipeline_class.__name__:
        raise SavedPipelineError(folder, f"{MANIFEST} names a {manifest.pipeline}, {INDEX} another pipeline")
    models = {
        name: cls.__name__ for name, cls in index.parts.items() if cls is not None and issubclass(cls, torch.nn.Module)
    }
    saved = {name: model.class_name for name, model in manifest.components.items()}
    if models != saved:
        raise SavedPipelineError(folder, f"{MANIFEST} lists the models {saved}, {INDEX} lists {models}")


def _with_given(
    folder: Path,
    saved: Iterable[SavedTransform],
    given: tuple[tuple[Transform, ...], tuple[Transform, ...]],
    own: Iterable[type[Transform]],
    elsewhere: bool,
) -> tuple[tuple[Transform, ...], tuple[tuple[Transform, SavedTransform], ...]]:
    """Return all transforms of the pipe in order, and those that were saved with what was saved of them.

    Args:
        folder: The folder.
        saved: What it says.
        given: What the caller asks for, and what the caller's preset does.
        own: Classes of transforms that it may name beside the library's.
        elsewhere: See `read`.

    Raises:
        SavedPipelineError: The folder chooses what is local to this machine, or describes no transform; or one that was
            given cannot take the place of what the saved weights are made of.
    """
    mine, of_preset = given
    by_slot = {transform.occupies: transform for transform in mine}
    late = {each.occupies: each for each in of_preset if each.phase > Phase.QUANTIZE}
    pairs: list[tuple[Transform, SavedTransform]] = []
    for data in saved:
        transform = _transform(folder, data.transform, {**late, **by_slot}, own)
        if transform is None or (elsewhere and transform.occupies not in by_slot and _is_of_its_place(transform)):
            continue
        pairs.append((_anywhere(transform) if elsewhere else transform, data))
    made = {transform.occupies: transform for transform, _ in pairs if transform.phase <= Phase.QUANTIZE}
    for transform in by_slot.values():
        if transform.phase <= Phase.QUANTIZE and transform.occupies not in made:
            raise SavedPipelineError(folder, f"was saved without {transform!r}; load it, then optimize it with that")
    for transform in of_preset:
        there = made.get(transform.occupies)
        if transform.phase <= Phase.QUANTIZE and (there is None or forgetful(there) != forgetful(transform)):
            with_or_without = "without it" if there is None else f"with {there!r}"
            fix = "name a preset that asks for what is saved, or none, or load the original model with this one"
            raise SavedPipelineError(
                folder, f"the preset asks for {transform!r}, and it was saved {with_or_without}: {fix}"
            )
    kept = [transform for transform, _ in pairs if transform.occupies not in {**late, **by_slot}]
    return compose((*kept, *mine, *late.values()), None), tuple(pairs)


def _is_of_its_place(transform: Transform) -> bool:
    """Return whether a transform says where weights live, or was predicted for that."""
    return transform.slot in ("offload", "device", "free-after-use", "out-of-memory")


def _anywhere(transform: Transform) -> Transform:
    """Return what quantized a pipe on its way to a device, without that device: the weights are quantized now."""
    if transform.phase > Phase.QUANTIZE or getattr(transform, "device", None) is None:
        return transform
    return replace(transform, device=None)  # type: ignore[call-arg]


def _transform(
    folder: Path, data: Mapping[str, Any], given: Mapping[str, Transform], own: Iterable[type[Transform]]
) -> Transform | None:
    """Return the transform that was saved, or the one given in its place; None for what was local to a machine."""
    from ernie_accel.transforms import transform_class, transform_from_json

    with reading(folder, f"{MANIFEST}: transforms: {dict(data)}"):
        name = data["transform"]
        cls = next((each for each in own if each.__name__ == name), None) or transform_class(name)
    local = machine_local_fields(cls)
    if any(field.default is MISSING for field in local.values()):
        return None  # MoveTo of version 0.1: `load` takes the device
    with reading(folder, f"{MANIFEST}: transforms: {name}"):
        transform = transform_from_json({key: value for key, value in data.items() if key not in local}, own)
    instead = given.get(transform.occupies)
    if instead is None:
        for key, field in local.items():
            if data.get(key, field.default) != field.default:
                fix = f"nobody but you may choose it: load(folder, {cls.__name__}({key}=...))"
                raise SavedPipelineError(folder, f"{MANIFEST}: transforms: {name} has {key}={data[key]!r}; {fix}")
        return transform
    if transform.phase <= Phase.QUANTIZE:
        plain = replace(instead, **{key: field.default for key, field in local.items()}) if local else instead
        if plain != transform:
            why = f"{instead!r} cannot take its place, because the saved weights are made of it"
            raise SavedPipelineError(folder, f"was saved with {transform!r}; {why}")
    return instead


def empty_model(place: Path, cls: type[Any]) -> torch.nn.Module:
    """Build a model from its configuration, parameters without memory, buffers as the class makes them."""
    from accelerate import init_empty_weights

    module: torch.nn.Module
    with init_empty_weights(include_buffers=False):
        if hasattr(cls, "from_config"):
            module = cls.from_config(cls.load_config(place, local_files_only=True))
        else:
            module = cls._from_config(cls.config_class.from_pretrained(place, local_files_only=True))
    if (place / "generation_config.json").is_file():
        from transformers import GenerationConfig

        module.generation_config = GenerationConfig.from_pretrained(place, local_files_only=True)
    return module.eval().requires_grad_(False)


def _check_can_run(folder: Path, receipts: Iterable[Mapping[str, LayerReceipt]], machine: Context) -> None:
    """Refuse layers that no kernel here multiplies, before anything large is read."""
    from ernie_accel.quantization.choose import BACKENDS

    pairs = {(receipt.backend, receipt.scheme) for of in receipts for receipt in of.values()}
    for name, scheme in sorted(pairs):
        reasons = BACKENDS[name].unsupported(scheme, machine) if name in BACKENDS else [f"no backend is called {name}"]
        if reasons:
            raise SavedPipelineError(folder, f"cannot run on {machine}: {'; '.join(reasons)}")


def forgetful(transform: Transform) -> Transform:
    """Return a transform that keeps no originals, where it has the choice: they are in files, or no weights yet."""
    return replace(transform, keep_originals=False) if hasattr(transform, "keep_originals") else transform  # type: ignore[call-arg]


def _cast_without_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give parameters that have no memory the dtype of the weights that will come, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def _entries(
    pipe: CallablePipeline,
    saved: Iterable[tuple[Transform, SavedTransform]],
    rewritten: Mapping[Transform, PlannedPipe | None],
    receipts: tuple[LayerReceipt, ...],
    machine: Context,
) -> Iterator[Entry]:
    """Yield the entries of the transforms whose effect is in the saved weights.

    Each carries what the pipe was planned to be from there on, as if it had been applied here: those that follow ask.
    """
    state = PlannedPipe.seen(pipe, None)
    for transform, data in saved:
        if transform.phase > Phase.QUANTIZE:
            continue
        if not data.changed:
            yield Entry(Step(transform, (), Preview((), note="was so when it was saved")), None)
            continue
        left = rewritten.get(transform) or transform.planned(pipe, replace(machine, state=state))
        state = PlannedPipe.seen(pipe, left)
        details = receipts if transform.phase == Phase.QUANTIZE else ()
        applied = Applied(
            data.changed,
            no_undo=_NOT_SAVED,
            skipped=data.skipped,
            details=details,
            bytes_before=data.bytes_before,
            bytes_after=data.bytes_after,
        )
        yield Entry(Step(transform, (), Preview(data.changed), planned=state), applied)
