"""GGUF: llama.cpp's block formats, encoded in memory, in the linear layer that diffusers uses for GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, final

import torch

from ernie_accel.quantization.backend import LinearSpec, QuantizationBackend, bias_of, defined_in

#: Values per block; and bytes per block of each scheme, its float16 scale included (ggml-common.h).
BLOCK = 32
BLOCK_BYTES = MappingProxyType({"gguf-q8_0": 34, "gguf-q5_0": 22, "gguf-q4_0": 18})


@final
class Gguf(QuantizationBackend):
    """Encode with the ``gguf`` package (it has no encoder for K-quants) and multiply in the pipe's dtype."""

    name: ClassVar[str] = "gguf"
    package: ClassVar[str | None] = "gguf"
    takes_loras: ClassVar[bool] = True
    takes_biases: ClassVar[bool] = True
    schemes: ClassVar[Mapping[str, tuple[int, int]]] = MappingProxyType(dict.fromkeys(BLOCK_BYTES, (0, 0)))
    devices: ClassVar[tuple[str, ...]] = ("cuda", "cpu", "npu", "mps", "xpu")

    def layer_problem(self, scheme: str, spec: LinearSpec) -> str | None:
        return spec.not_multiple_of(BLOCK)

    def stored_bytes(self, scheme: str, spec: LinearSpec) -> int:
        return spec.numel // BLOCK * BLOCK_BYTES[scheme] + spec.bias_bytes

    def quantize(self, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
        import gguf

        weight = linear.weight.detach()
        blocks = gguf.quants.quantize(weight.float().cpu().numpy(), _code(scheme))
        return _layer(torch.from_numpy(blocks).to(weight.device), scheme, linear)

    def blank(self, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
        row_bytes = linear.in_features // BLOCK * BLOCK_BYTES[scheme]
        blocks = torch.empty(linear.out_features, row_bytes, dtype=torch.uint8, device=linear.weight.device)
        return _layer(blocks, scheme, linear)

    def dequantize(self, layer: torch.nn.Module) -> torch.Tensor:
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        found: torch.Tensor = dequantize_gguf_tensor(layer.weight)
        return found

    def tensors(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {"blocks": layer.weight.as_tensor()}  # type: ignore[operator, union-attr]

    def holds(self, layer: torch.nn.Module) -> bool:
        return any(cls.__name__ == "GGUFLinear" for cls in type(layer).__mro__) and defined_in(layer, "diffusers")


def _code(scheme: str) -> object:
    import gguf

    return gguf.GGMLQuantizationType[scheme.removeprefix("gguf-").upper()]


def _layer(blocks: torch.Tensor, scheme: str, linear: torch.nn.Linear) -> torch.nn.Module:
    """Return diffusers' layer around encoded blocks, uint8 [N, K / 32 * bytes a block]."""
    from diffusers.quantizers.gguf.utils import GGUFParameter

    from ernie_accel.quantization.gguf_linear import CopyableGGUFLinear

    layer: torch.nn.Linear = CopyableGGUFLinear(
        linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, device="meta"
    )
    layer.weight = GGUFParameter(blocks, quant_type=_code(scheme))
    layer.register_parameter("bias", bias_of(linear))
    return layer.train(linear.training)
