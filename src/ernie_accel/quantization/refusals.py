"""Refuse what stock tools do to quantized layers and get wrong: saving them, unmerging LoRAs, loading plain weights.

Each would fail halfway with the pipe changed, or write a checkpoint that reloads as noise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import cast

import torch

from ernie_accel.core.components import Pipeline, is_float8, modules_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import Bound, StandInMethod
from ernie_accel.core.undo import Undo
from ernie_accel.kernels.linear import Fp8Linear
from ernie_accel.kernels.low_rank import LowRankProduct, site_of
from ernie_accel.quantization.correction import is_corrected
from ernie_accel.quantization.layers import holder_of, quantized_as
from ernie_accel.quantization.merging import MergesQuantized, adapted, bind_merging, stuck_reason, unbind_merging
from ernie_accel.quantization.shown_plain import AddsBesideQuantized


def refuse_saving(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make ``save_pretrained`` of the pipe and of these components raise, on the instances, in place."""
    for owner in (pipe, *modules_of(pipe, components).values()):
        if hasattr(owner, "save_pretrained"):
            undo.setattr(owner, "save_pretrained", Bound(_refuse_saving, owner))


def refuse_loras(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make components add LoRAs beside their quantized layers, and merge them into the originals, in place."""
    for name, module in modules_of(pipe, components).items():
        backends = {holder for part in module.modules() if (holder := holder_of(part)) is not None}
        # Pipelines that widen a LoRA's layers to those of the model look for these weights by name, as FLUX.1's does.
        expands = name == "transformer" and hasattr(pipe, "_maybe_expand_lora_state_dict")
        if expands and not all(backend.takes_loras and backend.keeps_names for backend in backends):
            undo.setattr(pipe, "load_lora_weights", Bound(_refuse_lora, pipe))
        for method_name in ("load_lora_adapter", "load_adapter", "add_adapter"):
            if backends and hasattr(module, method_name):
                undo.setattr(module, method_name, AddsBesideQuantized(module, method_name))
        if backends and hasattr(module, "fuse_lora"):
            undo.setattr(module, "fuse_lora", MergesQuantized(module, "fuse_lora"))
        bind_merging(module)
    refuse_unmerging(pipe, components, undo)
    for module in modules_of(pipe, components).values():
        undo.push(functools.partial(unbind_merging, module))


def refuse_unmerging(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make the pipe and these components refuse to take a merged LoRA out of quantized weights, in place."""
    modules = modules_of(pipe, components)
    owners: list[object] = [pipe, *modules.values()]
    for owner in owners:
        for name in _UNMERGING:
            if hasattr(owner, name):
                undo.setattr(owner, name, _Unmerging(owner, name))
    for module in modules.values():  # another pipe that shares it asks the layers, one after the other
        if any(map(_stuck_in, module.modules())):
            for layer in module.modules():
                if "base_layer" in layer._modules and getattr(layer, "merged_adapters", None):
                    undo.setattr(layer, "unmerge", _UnmergingLayer(layer, module))


#: What takes merged LoRAs out of the weights: at once, or PEFT's layers at the next call, where all are disabled.
_UNMERGING = ("unfuse_lora", "disable_lora", "disable_adapters")


class _Unmerging(StandInMethod):
    """A method that makes PEFT take merged LoRAs out of the weights, layer by layer, up to the first that cannot."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Do it.

        Raises:
            ErnieAccelError: A LoRA is merged into a weight that is quantized by now; nothing was changed.
        """
        for owner in self._modules(*args, **kwargs):
            for path, layer in owner.named_modules():
                why = _stuck_in(layer)
                if why is not None:
                    raise ErnieAccelError(
                        f"{type(self.owner).__name__}.{self.name}: a LoRA is merged into {path}, and {why}, so it "
                        "cannot be taken out again; nothing was changed. Call ernie_accel.restore(pipe) first, where "
                        "the originals are kept; else load the pipe again"
                    )
        return self.call_inner(*args, **kwargs)

    def _modules(self, *args: object, **kwargs: object) -> list[torch.nn.Module]:
        if isinstance(self.owner, torch.nn.Module):
            return [self.owner]
        pipe = cast(Pipeline, self.owner)
        given = (args[0] if args else kwargs.get("components")) if self.name == "unfuse_lora" else None
        names = getattr(pipe, "_lora_loadable_modules", ()) if given is None else cast(Iterable[str], given)
        modules = modules_of(pipe)
        return [modules[name] for name in names if name in modules]


class _UnmergingLayer(_Unmerging):
    """`unmerge` of PEFT's layer, which asks all layers of its model first."""

    def __init__(self, layer: torch.nn.Module, model: torch.nn.Module) -> None:
        super().__init__(layer, "unmerge")
        self._model = model

    def _modules(self, *args: object, **kwargs: object) -> list[torch.nn.Module]:
        return [self._model]


def _stuck_in(layer: torch.nn.Module) -> str | None:
    """Return why what PEFT's layer has merged cannot be taken out of the weight beneath it; None if it can."""
    base = layer._modules.get("base_layer")
    if base is None or not getattr(layer, "merged_adapters", None):
        return None
    found = adapted(layer)
    if found is not None:
        return stuck_reason(found)
    site = site_of(layer)
    return None if site is None else site.low_rank.unmergeable_reason


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
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False, **kwargs: object
    ) -> object:
        """Load weights.

        Raises:
            ErnieAccelError: Those of a quantized layer are not quantized as it is; nothing has been loaded.
        """
        owner = cast(torch.nn.Module, self.owner)
        paths = {module: path for path, module in owner.named_modules()}
        for layer, path in paths.items():
            is_fp8 = isinstance(layer, Fp8Linear)
            stored = "fp8 by fused kernels" if is_fp8 else quantized_as(layer)
            if stored is None:
                continue
            brings_parts = any(
                key in state_dict
                for part in _parts_at(owner, path, paths)
                for key in (f"{part}.weight", f"{part}.base_layer.weight")
            )
            makes_plain = assign and not is_fp8
            if (brings_parts and not makes_plain) or not _can_hold(layer, path, state_dict, assign=makes_plain):
                raise ErnieAccelError(
                    f"{type(owner).__name__}.load_state_dict: {path} is quantized ({stored}), and these weights are "
                    "not stored so. Call ernie_accel.restore(pipe), load them, then optimize again"
                )
        return self.call_inner(state_dict, strict=strict, assign=assign, **kwargs)


