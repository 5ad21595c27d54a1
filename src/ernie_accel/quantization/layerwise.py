"""Diffusers' layerwise casting: float8 storage without scales, upcast before every product. Needs no package."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, final

import torch

from ernie_accel.common.language import said
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.quantization.backend import LinearSpec, QuantizationBackend, plain_copy

STORAGE = torch.float8_e4m3fn


@final
class Layerwise(QuantizationBackend):
    """Attach diffusers' casting hook to a copy of the layer.

    There are no scales: magnitudes under 2^-9 become zero, and those over 448 overflow. Use it where no quantization
    package can be installed.
    """

    name: ClassVar[str] = "layerwise"
    package: ClassVar[str | None] = None
    schemes: ClassVar[Mapping[str, tuple[int, int]]] = MappingProxyType({"fp8-weight-only": (0, 0)})
    devices: ClassVar[tuple[str, ...]] = ("cuda", "cpu", "npu", "mps", "xpu")
    takes_correction: ClassVar[bool] = False

    def layer_problem(self, scheme: str, spec: LinearSpec) -> str | None:
        return None

    def stored_bytes(self, scheme: str, spec: LinearSpec) -> int:
        return spec.numel + (spec.out_features if spec.bias_bytes else 0)  # the hook casts the bias, too

    def quantize(self, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
        from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

        layer = plain_copy(linear, linear.weight.detach().to(STORAGE))
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(STORAGE)
        apply_layerwise_casting_hook(layer, STORAGE, linear.weight.dtype, non_blocking=False)
        return layer

    def dequantize(self, layer: torch.nn.Module) -> torch.Tensor:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return weight.detach().float()

    def tensors(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: parameter.data for name, parameter in layer.named_parameters()}

    def holds(self, layer: torch.nn.Module) -> bool:
        return bool(library_hooks(layer).named("layerwise_casting"))

    def breaks_graph(self, scheme: str, dtype: torch.dtype) -> str | None:
        return said("layerwise casting changes the dtype of parameters inside the forward")
