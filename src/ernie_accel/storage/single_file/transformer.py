"""Fill an empty transformer from a single file: one tensor after the other, never the whole model twice."""

from __future__ import annotations

from pathlib import Path

import torch

from ernie_accel.core.components import weights_of
from ernie_accel.families.family import SingleFileNames
from ernie_accel.families.registry import family_of_transformer
from ernie_accel.storage.single_file.layout import Source, sources_in
from ernie_accel.storage.single_file.tensor_files import TensorFile, open_tensors
from ernie_accel.storage.tensor_file import ALIGNMENT

#: Values that are decoded at once.
_VALUES = 2**22


def fill_from_file(model: torch.nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Fill an empty transformer in place from a single file, in `dtype`, on the host.

    What is stored in `dtype` stays in the file, mapped into memory; the rest is decoded, a few rows at a time.

    Args:
        model: Built from its configuration, parameters on the meta device.
        path: A file that ends in ``.safetensors`` or ``.gguf``, in ComfyUI's layout or with the model's own names.
        dtype: Of the floating-point weights afterwards.

    Raises:
        SavedPipelineError: The file is damaged, or does not hold exactly the weights of this model.
        MissingExtraError: It is GGUF, and the package that decodes it is not installed.
    """
    precise = getattr(model, "_keep_in_fp32_modules", None) or ()
    with open_tensors(path) as file:
        sources = _sources(file, model)
        for weight in list(weights_of(model)):
            keeps = dtype == torch.float16 and not {*precise}.isdisjoint(weight.path.split("."))
            values = _values(file, sources[weight.path], tuple(weight.tensor.shape), torch.float32 if keeps else dtype)
            if weight.name in weight.owner._parameters:
                weight.owner._parameters[weight.name] = torch.nn.Parameter(values, requires_grad=False)
            else:
                weight.owner._buffers[weight.name] = values


def check_fits(model: torch.nn.Module, path: Path) -> None:
    """Refuse what `fill_from_file` would refuse by the names and shapes of a file's tensors; none is read.

    Raises:
        SavedPipelineError: As there.
        MissingExtraError: As there.
    """
    with open_tensors(path) as file:
        _sources(file, model)


def _sources(file: TensorFile, model: torch.nn.Module) -> dict[str, Source]:
    names = family_of_transformer(model).single_file or SingleFileNames()
    return sources_in(file, model, names, f"this {type(model).__name__}")


def _values(file: TensorFile, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the values of one tensor of the model."""
    stored = file.get(source.name)
    rows = source.rows or slice(0, len(stored) if stored.ndim else 1)
    part = stored[rows] if stored.ndim else stored
    if source.scale is None and part.dtype == dtype and part.is_contiguous():
        whole = part.reshape(shape)
        return whole if whole.data_ptr() % ALIGNMENT == 0 else whole.clone()
    scale = None if source.scale is None else file.get(source.scale).float().reshape(-1)
    flat = part.reshape(len(part), -1) if part.ndim else part.reshape(1, 1)
    values = torch.empty(shape, dtype=dtype)
    out = values.reshape(len(flat), -1)
    step = max(1, _VALUES // max(1, out.shape[1]))
    for start in range(0, len(flat), step):
        decoded = file.floats(source.name, flat[start : start + step])
        if scale is not None:
            of_rows = scale if scale.numel() == 1 else scale[rows][start : start + step, None]
            decoded = decoded.float() * of_rows
        out[start : start + step] = decoded.reshape(-1, out.shape[1])
    return values