def _parts_at(model: torch.nn.Module, path: str, paths: Mapping[torch.nn.Module, str]) -> tuple[str, ...]:
    """Return the paths of the stock layers that the layer at `path` stands for: those fused into it, or its own.

    `paths` has those of all modules of the model: a LoRA's weights are loaded so, too, and to look for each anew would
    take half of that time.
    """
    parent, _, name = path.rpartition(".")
    above = model.get_submodule(parent)
    if isinstance(above, LowRankProduct):
        return tuple(f"{paths[place.owner]}.{place.name}" for place in above.places)
    if getattr(above, "fused_name", None) != name:
        return ()
    names: tuple[str, ...] = above.fusible  # type: ignore[assignment]
    return tuple(f"{parent}.{each}" for each in names)


def _can_hold(layer: torch.nn.Module, path: str, state: Mapping[str, torch.Tensor], *, assign: bool) -> bool:
    """Return whether what `state` has for a quantized layer can become its content."""
    own = layer.state_dict(prefix=f"{path}.")
    given = {key: value for key, value in state.items() if key.startswith(f"{path}.")}
    if not given:
        return True  # some other part is loaded; or too little, which torch says
    if own.keys() != given.keys():
        return False
    if assign and type(layer) is torch.nn.Linear:
        return True  # a plain weight makes a plain layer of it
    return all(_facts(own[key]) == _facts(given[key]) for key in own)


def _facts(tensor: torch.Tensor) -> tuple[object, ...]:
    plain = tensor.data if type(tensor) is torch.nn.Parameter else tensor
    return type(plain), plain.shape, is_float8(plain.dtype)


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
        f"{type(self).__name__}: cannot load a LoRA, because it fits one to its weights, and would not find those of "
        "its quantized layers. Load the LoRA before quantizing: ernie_accel.restore(pipe), load it, then optimize "
        "again; or quantize with torchao or gguf, which take one afterwards."
    )
