"""Correct quantized layers by a low-rank product in the layer's own dtype: the weight is what is stored plus up @ down.

The largest singular directions of a weight are taken out before it is quantized, so that scales and errors of the rest
shrink; the final product is then fitted to all that the quantized rest lacks (SVDQuant, arXiv 2411.05007; LoftQ, arXiv
2310.08659). It needs no calibration data and no method of a backend: `correct` works on a layer of any class.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.quantization.backend import LinearSpec, QuantizationBackend, plain_copy

#: Of the random range finder (Halko et al., arXiv 0909.4061): columns that it samples beyond the rank, and its passes.
OVERSAMPLING = 8
POWER_ITERATIONS = 2
_DOWN, _UP = "correction.down", "correction.up"


class Correction(nn.Module):
    """The product that a layer lacks.

    Attributes:
        down: [R, K].
        up: [N, R].
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K] in any floating dtype; return [..., N] in the same."""
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def product(self) -> Tensor:
        """Return up @ down, float32 [N, K]."""
        return self.up.data.float() @ self.down.data.float()

    def extra_repr(self) -> str:
        return f"rank={self.down.shape[0]}"


def _forward(self: Any, x: Tensor) -> Tensor:
    """Multiply x [..., K] by what is stored, and add the correction; return [..., N]."""
    out: Tensor = self.quantized_class.forward(self, x) + self.correction(x)
    return out


def _reduced(self: Any, protocol: object) -> tuple[Any, ...]:
    """Copy and pickle by the class it was made from: the class it has is in no module."""
    return (_new, (self.quantized_class,), *self.quantized_class.__reduce_ex__(self, protocol)[2:])


@functools.cache
def _corrected_class(quantized: Any) -> type[nn.Module]:
    """Return the class of corrected layers of one class: its only base, for an instance can become one of it.

    So whoever knows the class of a backend's layers knows them still. And what reads the weight of a plain
    ``nn.Linear`` by itself asks for exactly that class, and does not overlook the correction.
    """
    own = {"forward": _forward, "__reduce_ex__": _reduced, "quantized_class": quantized, "__doc__": quantized.__doc__}
    made: type[nn.Module] = types.new_class(f"Corrected{quantized.__name__}", (quantized,), {}, lambda d: d.update(own))
    return made


def _new(quantized: Any) -> nn.Module:
    made: nn.Module = object.__new__(_corrected_class(quantized))
    return made


def is_corrected(layer: nn.Module) -> bool:
    """Return whether a layer has a correction."""
    return isinstance(layer._modules.get("correction"), Correction)


def correct(layer: nn.Module, down: Tensor, up: Tensor) -> None:
    """Let a quantized layer add ``up @ down`` to its weight, in place.

    Args:
        layer: A layer of any backend.
        down: [R, K].
        up: [N, R].

    Raises:
        TypeError: The layer has a forward of its own, which the correction would not reach.
    """
    if "forward" in vars(layer):
        raise TypeError(f"a {type(layer).__name__} whose forward was replaced cannot be corrected")
    quantized: Any = type(layer)
    layer.correction = Correction(down, up)
    layer.__class__ = _corrected_class(quantized)


def correction_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer's correction, live, by name within the layer; empty if it has none."""
    correction = layer._modules.get("correction")
    return {_DOWN: correction.down.data, _UP: correction.up.data} if isinstance(correction, Correction) else {}


def correction_shapes(shape: tuple[int, int], rank: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of what `correction_of` returns, for a weight [N, K]; empty for rank 0."""
    return {_DOWN: (rank, shape[1]), _UP: (shape[0], rank)} if rank else {}


def correction_bytes(spec: LinearSpec, rank: int) -> int:
    """Return the bytes that a correction of this rank adds to a layer."""
    return rank * (spec.out_features + spec.in_features) * spec.dtype.itemsize


def largest_rank(spec: LinearSpec, stored_bytes: int) -> int:
    """Return the largest rank with which a layer still takes less than unquantized.

    Args:
        spec: The layer.
        stored_bytes: What it takes quantized, without a correction.
    """
    spare = spec.numel * spec.dtype.itemsize + spec.bias_bytes - stored_bytes - 1
    return max(0, spare // correction_bytes(spec, 1))


def quantize_corrected(backend: QuantizationBackend, scheme: str, linear: nn.Linear, rank: int) -> nn.Module:
    """Return the layer that replaces `linear`, with a correction of this rank; `linear` is not changed."""
    weight = linear.weight.detach()
    down, up = low_rank(weight.float(), rank)
    layer = backend.quantize(scheme, plain_copy(linear, (weight.float() - up @ down).to(weight.dtype)))
    down, up = low_rank(weight.float() - backend.dequantize(layer).float(), rank)
    correct(layer, down.to(weight.dtype), up.to(weight.dtype))
    return layer


def dequantized(backend: QuantizationBackend, layer: nn.Module) -> Tensor:
    """Return the weight [N, K] that a layer multiplies by, its correction included."""
    stored, correction = backend.dequantize(layer), layer._modules.get("correction")
    return stored.float() + correction.product() if isinstance(correction, Correction) else stored


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (down [R, K], up [N, R]) whose product is nearly the best approximation of this rank.

    By random projection with a generator of its own: the same for the same matrix, on any device up to rounding.

    Args:
        matrix: float32 [N, K].
        rank: R, at most N and K.

    Raises:
        ValueError: The matrix has values that are not finite.
    """
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    sample = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis = _orthonormal(matrix @ sample)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    within = basis.T @ matrix
    # Of this small matrix the left singular vectors; on the host, where it takes no time and is the same everywhere.
    gram = (within @ within.T).cpu().double()
    if not gram.isfinite().all():
        raise ValueError("its weight has values that are not finite")
    turn = torch.linalg.eigh(gram).eigenvectors[:, -rank:].to(matrix)
    return turn.T @ within, basis @ turn


def _orthonormal(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
