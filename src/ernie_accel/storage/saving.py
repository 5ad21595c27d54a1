"""Write an optimized pipe to a folder and read it back bit for bit, as safetensors and JSON only.

A folder holds what ``save_pretrained`` would call configuration (``model_index.json``, a ``config.json`` a model, the
scheduler, the tokenizers), one ``model.safetensors`` a model, and ``ernie_accel.json``: the transforms, the receipt of
each quantized layer, and the size of every file. Loading builds the models empty, rewrites their blocks as they were
when saved, puts a blank quantized layer where a receipt says so, copies the saved bits into them, and applies the
transforms that follow quantization again. No library's own file format is involved, so none of their ways to reload as
noise is either.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ernie_accel.core.apply import apply_request, report_of, suspended
from ernie_accel.core.carried import carry
from ernie_accel.core.components import Pipeline, modules_of, weights_of
from ernie_accel.core.context import Context, installed_versions
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.core.plan import check_pipeline, compose, title_of
from ernie_accel.core.report import Entry, Report
from ernie_accel.core.step import Step
from ernie_accel.core.transform import Applied, LayerReceipt, Phase, Preview, Transform
from ernie_accel.core.undo import Undo

if TYPE_CHECKING:
    from ernie_accel.quantization.backend import Backend

MANIFEST = "ernie_accel.json"
WEIGHTS = "model.safetensors"
FORMAT = "ernie_accel pipeline"
FORMAT_VERSION = 1
#: Libraries whose classes a folder may name; anything else would be code from a file.
_LIBRARIES = ("diffusers", "transformers")
_NOT_SAVED = "loaded as it was saved: the folder does not hold the originals"


def save(pipe: Pipeline, folder: str | os.PathLike[str]) -> Path:
    """Write a pipe, quantized or not, to a folder that `load` reads back bit for bit.

    The folder appears complete or not at all: it is written beside its place and renamed. What was applied after
    quantization (a scheduler, compilation) is undone while the weights are written, and done again on loading.

    Args:
        pipe: A diffusers pipeline.
        folder: Where to; one that `save` wrote before is replaced.

    Returns:
        The folder.

    Raises:
        SavedPipelineError: The folder holds something else, or the pipe something that cannot be saved.
        RestoreError: Something applied after quantization cannot be undone.
    """
    check_pipeline(pipe)
    target = Path(folder)
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise SavedPipelineError(target, "is there already and was not written by ernie_accel.save; choose another")
    _check_can_be_saved(pipe, target)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        transforms = [entry for entry in report_of(pipe).entries if entry.status != "skipped"]
        with suspended(pipe, after=Phase.QUANTIZE):
            _write(pipe, unfinished, transforms)
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            unfinished.rename(target)
            shutil.rmtree(old)
        else:
            unfinished.rename(target)
    finally:
        if unfinished.exists():
            shutil.rmtree(unfinished)
    return target


def load(
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    on_unsupported: Literal["error", "skip"] = "error",
    known: Iterable[type[Transform]] = (),
) -> Pipeline:
    """Read a pipe that `save` wrote: the same bits, the same transforms.

    Args:
        folder: The folder.
        device: Where to; layers are read straight onto it.
        on_unsupported: What to do with a transform after quantization that cannot run here; as in ``optimize``.
        known: Transform classes of your own that the folder may name.

    Returns:
        The pipe. Its report tells what it was made with; ``restore`` cannot undo what was saved.

    Raises:
        SavedPipelineError: The folder is foreign, damaged, of a newer version, or needs what is not here.
        UnsupportedError: A transform cannot run here.
    """
    from ernie_accel.transforms import transform_from_json

    source = Path(folder)
    manifest = _read_manifest(source)
    transforms = tuple(transform_from_json(data["transform"], known) for data in manifest["transforms"])
    machine = Context.detect(device=device)
    components = {name: _Component.from_json(source, name, data) for name, data in manifest["components"].items()}
    _check_can_run(source, components.values(), machine)

    pipe = _build(source, components)
    saved = tuple(zip(transforms, manifest["transforms"], strict=True))
    rewrites = tuple(_forgetful(transform) for transform, data in saved if data["changed"] and _rewrites(transform))
    if rewrites:  # they change the module tree, so the weights find their places only afterwards
        for component in components.values():
            _materialise(getattr(pipe, component.name), component.dtype)
        apply_request(pipe, compose(rewrites, None), None, machine, skip_unsupported=False)
    for component in components.values():
        component.fill(getattr(pipe, component.name), device)
    pipe.to(device)
    quantized = [name for name, component in components.items() if component.receipts]
    if quantized:
        from ernie_accel.quantization.guard import refuse_casts

        refuse_casts(pipe, quantized, Undo())
    receipts = tuple(receipt for component in components.values() for receipt in component.receipts.values())
    entries = tuple(_entry(transform, data, receipts) for transform, data in saved)
    early = tuple(entry for entry in entries if entry.step.transform.phase <= Phase.QUANTIZE)
    carry(pipe, Report(title_of(transforms, None), type(pipe).__name__, machine, early))
    if len(early) < len(entries):
        apply_request(pipe, compose(transforms, None), None, machine, skip_unsupported=on_unsupported == "skip")
    return pipe


def _check_can_be_saved(pipe: Pipeline, folder: Path) -> None:
    """Refuse, before anything is written, what `load` could not rebuild."""
    from ernie_accel.quantization.layers import holder_of
    from ernie_accel.transforms.weights.quantize import Quantize

    for entry in report_of(pipe).entries:
        transform = entry.step.transform
        known = isinstance(transform, Quantize) or _rewrites(transform)
        if entry.applied is not None and transform.phase == Phase.QUANTIZE and not known:
            fix = "restore(pipe), then optimize it with Quantize(...) and save that"
            raise SavedPipelineError(folder, f"cannot save what {transform!r} made, whose weights only it knows: {fix}")
    for name, module in modules_of(pipe).items():
        library = type(module).__module__.split(".")[0]
        if library not in _LIBRARIES:
            raise SavedPipelineError(folder, f"cannot save {name}, a {type(module).__name__} of {library}")
        for path, layer in module.named_modules():
            if type(layer).__module__.split(".")[0] == "peft":
                fix = "pipe.fuse_lora() and pipe.unload_lora_weights() first"
                raise SavedPipelineError(folder, f"cannot save {name}.{path}, a LoRA layer: {fix}")
            holder = holder_of(layer)
            if holder is not None and _receipt(layer) is None:
                why = f"quantized by {holder.name} without ernie_accel: save it with save_pretrained"
                raise SavedPipelineError(folder, f"cannot save {name}.{path}, {why}")
        for path, tensor in module.named_parameters():
            if tensor.device.type == "meta":
                raise SavedPipelineError(folder, f"cannot save {name}.{path}: it is offloaded (meta device)")


def _write(pipe: Pipeline, folder: Path, transforms: list[Entry]) -> None:
    from safetensors.torch import save_file

    from ernie_accel.exports import VERSION

    components: dict[str, Any] = {}
    for name, part in pipe.components.items():
        place = folder / name
        if isinstance(part, torch.nn.Module):
            place.mkdir()
            _save_config(part, place)
            tensors, aliases = _tensors_of(part)
            save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
            quantized = _quantized(part)
            components[name] = {
                "library": type(part).__module__.split(".")[0],
                "class": type(part).__name__,
                "dtype": str(next((p.dtype for p in part.parameters()), torch.float32)).removeprefix("torch."),
                "aliases": aliases,
                "layers": [_receipt_of(layer).to_json() for _, layer in quantized],
                "paths": [path for path, _ in quantized],
            }
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(place)
    pipe.save_config(folder)
    files = {str(p.relative_to(folder).as_posix()): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "ernie_accel": VERSION,
        "versions": dict(installed_versions()),
        "pipeline": type(pipe).__name__,
        "transforms": [
            {
                "transform": entry.step.transform.to_json(),
                "changed": entry.applied.changed if entry.applied else (),
                "skipped": dict(entry.applied.skipped) if entry.applied else {},
            }
            for entry in transforms
        ],
        "components": components,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def _save_config(module: torch.nn.Module, place: Path) -> None:
    if hasattr(module, "save_config"):
        module.save_config(place)  # type: ignore[operator]
        return
    module.config.save_pretrained(place)  # type: ignore[operator, union-attr]
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(place)


def _quantized(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(path, layer) for path, layer in module.named_modules() if _receipt(layer) is not None]


def _receipt(layer: torch.nn.Module) -> LayerReceipt | None:
    from ernie_accel.quantization.layers import RECEIPT

    return vars(layer).get(RECEIPT)


def _receipt_of(layer: torch.nn.Module) -> LayerReceipt:
    receipt = _receipt(layer)
    if receipt is None:
        raise TypeError(f"{type(layer).__name__} carries no receipt")
    return receipt


def _content(backend: Backend, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all that a quantized layer consists of, live: the backend's tensors and the bias."""
    bias = getattr(layer, "bias", None)
    return backend.tensors(layer) | ({} if bias is None else {"bias": bias.data})


def _tensors_of(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return what to write, and for tensors that go by several names, the name each is written under.

    Content of a quantized layer is named "path/tensor": no module path has a slash. Buffers that ``save_pretrained``
    would leave out are written too; a cast may have changed them.
    """
    from ernie_accel.quantization.choose import BACKENDS

    tensors: dict[str, torch.Tensor] = {}
    inside = []
    for path, layer in _quantized(module):
        inside.append(f"{path}.")
        for name, tensor in _content(BACKENDS[_receipt_of(layer).backend], layer).items():
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
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, aliases


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder that is complete and ours.

    Raises:
        SavedPipelineError: It is not.
    """
    if not folder.is_dir():
        raise SavedPipelineError(folder, "there is no such folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = ""
        if (folder / "model_index.json").is_file():
            hint = "; it is a plain pipeline: load it with DiffusionPipeline.from_pretrained"
        raise SavedPipelineError(folder, f"was not written by ernie_accel.save: there is no {MANIFEST}{hint}") from None
    except ValueError as error:
        raise SavedPipelineError(folder, f"{MANIFEST} is no JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SavedPipelineError(folder, f"{MANIFEST} is not of the format {FORMAT!r}")
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise SavedPipelineError(folder, f"is of format version {found}; this library reads {FORMAT_VERSION}")
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise SavedPipelineError(folder, f"is incomplete: {name} is missing")
        if file.stat().st_size != size:
            raise SavedPipelineError(folder, f"is damaged: {name} has {file.stat().st_size} bytes, expected {size}")
    return manifest


@dataclass(frozen=True)
class _Component:
    """One model of a saved pipe: its class, and what its file holds."""

    folder: Path
    name: str
    library: str
    class_name: str
    dtype: torch.dtype
    aliases: dict[str, str]
    receipts: dict[str, LayerReceipt]

    @classmethod
    def from_json(cls, folder: Path, name: str, data: dict[str, Any]) -> _Component:
        receipts = [
            LayerReceipt(**receipt | {"shape": tuple(receipt["shape"]), "sqnr_db": _number(receipt["sqnr_db"])})
            for receipt in data["layers"]
        ]
        return cls(
            folder=folder,
            name=name,
            library=data["library"],
            class_name=data["class"],
            dtype=getattr(torch, data["dtype"]),
            aliases=data["aliases"],
            receipts=dict(zip(data["paths"], receipts, strict=True)),
        )

    def empty(self) -> torch.nn.Module:
        """Build the model from its configuration, parameters without memory, buffers as the class makes them."""
        from accelerate import init_empty_weights

        found = getattr(importlib.import_module(self.library), self.class_name, None) if self._is_known else None
        if found is None:
            raise SavedPipelineError(self.folder, f"names a class that is not here: {self.library}.{self.class_name}")
        place = self.folder / self.name
        module: torch.nn.Module
        with init_empty_weights(include_buffers=False):
            if hasattr(found, "from_config"):
                module = found.from_config(found.load_config(place))
            else:
                module = found._from_config(found.config_class.from_pretrained(place))
        if (place / "generation_config.json").is_file():
            from transformers import GenerationConfig

            module.generation_config = GenerationConfig.from_pretrained(place)
        return module.eval().requires_grad_(False)

    @property
    def _is_known(self) -> bool:
        return self.library in _LIBRARIES

    def fill(self, module: torch.nn.Module, device: str) -> None:
        """Put the saved bits into an empty model in place, quantized layers included.

        Raises:
            SavedPipelineError: File and model do not have the same tensors.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / self.name / WEIGHTS, framework="pt", device=device) as file:
                names = set(file.keys())
                for path, receipt in self.receipts.items():
                    prefix = f"{path}/"
                    mine = {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}
                    _place_layer(module, path, self._layer(receipt, mine, device))
                # A clone: a file is mapped at any offset, and some kernels read 16 bytes at a time.
                plain = {name: file.get_tensor(name).clone() for name in names if "/" not in name}
        except SafetensorError as error:
            raise SavedPipelineError(self.folder, f"{self.name}/{WEIGHTS} cannot be read: {error}") from error
        wrapped = {name: _like(module, name, tensor) for name, tensor in plain.items()}
        for name, tensor in (wrapped | {new: wrapped[old] for new, old in self.aliases.items()}).items():
            if not _place_tensor(module, name, tensor):
                raise SavedPipelineError(self.folder, f"{self.name}/{WEIGHTS} has {name}, which the model has not")
        inside = tuple(f"{path}." for path in self.receipts)
        expected = [weight.path for weight in weights_of(module) if not weight.path.startswith(inside)]
        unfilled = [path for path in expected if path not in plain and path not in self.aliases]
        if unfilled:
            raise SavedPipelineError(self.folder, f"{self.name}/{WEIGHTS} lacks {', '.join(unfilled[:3])}")

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
        live = _content(backend, layer)
        have, want = ({n: (tuple(t.shape), t.dtype) for n, t in x.items()} for x in (saved, live))
        if have != want:
            why = f"{receipt.name} is stored as {have}, and the {backend.name} installed here stores it as {want}"
            raise SavedPipelineError(self.folder, why)
        for name, tensor in live.items():
            tensor.copy_(saved[name])
        setattr(layer, RECEIPT, receipt)
        return layer


def _number(value: float | None) -> float:
    return float("inf") if value is None else float(value)


def _check_can_run(folder: Path, components: Iterable[_Component], machine: Context) -> None:
    """Refuse layers that no kernel here multiplies, before anything large is read."""
    from ernie_accel.quantization.choose import BACKENDS

    pairs = {(receipt.backend, receipt.scheme) for part in components for receipt in part.receipts.values()}
    for name, scheme in sorted(pairs):
        reasons = BACKENDS[name].unsupported(scheme, machine) if name in BACKENDS else [f"no backend is called {name}"]
        if reasons:
            raise SavedPipelineError(folder, f"cannot run on {machine}: {'; '.join(reasons)}")


def _build(folder: Path, components: dict[str, _Component]) -> Pipeline:
    """Build the pipe with empty models; scheduler and tokenizers are whole."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    pipeline_class = getattr(diffusers, index["_class_name"], None)
    if pipeline_class is None:
        raise SavedPipelineError(folder, f"needs {index['_class_name']}, which diffusers here does not have")
    models: dict[str, Any] = {name: component.empty() for name, component in components.items()}
    models |= {
        name: None for name, of in index.items() if isinstance(of, list) and of[0] is None
    }  # left out on purpose
    return pipeline_class.from_pretrained(folder, **models, local_files_only=True)


def _rewrites(transform: Transform) -> bool:
    """Return whether a transform changes the module tree in a way that loading can repeat before there are weights."""
    from ernie_accel.transforms.denoiser.fuse_kernels import FuseKernels

    return transform.phase == Phase.REWRITE or isinstance(transform, FuseKernels)


def _forgetful(transform: Transform) -> Transform:
    """Return the transform without the wish to keep originals: while a pipe is loaded they are no weights yet."""
    return replace(transform, keep_originals=False) if hasattr(transform, "keep_originals") else transform  # type: ignore[call-arg]


def _materialise(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give parameters without memory some, in place; the values come later."""
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


def _place_layer(module: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, child = _owner(module, path)
    if parent is None or child not in parent._modules:
        raise SavedPipelineError(path, "the model built from config.json has no such layer")
    parent._modules[child] = layer


def _like(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter where the model has a parameter of this name, else the tensor (a buffer)."""
    owner, child = _owner(module, name)
    is_parameter = owner is not None and child in owner._parameters
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _place_tensor(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> bool:
    """Put a tensor where the model has one of this name; False if it has none."""
    owner, child = _owner(module, name)
    if owner is None or child not in {**owner._parameters, **owner._buffers}:
        return False
    if isinstance(tensor, torch.nn.Parameter):
        owner._parameters[child] = tensor
    else:
        owner._buffers[child] = tensor
    return True


def _entry(transform: Transform, data: dict[str, Any], receipts: tuple[LayerReceipt, ...]) -> Entry:
    """Return the entry of a transform whose effect is in the saved weights."""
    changed = tuple(data["changed"])
    if not changed:
        return Entry(Step(transform, (), Preview((), note="was so when it was saved")), None)
    details = receipts if transform.phase == Phase.QUANTIZE else ()
    applied = Applied(changed, no_undo=_NOT_SAVED, skipped=data["skipped"], details=details)
    return Entry(Step(transform, (), Preview(changed)), applied)
