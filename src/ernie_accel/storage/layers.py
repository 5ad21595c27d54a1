"""What saving and loading must both know about a pipe: its quantized layers, and which transforms rebuild modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ernie_accel.core.transform import LayerReceipt, Phase, Transform

if TYPE_CHECKING:
    from ernie_accel.quantization.backend import QuantizationBackend


def quantized_layers(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return the layers that carry a receipt, with their paths."""
    from ernie_accel.quantization.layers import RECEIPT

    return [(path, layer) for path, layer in module.named_modules() if RECEIPT.of(layer) is not None]


def receipt_of(layer: torch.nn.Module) -> LayerReceipt:
    """Return the receipt of one of `quantized_layers`."""
    from ernie_accel.quantization.layers import RECEIPT

    return RECEIPT.required(layer)


def content_of(backend: QuantizationBackend, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all that a quantized layer consists of, live: the backend's tensors, the bias and the correction."""
    from ernie_accel.quantization.correction import correction_of

    bias = getattr(layer, "bias", None)
    return backend.tensors(layer) | ({} if bias is None else {"bias": bias.data}) | correction_of(layer)


def repeats_rewriting(transform: Transform) -> bool:
    """Return whether a transform changes the module tree in a way that loading can repeat before there are weights."""
    from ernie_accel.transforms.denoiser.fuse_kernels import FuseKernels

    return transform.phase == Phase.REWRITE or isinstance(transform, FuseKernels)
