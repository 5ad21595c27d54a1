"""Hold the names, shapes and scales of a single file against an empty model: what goes where, or all that is wrong.

ComfyUI names the tensors of a transformer as its authors' own code does (`Family.single_file`), perhaps below
``model.diffusion_model.``, and stores a quantized linear layer as three tensors:

``<layer>.weight``        the values, in fp8 or int8
``<layer>.weight_scale``  what they are multiplied by, one number or one a row; ``scale_weight`` in older files
``<layer>.comfy_quant``   the format, as JSON in bytes; in other files ``_quantization_metadata`` in the header has it
                          for all layers, and older ones have ``scaled_fp8``, and mean fp8

``input_scale`` is about activations, and does not change the weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ernie_accel.common.text import one_line
from ernie_accel.core.components import weights_of
from ernie_accel.families.family import SingleFileNames
from ernie_accel.storage.single_file.tensor_files import DTYPES, SafetensorsFile, TensorFile

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SCALES = (".weight_scale", ".scale_weight")
_OF_ACTIVATIONS = (".input_scale", ".scale_input")
_FORMAT, _MARKER, _FORMATS = ".comfy_quant", "scaled_fp8", "_quantization_metadata"
#: Formats that are read: name in ComfyUI -> name in a safetensors header.
_READ = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
_MOST_FORMAT_BYTES = 4096
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """Where one tensor of the model comes from.

    Attributes:
        name: Of the tensor in the file.
        scale: Of the tensor in the file that it is multiplied by; None: none.
        rows: Which of its rows; None: all.
    """

    name: str
    scale: str | None = None
    rows: slice | None = None


@dataclass
class _Problems:
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)

    def lines(self, file: TensorFile, expected: int) -> Iterator[str]:
        """Yield one line for each kind of problem, counted, with the first few of each."""
        for names, what in (
            (self.missing, f"lacks {len(self.missing):,} of the model's {expected:,} tensors"),
            (self.extra, f"has {len(self.extra):,} of {len(file.tensors):,} tensors that the model has not"),
            (self.shapes, f"has {len(self.shapes):,} of other shapes"),
            (self.formats, f"has {len(self.formats):,} that cannot be read"),
        ):
            if names:
                more = ", ..." if len(names) > _SHOWN else ""
                yield f"{what}: {', '.join(one_line(name, 200) for name in names[:_SHOWN])}{more}"


def sources_in(file: TensorFile, model: torch.nn.Module, names: SingleFileNames, what: str) -> dict[str, Source]:
    """Return where each tensor of an empty model comes from, by its path in the model.

    Args:
        file: The file, of which only the header has been read.
        model: The model, whose parameters have no memory yet.
        names: How the file names what the model names otherwise.
        what: What messages call the model.

    Raises:
        SavedPipelineError: With everything that is missing, too much, of another shape, or in a format that is not
            read, counted.
    """
    expected = {weight.path: tuple(weight.tensor.shape) for weight in weights_of(model)}
    problems = _Problems()
    ours = _without_prefix(file)
    formats = _formats(file, ours, problems)
    scales: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for name, stored_as in ours.items():
        of_scale = next((end for end in _SCALES if name.endswith(end)), None)
        if of_scale is not None:
            layer = name.removesuffix(of_scale)
            if layer in scales:
                problems.extra.append(f"{stored_as!r} beside {scales[layer]!r}")
            scales[layer] = stored_as
        elif not name.endswith((_FORMAT, *_OF_ACTIVATIONS)) and name not in (_MARKER, *names.unused):
            tensors[name] = stored_as
    found: dict[str, Source] = {}
    for name, stored_as in tensors.items():
        layer = name.removesuffix(".weight") if name.endswith(".weight") else ""  # no layer's name is empty
        scale = scales.pop(layer, None)
        _check_format(file, stored_as, scale, formats.pop(layer, None), problems)
        for path, rows in _targets(name, names, expected):
            if path not in expected:
                problems.extra.append(repr(stored_as))
                break
            if path in found:
                problems.extra.append(f"{stored_as!r} beside {found[path].name!r}")
                break
            found[path] = Source(stored_as, scale, rows)
    problems.extra += [repr(name) for name in scales.values()]
    problems.extra += [f"a format for {layer!r}" for layer in formats]
    problems.missing += [path for path in expected if path not in found]
    _check_shapes(file, found, expected, problems)
    lines = list(problems.lines(file, len(expected)))
    if lines:
        raise file.wrong("\n  ".join((f"does not hold the weights of {what}:", *lines)))
    return found


def _without_prefix(file: TensorFile) -> dict[str, str]:
    """Return the file's names without the prefix that a checkpoint of several models puts before the transformer's.

    With a prefix, only what has it is the transformer's; what else is there, such as a VAE, is left alone.
    """
    for prefix in _PREFIXES:
        inside = {name.removeprefix(prefix): name for name in file.tensors if name.startswith(prefix)}
        if inside:
            return inside
    return {name: name for name in file.tensors}


def _targets(
    name: str, names: SingleFileNames, expected: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, slice | None]]:
    """Return the paths in the model that a tensor of the file goes to, with the rows that go there."""
    if name in expected:
        return [(name, None)]
    path = name
    for pattern, replacement in names.renamed:
        path = re.sub(pattern, replacement, path)
    for fused, parts in names.fused.items():
        if f".{fused}." in path:
            split = [path.replace(f".{fused}.", f".{part}.") for part in parts]
            starts, row = [], 0
            for part in split:
                starts.append(row)
                row += expected[part][0] if expected.get(part) else 0
            return [
                (part, slice(start, start + (expected[part][0] if expected.get(part) else 0)))
                for part, start in zip(split, starts, strict=True)
            ]
    return [(path, None)]


def _formats(file: TensorFile, ours: Mapping[str, str], problems: _Problems) -> dict[str, str]:
    """Return the format of each layer for which the file names one."""
    formats: dict[str, str] = {}
    given = file.metadata.get(_FORMATS)
    if given is not None:
        layers = _json(given)
        layers = layers.get("layers") if isinstance(layers, dict) else None
        if not isinstance(layers, dict):
            raise file.wrong(f"{_FORMATS} in its header is not an object with 'layers'")
        for layer, settings in layers.items():
            within = next((layer.removeprefix(each) for each in _PREFIXES if layer.startswith(each)), layer)
            formats[within] = _format_in(settings)
    for name, stored_as in ours.items():
        if not name.endswith(_FORMAT):
            continue
        stored = file.tensors[stored_as]
        if stored.format != "U8" or len(stored.shape) != 1 or stored.shape[0] > _MOST_FORMAT_BYTES:
            problems.formats.append(f"{stored_as!r} is {stored.format} {_shape(stored.shape)}, not a line of JSON")
            continue
        formats[name.removesuffix(_FORMAT)] = _format_in(_json(bytes(file.get(stored_as).tolist())))
    return formats


def _json(text: str | bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _format_in(settings: object) -> str:
    """Return the format in a layer's settings, with what is not the plain form of it; "" where none is named."""
    if not isinstance(settings, dict) or not isinstance(settings.get("format"), str):
        return ""
    inner = settings.get("params")
    rotated = settings.get("convrot") or (isinstance(inner, dict) and inner.get("convrot"))
    return str(settings["format"]) + (" with rotated columns (convrot)" if rotated else "")


