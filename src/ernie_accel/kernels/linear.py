"""A linear layer with an fp8 weight that takes rows quantized by the kernel before it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ernie_accel.kernels import ops, reference


class Fp8Rows(NamedTuple):
    """Rows [..., K] in float8_e4m3fn and their float32 scales [rows, 1]."""

    values: Tensor
    scale: Tensor


class Fp8Linear(nn.Module):
    """``x @ weight.T`` with float8 operands, one scale per row on both sides, bfloat16 out. No bias."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight_nk: Tensor) -> None:
        """Quantize `weight_nk` [N, K], rounded to the nearest float8."""
        super().__init__()
        values, scale = reference.quantize_rows(weight_nk.detach())
        self.in_features, self.out_features = weight_nk.shape[1], weight_nk.shape[0]
        self.register_buffer("weight", values)  # no parameters: nothing here can be trained
        self.register_buffer("weight_scale", scale.view(1, -1))

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """Return the product [..., N] in bfloat16; a plain tensor is quantized first."""
        rows = x if isinstance(x, Fp8Rows) else Fp8Rows(*ops.quantize_rows(x))
        out: Tensor = ops.linear_fp8(rows.values, rows.scale, self.weight, self.weight_scale)
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
