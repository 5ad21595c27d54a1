"""bitsandbytes: its int8 and 4-bit kernels, with scales in buffers, so that they move and are saved.

Its own ``Linear8bitLt`` and ``Linear4bit`` keep scales beside the tensors. So they stay behind when a pipe moves after
its first picture, are missing from ``save_pretrained`` (the reload is noise), and on some CPUs the first forward
repacks the weight. The two layers here hold the same bits in buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, final

import torch

from ernie_accel.core.context import Context
from ernie_accel.quantization.backend import LinearSpec, QuantizationBackend, bias_of, defined_in

#: Weights that share a scale in the 4-bit formats.
BLOCK = 64


@final
class BitsAndBytes(QuantizationBackend):
    """Quantize with the kernels of bitsandbytes."""

    name: ClassVar[str] = "bitsandbytes"
    package: ClassVar[str | None] = "bitsandbytes"
    schemes: ClassVar[Mapping[str, tuple[int, int]]] = MappingProxyType({"int8": (0, 0), "nf4": (0, 0), "fp4": (0, 0)})

    def unsupported(self, scheme: str, context: Context) -> list[str]:
        reasons = super().unsupported(scheme, context)
        if scheme == "int8" and context.capability is not None:
            reasons = context.missing_capability("int8", (7, 5)) + reasons
        return reasons

    def layer_problem(self, scheme: str, spec: LinearSpec) -> str | None:
        return spec.not_multiple_of(16, 16) if scheme == "int8" else spec.not_multiple_of(BLOCK)

    def stored_bytes(self, scheme: str, spec: LinearSpec) -> int:
        if scheme == "int8":
            return spec.numel + 4 * spec.out_features + spec.bias_bytes
        return spec.numel // 2 + 4 * (spec.numel // BLOCK) + spec.bias_bytes

    def quantize(self, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
        import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

        layer = Int8Linear(linear) if scheme == "int8" else FourBitLinear(linear, scheme)
        return layer.train(linear.training)

    def dequantize(self, layer: torch.nn.Module) -> torch.Tensor:
        if not isinstance(layer, (Int8Linear, FourBitLinear)):
            raise TypeError(f"expected a layer of this backend, got {type(layer).__name__}")
        return layer.dequantize()

    def tensors(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        return dict(layer.named_buffers(recurse=False))

    def holds(self, layer: torch.nn.Module) -> bool:
        return isinstance(layer, (Int8Linear, FourBitLinear)) or defined_in(layer, "bitsandbytes")


class Int8Linear(torch.nn.Module):
    """Multiply int8 activations by int8 weights, a scale per row each: LLM.int8 (arXiv 2208.07339) without outliers.

    Attributes:
        weight: int8 [N, K].
        absmax: Largest magnitude of each row of the weight, float32 [N].
    """

    weight: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        weight, absmax = _int8_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("absmax", absmax)
        self.bias = bias_of(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., K] in any floating dtype; return [..., N] in the same."""
        rows, absmax = _int8_rows(x.reshape(-1, self.in_features))
        out: torch.Tensor = torch.ops.bitsandbytes.int8_scaled_mm(rows, self.weight, absmax, self.absmax, dtype=x.dtype)
        out = out.reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def dequantize(self) -> torch.Tensor:
        """Return the weight [N, K]."""
        return (self.weight.float() * (self.absmax / 127)[:, None]).to(self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


class FourBitLinear(torch.nn.Module):
    """Unpack 4-bit weights with the kernel of bitsandbytes, and multiply in the activations' dtype.

    Attributes:
        weight: Two values per byte, uint8 [N * K / 2, 1].
        absmax: Largest magnitude of each block of 64 values, float32 [N * K / 64].
    """

    weight: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, code: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.code = code
        weight, absmax = torch.ops.bitsandbytes.quantize_4bit(linear.weight.detach(), BLOCK, code, torch.uint8)
        self.register_buffer("weight", weight)
        self.register_buffer("absmax", absmax.float())
        self.bias = bias_of(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., K] in any floating dtype; return [..., N] in the same."""
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weight [N, K] in `dtype`, by default the one it came in."""
        shape = (self.out_features, self.in_features)
        found: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight, self.absmax, BLOCK, self.code, shape, dtype or self.dtype
        )
        return found

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.code}"


def _int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 values [M, K] and the largest magnitude of each row, float32 [M].

    As ``bitsandbytes.functional.int8_vectorwise_quant``, which takes float16 only: bfloat16 activations beyond 65504
    would overflow there.
    """
    absmax = x.abs().amax(dim=1).float()
    scaled = x.float() * (127 / absmax.clamp(min=1e-30))[:, None]  # finite also for a row of zeros
    return scaled.round().to(torch.int8), absmax
