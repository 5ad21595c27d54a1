"""The interface of a quantization backend: what it supports, quantize, dequantize, and which tensors to save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from ernie_accel.common.language import listed, said
from ernie_accel.core.context import Context


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and what accuracy is promised. Tests check the promises.

    Attributes:
        name: Name of the scheme.
        bits: Bits of a stored value, not counting scales.
        summary: What it stores and how it multiplies.
        weight_db: Promised SQNR of a weight in dB, for a matrix of normally distributed values.
        floor_db: Promised SQNR of the final latents in dB against the unquantized pipe, same seeds, 8 steps, captions
            that leave nothing open; tested on the embedded model with 2 dB to spare. Formats that no CPU can
            multiply ("fp8", "nvfp4", "mxfp8") are emulated with their own arithmetic.
    """

    name: str
    bits: int
    summary: str
    weight_db: float
    floor_db: float


_schemes: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", 8, "e4m3 weights x e4m3 activations, a scale per row, scaled at run time", 30, 28),
        Scheme("fp8-weight-only", 8, "e4m3 weights, multiplied in the pipe's dtype", 28, 30),
        Scheme("int8", 8, "int8 weights x int8 activations, a scale per row, scaled at run time", 36, 34),
        Scheme("int8-weight-only", 8, "int8 weights with a scale per row, multiplied in the pipe's dtype", 36, 38),
        Scheme("int4", 4, "4-bit integers in groups, multiplied in the pipe's dtype", 17, 18),
        Scheme("nf4", 4, "4-bit NormalFloat in blocks of 64 (QLoRA, arXiv 2305.14314)", 18, 19),
        Scheme("fp4", 4, "4-bit floats (bitsandbytes' own code) in blocks of 64", 16, 16),
        Scheme("nvfp4", 4, "e2m1 weights x e2m1 activations, an e4m3 scale per 16 values", 18, 16),
        Scheme("mxfp8", 8, "e4m3 weights x e4m3 activations, a power-of-two scale per 32 values (OCP MX)", 28, 27),
        Scheme("gguf-q8_0", 8, "llama.cpp's Q8_0: int8 in blocks of 32 with a float16 scale", 40, 40),
        Scheme("gguf-q5_0", 5, "llama.cpp's Q5_0: 5 bits in blocks of 32 with a float16 scale", 24, 26),
        Scheme("gguf-q4_0", 4, "llama.cpp's Q4_0: 4 bits in blocks of 32 with a float16 scale", 18, 19),
    )
}
#: How weights can be stored, by name.
SCHEMES: Mapping[str, Scheme] = MappingProxyType(_schemes)


def add_scheme(scheme: Scheme) -> None:
    """Add a scheme to `SCHEMES`; see ``register_quantization_backend``, which checks it."""
    _schemes[scheme.name] = scheme


