"""Read a folder that `save` wrote: build empty models, rewrite them as before, and copy the saved bits into them.

A blank quantized layer is put where a receipt says so, and the transforms that follow quantization are applied again.
The folder may come from anywhere: everything in it is checked before it is used (`manifest`, `vetting`), and nothing
that it names is run, opened elsewhere or looked up on a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ernie_accel.core.apply import apply_request
from ernie_accel.core.carried import carry
from ernie_accel.core.components import CallablePipeline, weights_of
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError, SavedPipelineError, UnknownNameError
from ernie_accel.core.plan import compose, title_of
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
from ernie_accel.storage.assembly import assemble, reading
from ernie_accel.storage.folders import current
from ernie_accel.storage.layers import content_of, repeats_rewriting
from ernie_accel.storage.manifest import INDEX, MANIFEST, WEIGHTS, Manifest, SavedTransform, read_manifest
from ernie_accel.storage.vetting import Index, check_links, vet

_NOT_SAVED = "loaded as it was saved: the folder does not hold the originals"


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
    known = tuple(known)
    own = [cls for cls in known if issubclass(cls, Transform)]
    _check_declared(own)
    source = current(Path(folder))
    check_links(source)
    manifest = read_manifest(source)
    index = vet(source, [cls for cls in known if not issubclass(cls, Transform)])
    _check_they_agree(source, manifest, index)
    wanted, saved = _with_given(source, manifest.transforms, compose(transforms, None), own)
    machine = Context.detect(device=device)
    receipts = {name: model.receipts() for name, model in manifest.components.items()}
    _check_can_run(source, receipts.values(), machine)

    pipe = assemble(source, index, lambda name, cls: empty_model(source / name, cls))
    rewrites = tuple(forgetful(transform) for transform, data in saved if data.changed and repeats_rewriting(transform))
    if rewrites:  # they change the module tree, so the weights find their places only afterwards
        for name, model in manifest.components.items():
            _materialise(getattr(pipe, name), getattr(torch, model.dtype))
        apply_request(pipe, compose(rewrites, None), None, machine, skip_unsupported=False)
    for name, model in manifest.components.items():
        with reading(source, f"{name}/{WEIGHTS}"):
            _SavedWeights(source, name, model.aliases, receipts[name]).fill(getattr(pipe, name), device)
    pipe.to(device)
    quantized = [name for name, of in receipts.items() if of]
    if quantized:
        from ernie_accel.quantization.guard import refuse_casts
        from ernie_accel.quantization.refusals import refuse_loras, refuse_saving

        for refuse in (refuse_casts, refuse_saving, refuse_loras):
            refuse(pipe, quantized, Undo())
    details = tuple(receipt for of in receipts.values() for receipt in of.values())
    early = tuple(_entry(transform, data, details) for transform, data in saved if transform.phase <= Phase.QUANTIZE)
    carry(pipe, Report(title_of(wanted, None), type(pipe).__name__, machine, early))
    if len(early) < len(wanted):
        apply_request(pipe, wanted, None, machine, skip_unsupported=on_unsupported == "skip")
    return pipe


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
    folder: Path, saved: Iterable[SavedTransform], given: Iterable[Transform], own: Iterable[type[Transform]]
) -> tuple[tuple[Transform, ...], tuple[tuple[Transform, SavedTransform], ...]]:
    """Return all transforms of the pipe in order, and those that were saved with what was saved of them.

    Raises:
        SavedPipelineError: The folder chooses what is local to this machine, or describes no transform; or one that was
            given cannot take the place of what the saved weights are made of.
    """
    by_slot = {transform.occupies: transform for transform in given}
    pairs: list[tuple[Transform, SavedTransform]] = []
    for data in saved:
        transform = _transform(folder, data.transform, by_slot, own)
        if transform is not None:
            pairs.append((transform, data))
    made = {transform.occupies for transform, _ in pairs if transform.phase <= Phase.QUANTIZE}
    for transform in by_slot.values():
        if transform.phase <= Phase.QUANTIZE and transform.occupies not in made:
            raise SavedPipelineError(folder, f"was saved without {transform!r}; load it, then optimize it with that")
    kept = [transform for transform, _ in pairs if transform.occupies not in by_slot]
    return compose((*kept, *by_slot.values()), None), tuple(pairs)


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


@dataclass(frozen=True)
class _SavedWeights:
    """The saved bits of one model."""

    folder: Path
    name: str
    aliases: Mapping[str, str]
    receipts: Mapping[str, LayerReceipt]

    def fill(self, module: torch.nn.Module, device: str) -> None:
        """Put the saved bits into an empty model in place, quantized layers included.

        Raises:
            SavedPipelineError: File and model do not have the same tensors.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / self.name / WEIGHTS, framework="pt", device=device) as file:
                names = set(file.keys())
                inside: set[str] = set()
                for path, receipt in self.receipts.items():
                    self._check_layer(module, path, receipt)
                    prefix = f"{path}/"
                    mine = {name for name in names if name.startswith(prefix)}
                    inside |= mine
                    saved = {name.removeprefix(prefix): file.get_tensor(name) for name in mine}
                    _put_layer(module, path, self._layer(receipt, saved, device))
                # A clone: a file is mapped at any offset, and some kernels read 16 bytes at a time.
                plain = {name: file.get_tensor(name).clone() for name in names - inside}
        except SafetensorError as error:
            raise self._wrong(f"cannot be read: {error}") from error
        wrapped = {name: _like(module, name, tensor) for name, tensor in plain.items()}
        for new, old in self.aliases.items():
            if old not in wrapped:
                raise self._wrong(f"lacks {old}, which is {new} as well")
            wrapped[new] = wrapped[old]
        for name, tensor in wrapped.items():
            self._place_tensor(module, name, tensor)
        within = tuple(f"{path}." for path in self.receipts)
        expected = [weight.path for weight in weights_of(module) if not weight.path.startswith(within)]
        unfilled = [path for path in expected if path not in wrapped]
        if unfilled:
            raise self._wrong(f"lacks {', '.join(unfilled[:3])}")

    def _check_layer(self, module: torch.nn.Module, path: str, receipt: LayerReceipt) -> None:
        """Refuse a receipt of another layer before memory is allocated for it."""
        parent, child = _owner(module, path)
        there = None if parent is None else parent._modules.get(child)
        if there is None:
            raise self._wrong(f"has the layer {path}, which the model built from config.json has not")
        if type(there) is torch.nn.Linear and tuple(there.weight.shape) != receipt.shape:
            raise self._wrong(f"has {path} as {receipt.shape}, and the model as {tuple(there.weight.shape)}")

    def _layer(self, receipt: LayerReceipt, saved: dict[str, torch.Tensor], device: str) -> torch.nn.Module:
        """Make a blank quantized layer and copy the saved bits into it."""
        from ernie_accel.quantization.choose import BACKENDS
        from ernie_accel.quantization.layers import RECEIPT

        backend, (rows, columns) = BACKENDS[receipt.backend], receipt.shape
        dtype = getattr(torch, receipt.dtype)
        linear = torch.nn.Linear(columns, rows, bias=False, device="meta").eval()
        linear.weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device), requires_grad=False)
        if "bias" in saved:
            bias = torch.zeros(rows, dtype=saved["bias"].dtype, device=device)
            linear.bias = torch.nn.Parameter(bias, requires_grad=False)
        layer = backend.blank(receipt.scheme, linear)
        live = content_of(backend, layer)
        have, want = ({n: (tuple(t.shape), t.dtype) for n, t in x.items()} for x in (saved, live))
        if have != want:
            why = f"{receipt.name} is stored as {have}, and the {backend.name} installed here stores it as {want}"
            raise SavedPipelineError(self.folder, why)
        for name, tensor in live.items():
            tensor.copy_(saved[name])
        RECEIPT.put(layer, receipt)
        return layer

    def _place_tensor(self, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor where the model has one of this name and shape."""
        owner, child = _owner(module, name)
        places = {} if owner is None else {**owner._parameters, **owner._buffers}
        if owner is None or child not in places:
            raise self._wrong(f"has {name}, which the model has not")
        there = places[child]
        if there is not None:
            if there.shape != tensor.shape:
                raise self._wrong(f"has {name} as {tuple(tensor.shape)}, and the model as {tuple(there.shape)}")
            if there.is_floating_point() != tensor.is_floating_point():
                raise self._wrong(f"has {name} as {tensor.dtype}, and the model as {there.dtype}")
        if isinstance(tensor, torch.nn.Parameter):
            owner._parameters[child] = tensor
        else:
            owner._buffers[child] = tensor

    def _wrong(self, what: str) -> SavedPipelineError:
        return SavedPipelineError(self.folder, f"{self.name}/{WEIGHTS} {what}")


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


def _materialise(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Allocate memory for parameters that have none, in place; the values come later."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                part._parameters[name] = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype), requires_grad=False
                )


def _owner(module: torch.nn.Module, path: str) -> tuple[torch.nn.Module | None, str]:
    parent, _, child = path.rpartition(".")
    try:
        return module.get_submodule(parent), child
    except AttributeError:
        return None, child


def _put_layer(module: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    module.get_submodule(parent)._modules[child] = layer


def _like(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter where the model has a parameter of this name, else the tensor (a buffer)."""
    owner, child = _owner(module, name)
    is_parameter = owner is not None and child in owner._parameters
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _entry(transform: Transform, data: SavedTransform, receipts: tuple[LayerReceipt, ...]) -> Entry:
    """Return the entry of a transform whose effect is in the saved weights."""
    if not data.changed:
        return Entry(Step(transform, (), Preview((), note="was so when it was saved")), None)
    details = receipts if transform.phase == Phase.QUANTIZE else ()
    applied = Applied(data.changed, no_undo=_NOT_SAVED, skipped=data.skipped, details=details)
    return Entry(Step(transform, (), Preview(data.changed)), applied)
