"""torchao: fp8, int8, int4 and the Blackwell formats as tensor subclasses that torch.compile can trace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, final

import torch

from ernie_accel.common.language import said
from ernie_accel.core.context import Context
from ernie_accel.quantization.backend import LinearSpec, QuantizationBackend, defined_in, fix_empty_rows, plain_copy

INT4_GROUP = 32
#: The tinygemm kernels pad K to this; torchao/quantization/quantize_/workflows/int4/int4_tile_packed_to_4d_tensor.py.
TINYGEMM_K = 1024
#: Rows of activations are scaled as if one value were at least this large; normal in bfloat16 after division by 448.
LEAST_MAGNITUDE = 1e-12
_BFLOAT16_ONLY = ("fp8", "int4", "nvfp4", "mxfp8")


@final
class TorchAO(QuantizationBackend):
    """Quantize with ``torchao.quantization.quantize_``, one layer at a time."""

    name: ClassVar[str] = "torchao"
    package: ClassVar[str | None] = "torchao"
    takes_loras: ClassVar[bool] = True
    takes_variants: ClassVar[bool] = True
    schemes: ClassVar[Mapping[str, tuple[int, int]]] = MappingProxyType(
        {
            "fp8": (8, 9),
            "fp8-weight-only": (0, 0),
            "int8": (0, 0),
            "int8-weight-only": (0, 0),
            "int4": (8, 0),
            "nvfp4": (10, 0),
            "mxfp8": (10, 0),
        }
    )

    def unsupported(self, scheme: str, context: Context) -> list[str]:
        reasons = super().unsupported(scheme, context)
        if scheme == "int8" and context.capability is not None:
            reasons = context.missing_capability("int8", (8, 0)) + reasons
        if scheme == "int8-weight-only" and context.device == "cuda":
            # benchmarks/results/quantization_h200_202611.md: a compiled block took 2002 ms instead of 3.7 (torch 2.11).
            reasons.append(said("torchao's int8-weight-only, compiled on CUDA, takes 500 times as long as bfloat16"))
        return reasons

    def remark(self, scheme: str, device: str) -> str:
        if scheme == "int4" and device == "cuda":
            return said(
                "tinygemm is made for single tokens: 4000 rows take 17 times as long as bfloat16; use nf4 instead"
            )
        if scheme in ("fp8", "int8") and device == "cuda":
            return said("faster only when compiled: add Compile()")
        return ""

    def layer_problem(self, scheme: str, spec: LinearSpec) -> str | None:
        if scheme in _BFLOAT16_ONLY and spec.dtype != torch.bfloat16:
            return said(
                "{scheme} starts from bfloat16 weights, and this is {dtype}: add CastDtype('bfloat16')",
                scheme=scheme,
                dtype=_short(spec.dtype),
            )
        if scheme in ("int4", "mxfp8"):
            return spec.not_multiple_of(32, 8 if scheme == "int4" else 16)
        return spec.not_multiple_of(16, 16)

    def stored_bytes(self, scheme: str, spec: LinearSpec) -> int:
        rows, columns = spec.out_features, spec.in_features
        if scheme in ("fp8", "fp8-weight-only"):
            weight = spec.numel + 4 * rows
        elif scheme in ("int8", "int8-weight-only"):
            weight = spec.numel + 5 * rows  # a float32 scale and an int8 zero point a row
        elif scheme == "int4":
            padded = _round_up(columns, TINYGEMM_K)
            weight = rows * padded // 2 + rows * (padded // INT4_GROUP) * 2 * 2  # bfloat16 scale and zero a group
        elif scheme == "mxfp8":
            weight = spec.numel + _swizzled(rows, columns // 32)
        else:
            weight = spec.numel // 2 + _swizzled(rows, columns // 16) + 4
        return weight + spec.bias_bytes

    def quantize(self, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
        from torchao.quantization import quantize_

        layer = plain_copy(linear, linear.weight.detach())
        quantize_(layer, _config(scheme))
        if type(layer.weight) is torch.nn.Parameter:
            raise RuntimeError(f"torchao did not quantize a weight of shape {tuple(linear.weight.shape)} ({scheme})")
        layer.weight.requires_grad_(False)
        if scheme in ("fp8", "fp8-weight-only"):
            weight: Any = layer.weight
            fix_empty_rows(weight.qdata, weight.scale)
        # A method bound to the layer and kept on it: a cycle, which would hold the weight until the next collection.
        vars(layer).pop("extra_repr", None)
        return layer

    def dequantize(self, layer: torch.nn.Module) -> torch.Tensor:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        if type(weight).__name__ != "Int4TilePackedTo4dTensor":
            return weight.dequantize()
        # Tile-packed weights cannot be unpacked; multiplying the unit matrix reads them back column by column.
        columns = weight.shape[1]
        eye = torch.eye(columns, dtype=weight.dtype, device=weight.device)
        return torch.nn.functional.linear(eye, weight).T

    def tensors(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        weight: Any = layer.weight
        names, _ = weight.__tensor_flatten__()
        return {name: getattr(weight, name) for name in names}

    def holds(self, layer: torch.nn.Module) -> bool:
        return isinstance(layer, torch.nn.Linear) and defined_in(layer.weight, "torchao")


def _config(scheme: str) -> object:
    from torchao import quantization as ao

    # set_inductor_config=True, the default, switches coordinate-descent tuning on for the whole process.
    if scheme == "fp8":
        # Without a lower bound, the scale of an activation row of zeros is 0, and 0 / 0 is NaN.
        return ao.Float8DynamicActivationFloat8WeightConfig(
            granularity=ao.PerRow(), activation_value_lb=LEAST_MAGNITUDE, set_inductor_config=False
        )
    if scheme == "fp8-weight-only":
        return ao.Float8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8":
        return ao.Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False)
    if scheme == "int8-weight-only":
        return ao.Int8WeightOnlyConfig(version=2, set_inductor_config=False)
    if scheme == "int4":
        return ao.Int4WeightOnlyConfig(
            group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    from torchao.prototype import mx_formats

    if scheme == "nvfp4":
        # The Triton kernel, the default, is that of the MSLK package: without it the first forward fails.
        return mx_formats.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
    return mx_formats.MXDynamicActivationMXWeightConfig()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _round_up(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def _swizzled(rows: int, columns: int) -> int:
    """Return the bytes of one-byte scales [rows, columns] in cuBLAS's 128 x 4 tiles."""
    return _round_up(rows, 128) * _round_up(columns, 4)
