"""Write an optimized pipe to a folder that `load` reads back bit for bit, as safetensors and JSON only.

A folder holds what ``save_pretrained`` would call configuration (``model_index.json``, a ``config.json`` a model, the
scheduler, the tokenizers), one ``model.safetensors`` a model, and ``ernie_accel.json``: the transforms, the receipt of
each quantized layer, and size and checksum of every file. It uses no library's own format of quantized weights, so it
avoids their known ways to reload as noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from ernie_accel.core.apply import report_of, suspended
from ernie_accel.core.compiled import seen_through
from ernie_accel.core.components import AnyPipeline, Pipeline, modules_of
from ernie_accel.core.context import installed_versions
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.core.plan import check_pipeline
from ernie_accel.core.report import Entry
from ernie_accel.core.transform import Phase, Transform, machine_local_fields
from ernie_accel.storage.folders import current, replace_folder
from ernie_accel.storage.layers import content_of, quantized_layers, receipt_of, repeats_rewriting
from ernie_accel.storage.manifest import (
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    WEIGHTS,
    Manifest,
    files_of,
    saved_receipt,
)
from ernie_accel.storage.tensor_file import write_tensors

#: Libraries whose models can be saved; naming others in a folder would be naming code.
_LIBRARIES = ("diffusers", "transformers")


def save(pipe: AnyPipeline, folder: str | os.PathLike[str]) -> Path:
    """Write a pipe, quantized or not, to a folder that `load` reads back bit for bit.

    Whatever interrupts, the folder is wholly the old one or wholly the new one. What was applied after quantization (a
    scheduler, compilation) is undone while the weights are written, applied again then, and applied on loading. What
    belongs to this machine is not saved: folders such as ``Compile(cache=...)``, and ``MoveTo``; give them to `load`.

    Args:
        pipe: A diffusers pipeline.
        folder: Where to; one that `save` wrote before is replaced.

    Returns:
        The folder.

    Raises:
        SavedPipelineError: The folder holds something else, or has no name ("."), or the pipe holds something that
            cannot be saved.
        RestoreError: Something applied after quantization cannot be undone.
        OSError: The folder cannot be written.
    """
    checked = check_pipeline(pipe)
    target = Path(folder)
    there = current(target)
    if there.exists() and not (there / MANIFEST).is_file() and (not there.is_dir() or any(there.iterdir())):
        raise SavedPipelineError(target, "is there already and was not written by ernie_accel.save; choose another")
    if target.name in ("", ".."):  # whoever works in it would be left in a folder that is gone
        raise SavedPipelineError(target, "has no name of its own, and save puts a new folder in its place; give a name")
    _check_can_be_saved(seen_through(checked), target)
    done = [entry for entry in report_of(checked).entries if entry.status != "skipped"]
    entries = [entry for entry in done if _travels(entry.step.transform)]

    def write(place: Path) -> None:
        with suspended(checked, after=Phase.QUANTIZE):
            seen = seen_through(checked)
            _check_no_lora(seen, target)
            _write(seen, place, target, entries)

    replace_folder(target, write)
    return target


def _travels(transform: Transform) -> bool:
    """Return whether a transform makes sense on another machine: everything local to this one can be left out."""
    return all(getattr(type(transform), name, ...) is not ... for name in machine_local_fields(type(transform)))


def _check_can_be_saved(pipe: Pipeline, folder: Path) -> None:
    """Refuse, before anything is written, what `load` could not rebuild."""
    from ernie_accel.quantization.layers import holder_of
    from ernie_accel.transforms.weights.quantize import Quantize

    for entry in report_of(pipe).entries:
        transform = entry.step.transform
        known = isinstance(transform, Quantize) or repeats_rewriting(transform)
        if entry.applied is not None and transform.phase == Phase.QUANTIZE and not known:
            fix = "restore(pipe), then optimize it with Quantize(...) and save that"
            raise SavedPipelineError(folder, f"cannot save what {transform!r} made, whose weights only it knows: {fix}")
    for name, module in modules_of(pipe).items():
        library = type(module).__module__.split(".")[0]
        if library not in _LIBRARIES:
            raise SavedPipelineError(folder, f"cannot save {name}, a {type(module).__name__} of {library}")
        quantized = dict(quantized_layers(module))
        for path, layer in module.named_modules():
            holder = holder_of(layer)
            if holder is not None and path not in quantized:
                why = f"quantized by {holder.name} without ernie_accel: save it with save_pretrained"
                raise SavedPipelineError(folder, f"cannot save {name}.{path}, {why}")
        for path, tensor in module.named_parameters():
            if tensor.device.type == "meta":
                raise SavedPipelineError(folder, f"cannot save {name}.{path}: it is offloaded (meta device)")


def _check_no_lora(pipe: Pipeline, folder: Path) -> None:
    """Refuse LoRA layers, once those are gone that `optimize` loaded after quantizing (`FewSteps`)."""
    for name, module in modules_of(pipe).items():
        for path, layer in module.named_modules():
            if type(layer).__module__.split(".")[0] == "peft":
                fix = "pipe.fuse_lora() and pipe.unload_lora_weights() first"
                raise SavedPipelineError(folder, f"cannot save {name}.{path}, a LoRA layer: {fix}")


def _write(pipe: Pipeline, folder: Path, target: Path, entries: list[Entry]) -> None:
    from ernie_accel.exports import VERSION

    components: dict[str, object] = {}
    for name, part in pipe.components.items():
        place = folder / name
        if isinstance(part, torch.nn.Module):
            place.mkdir()
            _save_config(part, place)
            tensors, aliases = _tensors_of(part)
            _write_tensors(tensors, place / WEIGHTS, target)
            quantized = quantized_layers(part)
            components[name] = {
                "library": type(part).__module__.split(".")[0],
                "class": type(part).__name__,
                "dtype": str(next((p.dtype for p in part.parameters()), torch.float32)).removeprefix("torch."),
                "aliases": aliases,
                "layers": tuple(saved_receipt(receipt_of(layer)) for _, layer in quantized),
                "paths": tuple(path for path, _ in quantized),
            }
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(place)
    pipe.save_config(folder)
    try:
        manifest = Manifest.model_validate(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "ernie_accel": VERSION,
                "versions": dict(installed_versions()),
                "pipeline": json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"],
                "transforms": tuple(map(_saved_entry, entries)),
                "components": components,
                "files": files_of(folder),
            }
        )
    except ValidationError as error:
        raise SavedPipelineError(target, f"cannot save what the format has no place for: {error}") from error
    manifest.write(folder)


def _saved_entry(entry: Entry) -> dict[str, object]:
    transform = entry.step.transform
    local = machine_local_fields(type(transform))
    fields = {name: value for name, value in transform.to_json().items() if name not in local}
    return {
        "transform": json.loads(json.dumps(fields)),  # tuples as the lists that will be read
        "changed": entry.applied.changed if entry.applied else (),
        "skipped": dict(entry.applied.skipped) if entry.applied else {},
        "bytes_before": entry.applied.bytes_before if entry.applied else 0,
        "bytes_after": entry.applied.bytes_after if entry.applied else 0,
    }


def _save_config(module: torch.nn.Module, place: Path) -> None:
    if hasattr(module, "save_config"):
        module.save_config(place)  # type: ignore[operator]
        return
    module.config.save_pretrained(place)  # type: ignore[operator, union-attr]
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(place)


def _tensors_of(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return what to write, and for tensors with several names, the name each is written under.

    Content of a quantized layer is named "path/tensor": no module path has a slash. Buffers that ``save_pretrained``
    would leave out are written too; a cast may have changed them.
    """
    from ernie_accel.quantization.choose import BACKENDS

    tensors: dict[str, torch.Tensor] = {}
    inside = []
    for path, layer in quantized_layers(module):
        inside.append(f"{path}.")
        for name, tensor in content_of(BACKENDS[receipt_of(layer).backend], layer).items():
            tensors[f"{path}/{name}"] = tensor.detach()
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name.startswith(tuple(inside)):
            continue
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors, aliases


def _write_tensors(tensors: Mapping[str, torch.Tensor], file: Path, target: Path) -> None:
    try:
        write_tensors(file, tensors)
    except ValueError as error:
        raise SavedPipelineError(target, f"cannot save {file.parent.name}: {error}") from error
