"""A linear layer with an fp8 weight that takes rows quantized by the kernel before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ernie_accel.kernels import ops, reference


class Fp8Rows(NamedTuple):
    """Rows [..., K] in float8_e4m3fn and their float32 scales [rows, 1]."""

    values: Tensor
    scale: Tensor


class Kept:
    """A weight that waits in host memory; nobody writes into it, so copies of a module share it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __deepcopy__(self, memo: object) -> Kept:
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()  # a pickle would be twice as large


def _nothing() -> None:
    """Stand for a kept weight in a pickle."""


class Fp8Linear(nn.Module):
    """``x @ weight.T`` with float8 operands, one scale per row on both sides, bfloat16 out. No bias.

    Attributes:
        kept: The weight before it was quantized; None if it is gone. A pickle is without it.
    """

    weight: Tensor
    weight_scale: Tensor
    kept: Kept | None

    def __init__(self, weight_nk: Tensor) -> None:
        """Quantize `weight_nk` [N, K], rounded to the nearest float8."""
        super().__init__()
        if weight_nk.is_meta:  # of a model without weights: torch takes a millisecond and more to compute nothing
            values = weight_nk.new_empty(weight_nk.shape, dtype=torch.float8_e4m3fn)
            scale = weight_nk.new_empty(len(weight_nk), dtype=torch.float32)
        else:
            values, scale = reference.quantize_rows(weight_nk.detach())
        self.in_features, self.out_features = weight_nk.shape[1], weight_nk.shape[0]
        self.register_buffer("weight", values)  # no parameters: nothing here can be trained
        self.register_buffer("weight_scale", scale.view(1, -1))
        self.kept = None

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """Return the product [..., N] in bfloat16; a plain tensor is quantized first."""
        rows = x if isinstance(x, Fp8Rows) else Fp8Rows(*ops.quantize_rows(x))
        out: Tensor = ops.linear_fp8(rows.values, rows.scale, self.weight, self.weight_scale)
        return out

    def gated(self, x: Tensor | Fp8Rows, spare: int, *, silu: bool) -> Fp8Rows:
        """Return the second half of the product [..., N / 2], gated by the first; see `ops.gated_linear_fp8`."""
        rows = x if isinstance(x, Fp8Rows) else Fp8Rows(*ops.quantize_rows(x))
        return Fp8Rows(*ops.gated_linear_fp8(*rows, self.weight, self.weight_scale, silu, spare))

    def requantize(self, start: int, weight_nk: Tensor) -> None:
        """Give output features from `start` on another weight, in the same memory, and keep it in place of theirs.

        Raises:
            RuntimeError: No weight was kept.
        """
        if self.kept is None:
            raise RuntimeError("the weight before it was quantized is gone")
        end = start + len(weight_nk)
        values, scale = reference.quantize_rows(weight_nk)
        self.weight.view(torch.uint8)[start:end].copy_(values.view(torch.uint8))
        self.weight_scale[:, start:end].copy_(scale.view(1, -1))
        kept = self.kept.weight.clone()
        kept[start:end] = weight_nk.to(kept)
        self.kept = Kept(kept)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    # A pickle of a float8 tensor cannot be loaded (torch 2.13), so it travels as bytes.

    def __getstate__(self) -> dict[str, object]:
        if self.weight.dtype != torch.float8_e4m3fn:
            return dict(vars(self))
        return {**vars(self), "_buffers": {**self._buffers, "weight": self.weight.view(torch.uint8)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight = state["_buffers"]["weight"]
        if weight.dtype == torch.uint8:
            state = {**state, "_buffers": {**state["_buffers"], "weight": weight.view(torch.float8_e4m3fn)}}
        super().__setstate__(state)  # type: ignore[no-untyped-call]
