"""optimum-quanto: int8 weights on CUDA and the CPU, fp8 and int4 on the CPU, without its known crashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, final

import torch

from ernie_accel.common.language import said
from ernie_accel.core.context import Context
from ernie_accel.quantization.backend import LinearSpec, QuantizationBackend, bias_of, defined_in, fix_empty_rows

_QTYPES = MappingProxyType({"int8-weight-only": "qint8", "fp8-weight-only": "qfloat8", "int4": "qint4"})


@final
class Quanto(QuantizationBackend):
    """Swap in quanto's ``QLinear`` with frozen weights.

    Weights only: its quantized activations give noise unless calibrated on data, so "int8" and "fp8" are not offered.
    """

    name: ClassVar[str] = "quanto"
    package: ClassVar[str | None] = "optimum.quanto"
    takes_loras: ClassVar[bool] = True
    takes_biases: ClassVar[bool] = True
    keeps_names: ClassVar[bool] = False
    schemes: ClassVar[Mapping[str, tuple[int, int]]] = MappingProxyType(dict.fromkeys(_QTYPES, (0, 0)))

    def unsupported(self, scheme: str, context: Context) -> list[str]:
        reasons = super().unsupported(scheme, context)
        if scheme != "int8-weight-only" and context.device == "cuda":
            # MarlinF8QBytesTensor and quanto::unpack of quanto 0.2.7; the first of them failed to compile on an H200.
            reasons.append(
                said(
                    "on CUDA quanto repacks {scheme} for kernels that it builds with nvcc at the first picture, and "
                    "that torch.compile cannot trace",
                    scheme=scheme,
                )
            )
        if scheme == "int4" and context.device == "cpu" and context.no_compile is not None:
            reasons.append(
                said(
                    "quanto unpacks int4 with a kernel that it builds at the first use, which needs a C++ compiler, "
                    "and none is on the PATH"
                )
            )
        return reasons

    def layer_problem(self, scheme: str, spec: LinearSpec) -> str | None:
        if scheme == "int8-weight-only":
            # torch._weight_int8pack_mm on the CPU reads past a row that is not a multiple of 16: a segmentation fault.
            return spec.not_multiple_of(16)
        if scheme == "int4":
            return spec.not_multiple_of(32, 2)
        return None

    def stored_bytes(self, scheme: str, spec: LinearSpec) -> int:
        size = spec.dtype.itemsize
        unused_activation_scales = 2 * size  # buffers of every QLinear
        if scheme == "int4":
            groups = spec.numel // _group(spec.in_features)
            return spec.numel // 2 + 2 * groups * size + unused_activation_scales + spec.bias_bytes
        return spec.numel + spec.out_features * size + unused_activation_scales + spec.bias_bytes

    def quantize(self, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
        from optimum import quanto

        from ernie_accel.quantization.quanto_linear import CopyableQLinear

        layer: Any = CopyableQLinear.from_module(linear, weights=getattr(quanto, _QTYPES[scheme]))
        layer.bias = bias_of(linear)
        layer.freeze()
        layer.weight.requires_grad_(False)
        if scheme == "fp8-weight-only":
            fix_empty_rows(layer.weight._data, layer.weight._scale)
        quantized: torch.nn.Module = layer.train(linear.training)
        return quantized

    def dequantize(self, layer: torch.nn.Module) -> torch.Tensor:
        return layer.weight.dequantize()  # type: ignore[operator]

    def tensors(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        return dict(_flatten(layer.weight, ""))

    def holds(self, layer: torch.nn.Module) -> bool:
        return defined_in(layer, "optimum")

    def breaks_graph(self, scheme: str, dtype: torch.dtype) -> str | None:
        if scheme == "int4" and dtype == torch.bfloat16:
            return said("quanto's int4 in bfloat16 cannot be traced")
        return None


def _group(columns: int) -> int:
    """Return the values that share a scale; as ``QModuleMixin.__init__`` of quanto 0.2.7 decides."""
    group = 128
    if columns <= group:
        return columns
    while columns % group and group > 32:
        group -= 32
    return group if columns % group == 0 else columns


def _flatten(tensor: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        inner = getattr(tensor, name)
        if hasattr(inner, "__tensor_flatten__"):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner
