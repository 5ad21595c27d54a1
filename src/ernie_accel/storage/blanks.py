"""Make the quantized layers of a saved pipe around saved tensors: nothing is quantized for each of them.

A backend makes one blank layer of each kind: scheme, shape, dtype, bias. Every layer is a copy of its blank that holds
the saved tensors in the place of the blank's own. Where a copy would not be right, as of a layer with hooks, there is a
blank for each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ernie_accel.core.captured import plain_tensors
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.core.transform import LayerReceipt
from ernie_accel.quantization.backend import QuantizationBackend
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.storage.layers import content_of

#: What blanks of one kind have in common: backend, scheme, shape, dtype, dtype of the bias.
_Kind = tuple[str, str, tuple[int, int], str, torch.dtype | None]
#: Address, dtype and shape of a tensor.
_Place = tuple[int, torch.dtype, torch.Size]
#: Shape and dtype of each tensor of a layer.
Content = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Blanks:
    """Blank layers, one of each kind that was asked for.

    Attributes:
        device: Where blanks are made: where their scheme can run.
        place: Where the layers will be.
    """

    device: str
    place: str
    _made: dict[_Kind, nn.Module] = field(default_factory=dict)

    def content(self, receipt: LayerReceipt, bias: torch.dtype | None) -> Content:
        """Return what a layer of this kind consists of."""
        live = content_of(BACKENDS[receipt.backend], self._blank(receipt, bias))
        return described(live)

    def layer(self, receipt: LayerReceipt, saved: Mapping[str, Tensor]) -> nn.Module:
        """Return a layer that holds these tensors, which have the shapes and dtypes of `content`."""
        backend = BACKENDS[receipt.backend]
        blank = self._blank(receipt, saved["bias"].dtype if "bias" in saved else None)
        live = content_of(backend, blank)
        places = {_place(tensor): saved[name] for name, tensor in live.items()}
        held = [tensor for of in (blank._parameters, blank._buffers) for tensor in of.values() if tensor is not None]
        plain = [inner for tensor in held for inner in plain_tensors(tensor)]
        is_made_of_them = len(places) == len(live) and places.keys() <= set(map(_place, plain))
        if not is_made_of_them or not all(map(_is_plain, plain)) or _acts_by_itself(blank):
            bias = saved["bias"].dtype if "bias" in saved else None
            return _copied_in(backend, self._make(receipt, bias, self.place), saved)
        layer = _twin(blank, held)
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[name] = nn.Parameter(_rebuilt(parameter, places), requires_grad=False)
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                layer._buffers[name] = _rebuilt(buffer, places)
        made = content_of(backend, layer)
        if any(made[name].data_ptr() != tensor.data_ptr() for name, tensor in saved.items() if tensor.numel()):
            raise RuntimeError(
                f"a layer of {backend.name} was not made of the tensors that were saved ({receipt.scheme})"
            )
        return layer

    def _blank(self, receipt: LayerReceipt, bias: torch.dtype | None) -> nn.Module:
        kind = (receipt.backend, receipt.scheme, receipt.shape, receipt.dtype, bias)
        if kind not in self._made:
            self._made[kind] = self._make(receipt, bias, self.device)
        return self._made[kind]

    def _make(self, receipt: LayerReceipt, bias: torch.dtype | None, device: str) -> nn.Module:
        rows, columns = receipt.shape
        dtype = getattr(torch, receipt.dtype)
        linear = nn.Linear(columns, rows, bias=False, device="meta").eval()
        linear.weight = nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(torch.zeros(rows, dtype=bias, device=device), requires_grad=False)
        return BACKENDS[receipt.backend].blank(receipt.scheme, linear)


def described(content: Mapping[str, Tensor]) -> Content:
    """Return shape and dtype of each tensor."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}


def _place(tensor: Tensor) -> _Place:
    return tensor.data_ptr(), tensor.dtype, tensor.size()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _twin(layer: nn.Module, held: list[Tensor]) -> nn.Module:
    """Return a copy of a layer that shares its tensors, whatever its class does when it is copied."""
    twin: nn.Module = object.__new__(type(layer))
    memo: dict[int, Any] = {id(tensor): tensor for tensor in held}
    memo[id(layer)] = twin
    twin.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return twin


def _acts_by_itself(layer: nn.Module) -> bool:
    """Return whether a layer has what a copy of it would share: hooks, or methods of its own."""
    own = any(isinstance(value, FunctionType) or name == "forward" for name, value in vars(layer).items())
    return own or bool(layer._forward_pre_hooks or layer._forward_hooks or library_hooks(layer))


def _rebuilt(tensor: Any, places: Mapping[_Place, Tensor]) -> Tensor:
    """Return a tensor, plain or of a quantizer's class, with saved ones in the place of those it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, settings = tensor.__tensor_flatten__()
        inner = {name: _rebuilt(getattr(tensor, name), places) for name in names}
        made: Tensor = type(tensor).__tensor_unflatten__(inner, settings, tensor.size(), tensor.stride())
        return made
    return places[_place(tensor)] if _place(tensor) in places else tensor.detach().clone()


def _copied_in(backend: QuantizationBackend, blank: nn.Module, saved: Mapping[str, Tensor]) -> nn.Module:
    for name, tensor in content_of(backend, blank).items():
        tensor.copy_(saved[name])
    return blank
