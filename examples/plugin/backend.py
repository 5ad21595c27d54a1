"""A quantization backend in plain torch: int8 rows with one scale each, multiplied in the dtype of the input."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ernie_accel.quantization.backend import LinearSpec, QuantizationBackend, Scheme

ROWS = Scheme("int8-rows", 8, "int8 weights with a scale per row, in plain torch", 36, 34)


class RowsLinear(nn.Module):
    """``x @ (values * scale).T + bias``."""

    values: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("values", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.float32))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.values * self.scale).to(x.dtype), self.bias)


class PlainRows(QuantizationBackend):
    """Stores rows; needs no package, so it runs wherever torch does."""

    name = "plain-rows"
    package = None
    schemes: ClassVar[dict[str, tuple[int, int]]] = {ROWS.name: (0, 0)}
    devices = ("cuda", "cpu", "mps", "xpu", "npu")

    def layer_problem(self, scheme: str, spec: LinearSpec) -> str | None:
        return None

    def stored_bytes(self, scheme: str, spec: LinearSpec) -> int:
        return spec.numel + 4 * spec.out_features + spec.bias_bytes

    def quantize(self, scheme: str, linear: nn.Linear) -> nn.Module:
        return RowsLinear(linear)

    def dequantize(self, layer: nn.Module) -> Tensor:
        assert isinstance(layer, RowsLinear)
        return layer.values * layer.scale

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        assert isinstance(layer, RowsLinear)
        return {"values": layer.values, "scale": layer.scale}

    def holds(self, layer: nn.Module) -> bool:
        return isinstance(layer, RowsLinear)
