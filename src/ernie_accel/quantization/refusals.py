"""Refuse what stock tools do to quantized layers and get wrong: saving them, merging a LoRA, loading plain weights.

Each would fail halfway with the pipe changed, or write a checkpoint that reloads as noise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ernie_accel.core.components import Pipeline, modules_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import Bound, StandInMethod
from ernie_accel.core.undo import Undo
from ernie_accel.quantization.correction import is_corrected
from ernie_accel.quantization.layers import holder_of, quantized_as


def refuse_saving(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make ``save_pretrained`` of the pipe and of these components raise, on the instances, in place."""
    for owner in (pipe, *modules_of(pipe, components).values()):
        if hasattr(owner, "save_pretrained"):
            undo.setattr(owner, "save_pretrained", Bound(_refuse_saving, owner))


def refuse_loras(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make components whose layers cannot take a LoRA refuse one, and all of them refuse to merge one, in place."""
    for name, module in modules_of(pipe, components).items():
        backends = {holder for part in module.modules() if (holder := holder_of(part)) is not None}
        # Pipelines that widen a LoRA's layers to those of the model look for these weights by name, as FLUX.1's does.
        expands = name == "transformer" and hasattr(pipe, "_maybe_expand_lora_state_dict")
        if expands and not all(backend.takes_loras and backend.keeps_names for backend in backends):
            undo.setattr(pipe, "load_lora_weights", Bound(_refuse_lora, pipe))
        methods: dict[str, Any] = {"fuse_lora": _refuse_merging, "unfuse_lora": _refuse_merging}
        if not all(backend.takes_loras for backend in backends):
            methods |= {"load_lora_adapter": _refuse_lora, "load_adapter": _refuse_lora, "add_adapter": _refuse_lora}
        for method_name, method in methods.items():
            if hasattr(module, method_name):
                undo.setattr(module, method_name, Bound(method, module))


def refuse_other_weights(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make ``load_state_dict`` of these components refuse weights that its quantized layers cannot hold, in place."""
    for module in modules_of(pipe, components).values():
        undo.setattr(module, "load_state_dict", _LoadStateDict(module, "load_state_dict"))
        backends = {holder for part in module.modules() if (holder := holder_of(part)) is not None}
        corrected = any(map(is_corrected, module.modules()))
        cannot_be_cast = corrected or not all(backend.keeps_names for backend in backends)
        if cannot_be_cast and hasattr(module, "enable_layerwise_casting"):
            why = "have a correction" if corrected else "are quanto's"
            undo.setattr(module, "enable_layerwise_casting", Bound(functools.partial(_refuse_layerwise, why), module))


class _LoadStateDict(StandInMethod):
    """`load_state_dict`, for weights that are quantized in the same way: torch would load the others, then raise."""

    def __call__(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False, **kwargs: Any
    ) -> Any:
        """Load weights.

        Raises:
            ErnieAccelError: Those of a quantized layer are not quantized as it is; nothing has been loaded.
        """
        owner: Any = self.owner
        for path, layer in owner.named_modules():
            if quantized_as(layer) is not None and not _can_hold(layer, path, state_dict, assign):
                raise ErnieAccelError(
                    f"{type(owner).__name__}.load_state_dict: {path} is quantized ({quantized_as(layer)}), and these "
                    "weights are not stored so. Call ernie_accel.restore(pipe), load them, then optimize again"
                )
        return self.call_below(state_dict, strict=strict, assign=assign, **kwargs)


def _can_hold(layer: torch.nn.Module, path: str, state: Mapping[str, torch.Tensor], assign: bool) -> bool:
    """Return whether what `state` has for a quantized layer can become its content."""
    parent = path.rpartition(".")[0]
    parts = [f"{parent}.{name}" if parent else name for name in getattr(layer, "part_names", ())]
    if any(key.startswith(tuple(f"{part}." for part in parts)) for key in state) and not assign:
        return False
    own = layer.state_dict(prefix=f"{path}.")
    given = {key: value for key, value in state.items() if key.startswith(f"{path}.")}
    if not given:
        return True  # some other part is loaded; or too little, which torch says
    if own.keys() != given.keys():
        return False
    if assign and type(layer) is torch.nn.Linear:
        return True  # a plain weight makes a plain layer of it
    return all(type(_plain(own[k])) is type(_plain(given[k])) and own[k].shape == given[k].shape for k in own)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data if type(tensor) is torch.nn.Parameter else tensor


def _refuse_saving(self: object, *args: object, **kwargs: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}.save_pretrained: its weights are quantized, and what that writes cannot be loaded, or "
        "loads as noise. Save the pipe with ernie_accel.save(pipe, folder), which ernie_accel.load reads; for a stock "
        "checkpoint, ernie_accel.restore(pipe) first."
    )


def _refuse_layerwise(why: str, self: object, *args: object, **kwargs: object) -> None:
    fix = "" if why == "have a correction" else ", or quantize with torchao"
    raise ErnieAccelError(
        f"{type(self).__name__}.enable_layerwise_casting: some of its layers {why}, which cannot be cast. Call "
        f"ernie_accel.restore(pipe) first{fix}"
    )


def _refuse_lora(self: object, *args: object, **kwargs: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}: cannot load a LoRA, because diffusers cannot add one to its quantized layers. "
        "Load the LoRA before quantizing: ernie_accel.restore(pipe), load it, then optimize again; or quantize with "
        "torchao or gguf, which take one afterwards."
    )


def _refuse_merging(self: object, *args: object, **kwargs: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}: cannot merge a LoRA into quantized weights, or take it out of them. Call "
        "ernie_accel.restore(pipe), load and merge it (pipe.fuse_lora()), then optimize again. Unmerged, it works."
    )
