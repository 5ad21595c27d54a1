"""Add LoRAs beside quantized layers that PEFT does not know: meanwhile it sees plain layers in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import nn

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.peft_layers import config_problems, layer_problem, unchanged_if_it_fails
from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.kernels.low_rank import LowRankProduct
from ernie_accel.quantization.layers import RECEIPT, holder_of
from ernie_accel.quantization.merging import bind_merging

#: What the names of an adapter's tensors show that reads the weight which it is added to.
_VARIANTS = {
    ".lora_magnitude_vector": "DoRA",
    ".dora_scale": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
}
_BIAS = ".lora_B.bias"


class AddsBesideQuantized(StandInMethod):
    """A method of a model with quantized layers that adds an adapter: beside the product, whatever the backend."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Add an adapter.

        Raises:
            ErnieAccelError: It is no plain LoRA, and the backend's layers take no other; nothing was changed.
        """
        model = cast(nn.Module, self.owner)
        given = (*args, *kwargs.values())
        tensors = next((each for each in given if isinstance(each, Mapping)), {})
        problems = variant_problems(model, tensors)
        with unchanged_if_it_fails(model), shown_as_plain(model) as shown:
            if shown and self.name == "add_adapter":
                configs = [each for each in given if hasattr(each, "peft_type")]
                problems += [problem for config in configs for problem in config_problems(config)]
            if problems:
                raise self._refusal(problems)
            result = self.call_inner(*args, **kwargs)
            for path, layer in model.named_modules():
                view = layer._modules.get("base_layer")
                if isinstance(view, PlainView) and (problem := layer_problem(layer)) is not None:
                    raise self._refusal([f"{path}: {problem}"])
        bind_merging(model)
        return result

    def _refusal(self, problems: list[str]) -> ErnieAccelError:
        text = "\n".join(f"  - {problem}" for problem in problems)
        return ErnieAccelError(f"{self.name}: cannot load this adapter; nothing was changed.\n{text}")


def variant_problems(model: nn.Module, tensors: Mapping[str, object]) -> list[str]:
    """Return what an adapter has that the quantized layers of `model` do not take; empty if nothing."""
    backends = {holder for part in model.modules() if (holder := holder_of(part)) is not None}
    problems = []
    for mark, kind in _VARIANTS.items():
        names = [name for name in tensors if mark in name]
        unable = sorted(backend.name for backend in backends if not backend.takes_variants)
        if names and unable:
            problems.append(
                f"it is a {kind} ({len(names)} tensors such as {names[0]}), which reads the weights; layers of "
                f"{', '.join(unable)} take plain LoRAs only. Load it before quantizing, or quantize with torchao"
            )
    names = [name for name in tensors if name.endswith(_BIAS)]
    unable = sorted(backend.name for backend in backends if not backend.takes_biases)
    if names and unable:
        problems.append(
            f"it has {len(names)} biases, such as {names[0]}; layers of {', '.join(unable)} take plain LoRAs only. "
            "Load it before quantizing"
        )
    return problems


class PlainView(nn.Linear):
    """A quantized layer as PEFT sees it: shape, dtype and device, and no weight that takes memory or means anything."""

    def __init__(self, layer: nn.Module, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Stand for `layer` [N, K]."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = size
        self.weight = nn.Parameter(torch.empty(1, 1, dtype=dtype, device=device).expand(size), requires_grad=False)
        self.register_parameter("bias", None)
        self.of = (layer,)  # a tuple: torch must not see it
        self.training = layer.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer gives, for another thread that draws meanwhile."""
        out: torch.Tensor = self.of[0](x)
        return out


@contextlib.contextmanager
def shown_as_plain(model: nn.Module) -> Iterator[list[PlainView]]:
    """Put a `PlainView` in the place of each layer whose backend PEFT does not know, for the length of the with-block.

    Layers that are fused into one are left out: rewritten blocks show those.
    """
    views: list[PlainView] = []
    try:
        for parent in list(model.modules()):
            if isinstance(parent, LowRankProduct):
                continue
            for name, child in parent._modules.items():
                if child is not None and name != getattr(parent, "fused_name", None):
                    view = _view_of(child)
                    if view is not None:
                        parent._modules[name] = view
                        views.append(view)
        yield views
    finally:
        if views:
            for parent in model.modules():
                for name, child in parent._modules.items():
                    if isinstance(child, PlainView):
                        parent._modules[name] = child.of[0]


def _view_of(layer: nn.Module) -> PlainView | None:
    """Return what PEFT is shown instead of a layer; None if it knows such layers, or it cannot be said what this is."""
    holder = holder_of(layer)
    if holder is None or holder.takes_loras:
        return None
    receipt = RECEIPT.of(layer)
    held = next(iter((*layer.parameters(), *layer.buffers())), None)
    if held is None:
        return None
    if receipt is not None:
        return PlainView(layer, receipt.shape, getattr(torch, receipt.dtype), held.device)
    rows, columns = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    return PlainView(layer, (rows, columns), getattr(layer, "dtype", torch.float32), held.device)
