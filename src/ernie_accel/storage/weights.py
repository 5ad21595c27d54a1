"""Put the saved bits of one model into its empty model: read or mapped, checked against what the model is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ernie_accel.core.components import weights_of
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.core.transform import LayerReceipt
from ernie_accel.storage.manifest import WEIGHTS
from ernie_accel.storage.parallel_read import ParallelReader, Stored, stored_tensors
from ernie_accel.storage.read_ahead import FileBeingRead, ReadAhead
from ernie_accel.storage.tensor_file import ALIGNMENT

if TYPE_CHECKING:
    from ernie_accel.storage.blanks import Blanks


@dataclass(frozen=True)
class SavedWeights:
    """The saved bits of one model."""

    folder: Path
    name: str
    aliases: Mapping[str, str]
    receipts: Mapping[str, LayerReceipt]

    def fill(self, module: torch.nn.Module, device: str | None, runs_on: str, ahead: ReadAhead | None = None) -> None:
        """Put the saved bits into an empty model in place, quantized layers included.

        Args:
            module: The model.
            device: Where to; None for tensors that are mapped from the file.
            runs_on: Where the model will run, in the end.
            ahead: What has begun to read files onto `device`.

        Raises:
            SavedPipelineError: File and model do not have the same tensors.
        """
        from safetensors import SafetensorError

        from ernie_accel.storage.blanks import Blanks

        blanks = Blanks(device or runs_on, device or "cpu")
        within = tuple(f"{path}." for path in self.receipts)
        wrapped: dict[str, torch.Tensor] = {}
        try:
            with _opened(self.folder / self.name / WEIGHTS, device, ahead) as file:
                by_layer: dict[str, list[str]] = {path: [] for path in self.receipts}
                for name in file.tensors:
                    by_layer.get(name.partition("/")[0], []).append(name)
                inside = {name for mine in by_layer.values() for name in mine}
                outside = sorted(file.tensors.keys() - inside)
                # All of it is checked before memory is allocated for any of it, unless it is being read ahead.
                for path, receipt in self.receipts.items():
                    self._check_layer(module, path, receipt)
                for name in outside:
                    self._check_tensor(module, name, file.tensors[name])
                file.start([*(name for mine in by_layer.values() for name in mine), *outside])
                for path, receipt in self.receipts.items():
                    self._check_layer(module, path, receipt)  # again: it may lie in one that was just replaced
                    saved = {name.partition("/")[2]: file.take(name) for name in by_layer[path]}
                    _put_layer(module, path, self._layer(blanks, receipt, saved))
                for name in outside:
                    wrapped[name] = _like(module, name, file.take(name))
        except (SafetensorError, OSError, ValueError) as error:
            raise self._wrong(f"cannot be read: {error}") from error
        for new, old in self.aliases.items():
            if old not in wrapped:
                raise self._wrong(f"lacks {old}, which is {new} as well")
            self._check_tensor(module, new, wrapped[old])
            wrapped[new] = wrapped[old]
        for name, tensor in wrapped.items():
            _place_tensor(module, name, tensor)
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

    def _layer(self, blanks: Blanks, receipt: LayerReceipt, saved: dict[str, torch.Tensor]) -> torch.nn.Module:
        """Make a quantized layer of the saved bits."""
        from ernie_accel.quantization.correction import correct, correction_shapes
        from ernie_accel.quantization.layers import RECEIPT
        from ernie_accel.storage.blanks import described

        correction = correction_shapes(receipt.shape, receipt.correction_rank)
        have, want = described(saved), blanks.content(receipt, saved["bias"].dtype if "bias" in saved else None)
        want |= {name: (shape, getattr(torch, receipt.dtype)) for name, shape in correction.items()}
        if have != want:
            why = f"is stored as {have}, and the {receipt.backend} installed here stores it as {want}"
            raise SavedPipelineError(self.folder, f"{receipt.name} {why}")
        layer = blanks.layer(receipt, {name: tensor for name, tensor in saved.items() if name not in correction})
        if correction:
            correct(layer, *(saved[name] for name in correction))
        RECEIPT.put(layer, receipt)
        return layer

    def _check_tensor(self, module: torch.nn.Module, name: str, tensor: torch.Tensor | Stored) -> None:
        """Refuse a tensor for which the model has no place of this name, shape and kind."""
        owner, child = _owner(module, name)
        places = {} if owner is None else {**owner._parameters, **owner._buffers}
        if child not in places:
            raise self._wrong(f"has {name}, which the model has not")
        there = places[child]
        if there is None:
            return
        if there.shape != tensor.shape:
            raise self._wrong(f"has {name} as {tuple(tensor.shape)}, and the model as {tuple(there.shape)}")
        # Floating-point weights may have been cast; eight bits mean what the layer that holds them says.
        may_differ = min(there.itemsize, tensor.dtype.itemsize) > 1 and there.is_floating_point()
        if there.dtype != tensor.dtype and not (may_differ and tensor.dtype.is_floating_point):
            raise self._wrong(f"has {name} as {tensor.dtype}, and the model as {there.dtype}")

    def _wrong(self, what: str) -> SavedPipelineError:
        return SavedPipelineError(self.folder, f"{self.name}/{WEIGHTS} {what}")


class _MappedFile:
    """A safetensors file whose tensors stay mapped; what `ParallelReader` is for those that go to a device."""

    def __init__(self, file: Path) -> None:
        from safetensors import safe_open

        self.tensors = stored_tensors(file)
        self._file: Any = safe_open(file, framework="pt")

    def start(self, names: Iterable[str]) -> None:
        """Nothing is read before it is used."""

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor as it is, if kernels can read it where it lies."""
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@contextlib.contextmanager
def _opened(
    file: Path, device: str | None, ahead: ReadAhead | None
) -> Iterator[_MappedFile | ParallelReader | FileBeingRead]:
    if device is None:
        yield _MappedFile(file)
        return
    begun = ahead.opened(file) if ahead is not None else None
    if begun is not None:
        yield begun
        return
    with ParallelReader(file, device) as reader:
        yield reader


def _owner(module: torch.nn.Module, path: str) -> tuple[torch.nn.Module | None, str]:
    parent, _, child = path.rpartition(".")
    try:
        return module.get_submodule(parent), child
    except AttributeError:
        return None, child


def _put_layer(module: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    module.get_submodule(parent)._modules[child] = layer


def _place_tensor(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, child = name.rpartition(".")
    owner = module.get_submodule(parent)
    if isinstance(tensor, torch.nn.Parameter):
        owner._parameters[child] = tensor
    else:
        owner._buffers[child] = tensor


def _like(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter where the model has a parameter of this name, else the tensor (a buffer)."""
    owner, child = _owner(module, name)
    is_parameter = owner is not None and child in owner._parameters
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