@dataclass(frozen=True)
class LinearSpec:
    """What is known of a linear layer before it is touched.

    Attributes:
        out_features: Rows N of the weight [N, K].
        in_features: Columns K.
        dtype: Of the weight at the time of quantizing.
        bias_bytes: Bytes of the bias at that time; 0 if there is none.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    bias_bytes: int = 0

    @property
    def numel(self) -> int:
        """Weights of the layer, N x K."""
        return self.out_features * self.in_features

    def not_multiple_of(self, inputs: int, outputs: int = 1) -> str | None:
        """Return why the shape does not fit if K is not a multiple of `inputs` or N none of `outputs`; else None."""
        if self.in_features % inputs:
            return said(
                "its {in_features} inputs are not a multiple of {inputs}", in_features=self.in_features, inputs=inputs
            )
        if self.out_features % outputs:
            return said(
                "its {out_features} outputs are not a multiple of {outputs}",
                out_features=self.out_features,
                outputs=outputs,
            )
        return None


class QuantizationBackend(ABC):
    """One quantization library, behind four groups of methods. Concrete classes are final and carry no state.

    1. `unsupported`, `layer_problem`, `stored_bytes`: what it can do here, what it cannot and why, and the sizes.
    2. `quantize`: make the layer that replaces a linear layer.
    3. `dequantize`: return the weight that such a layer holds.
    4. `tensors`: the tensors that hold its content. They are saved, and a reload copies them into a blank layer of the
       same scheme and shape. So no backend needs a file format of its own, and none reads one.

    Class-level facts:
        name: As in ``Quantize(backend=...)``.
        package: What it imports; None if diffusers itself does the work.
        schemes: The names of its schemes, each with the lowest CUDA compute capability it runs on; (0, 0) is any
            device of `devices`.
        devices: torch device types it runs on.
        takes_loras: Whether PEFT can add a LoRA to its layers as they are; where not, it is shown plain ones meanwhile.
        takes_variants: Whether PEFT can also add what reads the weight, such as DoRA and LoKr; else that is refused.
        takes_biases: Whether it can add a LoRA with a bias.
        keeps_names: Whether a layer's weight is under "weight" in a state dict, with the shape of the plain one.
        takes_correction: Whether its layers can be made instances of a subclass, which adds a low-rank product
            (``Quantize(correction_rank=...)``); `holds` must know those, too. Not where something replaces the layer's
            forward, or casts its tensors.
    """

    name: ClassVar[str]
    package: ClassVar[str | None]
    schemes: ClassVar[Mapping[str, tuple[int, int]]]
    devices: ClassVar[tuple[str, ...]] = ("cuda", "cpu")
    takes_loras: ClassVar[bool] = False
    takes_variants: ClassVar[bool] = False
    takes_biases: ClassVar[bool] = False
    keeps_names: ClassVar[bool] = True
    takes_correction: ClassVar[bool] = True

    def unsupported(self, scheme: str, context: Context) -> list[str]:
        """Return every reason why `scheme` cannot run on this machine; empty if it can."""
        if scheme not in self.schemes:
            return [
                said(
                    "{name} has no {scheme}; it has {schemes}",
                    name=self.name,
                    scheme=scheme,
                    schemes=", ".join(self.schemes),
                )
            ]
        reasons = context.missing_capability(scheme, self.schemes[scheme])
        if not reasons and context.device not in self.devices:
            reasons.append(
                said(
                    "{name} runs on {devices}, not on {device}",
                    name=self.name,
                    devices=listed(self.devices),
                    device=context.device,
                )
            )
        return reasons + (context.missing(self.package) if self.package else [])

    @abstractmethod
    def layer_problem(self, scheme: str, spec: LinearSpec) -> str | None:
        """Return why a layer of this shape and dtype cannot be stored in `scheme`, or None."""

    @abstractmethod
    def stored_bytes(self, scheme: str, spec: LinearSpec) -> int:
        """Return the bytes the layer will occupy, scales and bias included."""

    @abstractmethod
    def quantize(self, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return the layer that replaces `linear`, on its device; `linear` is not changed."""

    def blank(self, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return a blank quantized layer of `linear`'s shape, dtype and device, for content to be copied in."""
        return self.quantize(scheme, linear)

    @abstractmethod
    def dequantize(self, layer: torch.nn.Module) -> torch.Tensor:
        """Return the weight [N, K] that a layer of this backend holds, in a floating dtype."""

    @abstractmethod
    def tensors(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that are the layer's content, live, by a name that stays the same between versions."""

    @abstractmethod
    def holds(self, layer: torch.nn.Module) -> bool:
        """Return whether `layer` was quantized with this library, by anyone; imports nothing."""

    def remark(self, scheme: str, device: str) -> str:
        """Return a note for the plan about `scheme` on this torch device type; "" for none."""
        return ""

    def breaks_graph(self, scheme: str, dtype: torch.dtype) -> str | None:
        """Return why ``torch.compile(fullgraph=True)`` cannot trace its layers, or None."""
        return None


def plain_copy(linear: torch.nn.Linear, weight: torch.Tensor) -> torch.nn.Linear:
    """Return a fresh ``nn.Linear`` with this weight [N, K] and a copy of the bias; nothing is shared or initialised."""
    copy = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    copy.weight = torch.nn.Parameter(weight, requires_grad=False)
    copy.register_parameter("bias", bias_of(linear))
    copy.training = linear.training
    return copy


def bias_of(linear: torch.nn.Linear) -> torch.nn.Parameter | None:
    """Return a copy of the bias [N], or None."""
    return None if linear.bias is None else torch.nn.Parameter(linear.bias.detach().clone(), requires_grad=False)


def fix_empty_rows(values: torch.Tensor, scale: torch.Tensor) -> None:
    """Restore rows of zeros in place: scaled by their largest magnitude, they became 0 / 0, which is NaN.

    Args:
        values: float8 [N, K].
        scale: One per row [N, 1]; 0 where the row was empty.
    """
    empty = scale == 0
    values.view(torch.uint8).masked_fill_(empty, 0)
    scale.masked_fill_(empty, 1)


def defined_in(obj: object, package: str) -> bool:
    """Return whether the class of `obj`, or one it derives from, comes from `package`; imports nothing."""
    return any(cls.__module__.split(".")[0] == package.split(".")[0] for cls in type(obj).__mro__)
