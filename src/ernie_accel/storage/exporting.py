"""Export a transformer to ONNX, for TensorRT and other runtimes: any number of pictures, any size, any prompt."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from ernie_accel.core.apply import report_of
from ernie_accel.core.components import AnyPipeline, CallablePipeline, Pipeline, is_skeleton, weights_of
from ernie_accel.core.errors import ErnieAccelError, MissingExtraError
from ernie_accel.core.files import check_file
from ernie_accel.core.plan import check_pipeline
from ernie_accel.families import family_of
from ernie_accel.models.rewritten import ForwardInputs, inputs_of

#: Rows, width, height and tokens: what is traced, and what differs from it in everything that may differ.
_TRACED, _OTHER = (2, 128, 192, 9), (3, 256, 320, 20)
#: From the smallest to the largest that a TensorRT engine is built for, unless others are asked for.
_SMALLEST, _USUAL, _LARGEST = (1, 256, 256, 1), (1, 1024, 1024, 256), (1, 1376, 1376, 1024)
_TOLERANCE = 1e-3

Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class OnnxModel:
    """A transformer in ONNX.

    Attributes:
        path: The file; its weights are beside it, in ``<name>.data``.
        inputs: Arguments by name, each with its shape: numbers, and names of what may differ from call to call.
        dtype: Of the weights, as torch names it.
    """

    path: Path
    inputs: Mapping[str, tuple[int | str, ...]]
    dtype: str
    _shapes: tuple[Mapping[str, tuple[int, ...]], ...] = ()

    @property
    def tensorrt_command(self) -> str:
        """The command that builds a TensorRT engine, for one picture of 256 to 1376 px a side, up to 1,024 tokens."""
        ranges = " ".join(
            f"--{which}Shapes={','.join(f'{name}:{_by_x(shape)}' for name, shape in shapes.items())}"
            for which, shapes in zip(("min", "opt", "max"), self._shapes, strict=True)
        )
        precision = {"bfloat16": " --bf16", "float16": " --fp16"}.get(self.dtype, "")
        return f"trtexec --onnx={self.path} --saveEngine={self.path.with_suffix('.plan')}{precision} {ranges}"

    def __str__(self) -> str:
        shapes = "\n".join(f"  {name}: {_by_x(shape)}" for name, shape in self.inputs.items())
        return f"{self.path} ({self.dtype})\n{shapes}\nTensorRT:\n  {self.tensorrt_command}"


def export_onnx(pipe: AnyPipeline, path: str | os.PathLike[str], *, check: bool = False) -> OnnxModel:
    """Write the transformer of a pipe to an ONNX file; the pipe itself is not changed.

    The pipe must be as it was loaded, without transforms: what runs the file has kernels and precisions of its own.

    Args:
        pipe: A pipeline of a family whose transformer takes tensors only: ERNIE-Image.
        path: Where to; it ends in ``.onnx``. The weights go beside it, in ``<name>.data``. Both are replaced.
        check: Run the file with ONNX Runtime on the CPU at two sizes, and refuse it if a value differs by more than
            1e-3 of the largest. For float32 only; it needs the memory of the weights twice.

    Returns:
        What was written; print it for the inputs, and the command that takes it to TensorRT.

    Raises:
        MissingExtraError: The packages for it are not installed.
        ErnieAccelError: The pipe cannot be exported, or the check failed; nothing was written.
    """
    path = Path(path)
    checked = check_pipeline(pipe)
    transformer, make = _exportable(checked, check)
    check_file(path, ".onnx", "path")
    _require("onnxscript", *(("onnxruntime",) if check else ()))
    family = family_of(checked)

    def shapes(size: Size) -> dict[str, tuple[int, ...]]:
        made = make(transformer, *size)
        return {name: tuple(value.shape) for name, value in made.items() if isinstance(value, torch.Tensor)}

    traced, other = shapes(_TRACED), shapes(_OTHER)
    dynamic = {
        name: {axis: torch.export.Dim.DYNAMIC for axis, side in enumerate(shape) if side != other[name][axis]}
        for name, shape in traced.items()
    }
    call = _Call(transformer, tuple(traced)).eval()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder, torch.no_grad():
        beside = Path(folder) / path.name
        try:
            program = torch.onnx.export(
                call,
                tuple(_values(make, transformer, _TRACED)),
                dynamo=True,
                dynamic_shapes={"arguments": tuple(dynamic.values())},
                input_names=list(traced),
                output_names=["sample"],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ErnieAccelError(
                f"torch {torch.__version__} cannot trace {family.name}'s transformer with sizes that differ from call "
                "to call; ERNIE-Image's is exported. Its own message is above"
            ) from error
        if program is None:
            raise RuntimeError("torch.onnx.export returned no program")
        program.save(str(beside), external_data=True)
        if check:
            _check(beside, call, make, transformer)
        Path(f"{beside}.data").replace(f"{path}.data")
        beside.replace(path)
    named = {
        name: tuple(_axis(name, axis) if axis in dynamic[name] else side for axis, side in enumerate(shape))
        for name, shape in traced.items()
    }
    sizes = tuple(shapes(size) for size in (_SMALLEST, _USUAL, _LARGEST))
    return OnnxModel(path, named, str(transformer.dtype).removeprefix("torch."), sizes)


class _Call(torch.nn.Module):
    """A transformer with its arguments by place, which returns the prediction alone."""

    def __init__(self, transformer: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.transformer, self.names = transformer, names

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, arguments, strict=True))
        found: torch.Tensor = self.transformer(**named, return_dict=False)[0]
        return found


def _exportable(pipe: Pipeline, check: bool) -> tuple[torch.nn.Module, ForwardInputs]:
    """Return the transformer of a pipe that can be exported, and what makes arguments for it.

    Raises:
        ErnieAccelError: It cannot.
    """
    family, name = family_of(pipe), type(pipe).__name__
    transformer = getattr(pipe, "transformer", None)
    make = inputs_of(family)
    if transformer is None or not callable(make):
        raise ErnieAccelError(f"{name} cannot be exported: what its transformer takes is not known; ERNIE-Image's is")
    if is_skeleton(pipe) or any(weight.tensor.device.type == "meta" for weight in weights_of(transformer)):
        raise ErnieAccelError(f"the transformer of this {name} has no weights here: load it with memory=None")
    applied = [repr(entry.step.transform) for entry in report_of(cast(CallablePipeline, pipe)).entries if entry.applied]
    if applied:
        raise ErnieAccelError(
            f"this {name} has {', '.join(applied)}; restore(pipe) first, or load it without a preset: only the "
            "transformer as it was loaded is exported"
        )
    found = [key for key, value in make(transformer, *_TRACED).items() if not isinstance(value, (torch.Tensor, bool))]
    if found:
        raise ErnieAccelError(
            f"{family.name}'s transformer takes {found[0]} as a list, for which ONNX has no form; ERNIE-Image's is "
            "exported"
        )
    if check and transformer.dtype != torch.float32:
        raise ErnieAccelError(
            f"check=True compares float32 with float32, and these weights are {transformer.dtype}: load the pipe with "
            "dtype='float32', or leave check out"
        )
    return transformer, make


def _require(*packages: str) -> None:
    """Refuse to begin without the packages that are needed.

    Raises:
        MissingExtraError: One is not installed.
    """
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "onnx") from error


def _values(make: ForwardInputs, transformer: torch.nn.Module, size: Size) -> list[torch.Tensor]:
    """Return arguments of a size, of random numbers; whole numbers are as they are made."""
    generator = torch.Generator().manual_seed(0)
    made = [value for value in make(transformer, *size).values() if isinstance(value, torch.Tensor)]
    return [
        torch.randn(value.shape, generator=generator).to(value.dtype) if value.is_floating_point() else value.clone()
        for value in made
    ]


def _check(file: Path, call: torch.nn.Module, make: ForwardInputs, transformer: torch.nn.Module) -> None:
    """Hold the file against the transformer.

    Raises:
        ErnieAccelError: They differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for size in (_TRACED, _OTHER):
        arguments = _values(make, transformer, size)
        device = next(transformer.parameters()).device
        expected = call(*(each.to(device) for each in arguments)).cpu()
        named = dict(zip((each.name for each in session.get_inputs()), (a.numpy() for a in arguments), strict=True))
        (found,) = session.run(None, named)
        error = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
        if not error <= _TOLERANCE:
            rows, width, height, tokens = size
            raise ErnieAccelError(
                f"ONNX Runtime differs from torch by {error:.2g} of the largest value, at {rows} pictures of "
                f"{width}x{height} and {tokens} tokens; expected at most {_TOLERANCE:g}"
            )


def _axis(name: str, axis: int) -> str:
    """Return the name of a side that differs from call to call."""
    if axis == 0:
        return "pictures"
    return {2: "height", 3: "width"}[axis] if name == "hidden_states" else "tokens"


def _by_x(shape: tuple[int | str, ...]) -> str:
    return "x".join(map(str, shape))
