"""What a quantization backend must answer: what it can do here, and how to store one linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ernie_accel.core.context import Context


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and what its matrix product needs.

    Attributes:
        name: Name of the scheme.
        bytes_per_weight: Bytes for one weight, without scales.
        min_capability: Lowest CUDA compute capability that multiplies in it; None: any device.
        floor_db: Promised SQNR of the final latents in dB against the unquantized pipe, same seed.
    """

    name: str
    bytes_per_weight: float
    min_capability: tuple[int, int] | None
    floor_db: float


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", 1, (8, 9), 10.0),
        Scheme("fp8-weight-only", 1, None, 10.0),
        Scheme("int8", 1, (8, 0), 10.0),
        Scheme("int8-weight-only", 1, None, 10.0),
    )
}


class Backend(ABC):
    """One quantization library."""

    name: ClassVar[str]
    package: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def layer_problem(self, scheme: Scheme, linear: torch.nn.Linear) -> str | None:
        """Return why `linear` cannot be stored in `scheme`, or None."""

    @abstractmethod
    def quantize(self, scheme: Scheme, linear: torch.nn.Linear) -> None:
        """Replace the weight of `linear` in place; `linear` itself and its bias stay."""

    def unsupported(self, scheme: Scheme, context: Context) -> list[str]:
        """Return every reason why `scheme` cannot run on this machine."""
        reasons = []
        if scheme.min_capability is not None and (context.capability or (0, 0)) < scheme.min_capability:
            need = "{}.{}".format(*scheme.min_capability)
            have = "{}.{}".format(*context.capability) if context.capability else f"no CUDA ({context.device})"
            reasons.append(f"{scheme.name} needs CUDA compute capability >= {need}; this device has {have}")
        return reasons + context.missing(self.package)