def _check_format(file: TensorFile, name: str, scale: str | None, named: str | None, problems: _Problems) -> None:
    """Note a tensor that cannot be turned into numbers with what stands beside it."""
    stored, shown = file.tensors[name], repr(name)
    if named is not None and named not in _READ:
        problems.formats.append(f"{shown} is {named[:60]!r}; read are {', '.join(_READ)}, and GGUF")
    elif isinstance(file, SafetensorsFile) and (stored.format not in DTYPES or stored.format == "U8"):
        problems.formats.append(f"{shown} is {stored.format}; read are {', '.join(k for k in DTYPES if k != 'U8')}")
    elif named is not None and _READ[named] != stored.format:
        problems.formats.append(f"{shown} is {stored.format}, and said to be {named!r}")
    elif stored.format == "I8" and scale is None:
        problems.formats.append(f"{shown} is int8 without a scale")
    elif scale is not None:
        of_scale = file.tensors[scale]
        rows = stored.shape[0] if stored.shape else 1
        fits = of_scale.shape in ((), (1,), (rows,), (rows, 1), (1, 1)) and of_scale.format in ("F32", "F16", "BF16")
        if not fits:
            found = f"{of_scale.format} {_shape(of_scale.shape)}"
            problems.formats.append(f"{scale!r} is {found}; expected one number, or one for each of {rows} rows")


def _check_shapes(
    file: TensorFile, found: Mapping[str, Source], expected: Mapping[str, tuple[int, ...]], problems: _Problems
) -> None:
    whole: dict[str, int] = {}
    for path, source in found.items():
        stored, shape = file.tensors[source.name].shape, expected[path]
        if source.rows is not None:
            whole[source.name] = max(whole.get(source.name, 0), source.rows.stop)
            if stored[1:] != shape[1:]:
                problems.shapes.append(f"{source.name!r} is {_shape(stored)}, and {path} {_shape(shape)}")
        elif _squeezed(stored) != _squeezed(shape):
            problems.shapes.append(f"{source.name!r} is {_shape(stored)}, and the model's {_shape(shape)}")
    for name, rows in whole.items():
        stored = file.tensors[name].shape
        if not stored or stored[0] != rows:
            problems.shapes.append(f"{name!r} is {_shape(stored)}, and the layers it holds have {rows} rows together")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without what GGUF leaves out: leading sides of 1."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
