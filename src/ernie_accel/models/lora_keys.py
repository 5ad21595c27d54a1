"""The names that trainers and ComfyUI give a LoRA's tensors, as diffusers' names, where it lacks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ernie_accel.core.components import Pipeline, inside_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.models.adapters import fetched, layer_paths

#: Before the path of a layer, by trainer; kohya's and LyCORIS' write the path with underscores.
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "lora_transformer_", "lora_unet_", "lycoris_")
#: After it, and what diffusers has for it.
_HALVES = {
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_A.default.weight": "lora_A",
    ".lora_B.default.weight": "lora_B",
}
_ALPHA = ".alpha"


def is_foreign(weights: Mapping[str, Tensor]) -> bool:
    """Return whether these are names that diffusers does not know for every model."""
    marks = (".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".default.")
    starts = ("lora_", "lycoris_", "base_model.model.", "diffusion_model.")
    return any(key.startswith(starts) or key.endswith(_ALPHA) or _has(key, marks) for key in weights)


def _has(key: str, marks: tuple[str, ...]) -> bool:
    return any(mark in key for mark in marks)


def as_diffusers(weights: Mapping[str, Tensor], paths: list[str], prefix: str = "transformer") -> dict[str, Tensor]:
    """Return the tensors of a LoRA under diffusers' names, with ``alpha / rank`` in its second half.

    Args:
        weights: By any trainer's names; a layer that is not among `paths` keeps its name.
        paths: Of the layers of the transformer.
        prefix: Before each path.
    """
    by_underscores = {path.replace(".", "_"): path for path in paths}
    halves: dict[str, dict[str, Tensor]] = {}
    alphas, others = {}, {}
    for key, tensor in weights.items():
        name = key
        for start in _PREFIXES:
            name = name.removeprefix(start)
        ending = next((end for end in (*_HALVES, _ALPHA) if name.endswith(end)), None)
        if ending is None:
            others[key] = tensor
            continue
        base = name.removesuffix(ending)
        path = by_underscores.get(base.replace(".", "_"), base)
        if ending == _ALPHA:
            alphas[path] = float(tensor)
        else:
            halves.setdefault(path, {})[_HALVES[ending]] = tensor
    found = dict(others)
    for path, pair in halves.items():
        if path in alphas and "lora_A" in pair and "lora_B" in pair:
            up = pair["lora_B"]
            pair = {**pair, "lora_B": (up.float() * (alphas[path] / len(pair["lora_A"]))).to(up.dtype)}
        found |= {f"{prefix}.{path}.{half}.weight": tensor for half, tensor in pair.items()}
    return found


#: What trainers make besides LoRAs, by what is in the names of its tensors.
_OTHER_KINDS = {".lokr_": "LoKr", ".hada_": "LoHa", ".loha_": "LoHa", ".oft_": "OFT"}


class ReadsForeignKeys(StandInMethod):
    """`lora_state_dict` of a pipe, for names of kohya's trainers, of PEFT and of ComfyUI that diffusers has not."""

    def __call__(self, source: object, **kwargs: object) -> object:
        """Return the weights of a LoRA under diffusers' names, and its metadata if asked.

        Raises:
            ErnieAccelError: It is a DoRA, of which diffusers would drop a part and load the rest, or no LoRA at all.
        """
        wants_metadata = kwargs.pop("return_lora_metadata", False)
        may_be_pickled = kwargs.get("use_safetensors") is None  # if there are no safetensors, as diffusers has it
        if may_be_pickled:
            kwargs["use_safetensors"] = True
        weights, rest = fetched(source, kwargs, allow_pickle=may_be_pickled)
        metadata = rest.pop("metadata", None)
        self._check_kind(weights, "dora_scale", "DoRA", "of which diffusers would load only a part")
        made = self._read(weights, rest)
        return (made, metadata) if wants_metadata else made

    def _read(self, weights: Mapping[str, Tensor], rest: dict[str, object]) -> object:
        converted, paths = None, layer_paths(inside_of(cast(Pipeline, self.owner).transformer))
        is_bare = not any(key.startswith("transformer.") for key in weights)  # of PEFT's own, or of something else
        if is_bare or is_foreign(weights):
            with torch.no_grad():
                converted = as_diffusers(weights, paths)
            if _are_there(converted, paths):
                return self.call_inner(converted, return_lora_metadata=False, **rest)
        if not is_foreign(weights):
            converted = None
        has_halves = converted is not None and any(".lora_" in key for key in converted)
        try:  # names of the checkpoint's authors, for which diffusers may have a converter
            made = self.call_inner(dict(weights), return_lora_metadata=False, **rest)
        except (ValueError, LookupError):
            self._check_kinds(weights)
            if not has_halves:
                raise
            made = {}
        if converted is not None and has_halves and not _are_there(made, paths):
            return self.call_inner(converted, return_lora_metadata=False, **rest)
        if not any(key.startswith("transformer.") for key in made) or not _are_taken(made, type(self.owner)):
            self._check_kinds(weights)
        return made

    def _check_kinds(self, weights: Mapping[str, Tensor]) -> None:
        for mark, kind in _OTHER_KINDS.items():
            self._check_kind(weights, mark, kind, f"which {type(self.owner).__name__} does not load by these names")

    def _check_kind(self, weights: Mapping[str, Tensor], mark: str, kind: str, why: str) -> None:
        found = [key for key in weights if mark in key]
        if found:
            raise ErnieAccelError(
                f"{type(self.owner).__name__}.load_lora_weights: this is a {kind} ({len(found)} tensors such as "
                f"{found[0]}), {why}; nothing was changed. Merge it into a LoRA with its trainer's tools."
            )


class _NoPipe:
    """In the place of a pipe whose `load_lora_weights` is asked what it thinks of the names of some weights."""

    transformer = None
    transformer_name = "transformer"

    def __init__(self, weights: object) -> None:
        """Let these be what was read."""
        self._weights = weights

    def lora_state_dict(self, *_: object, **__: object) -> tuple[object, None]:
        """Return the weights, and no metadata."""
        return self._weights, None

    def load_lora_into_transformer(self, *_: object, **__: object) -> None:
        """Do nothing: the names were taken."""


def _are_taken(weights: object, kind: type) -> bool:
    """Return whether a class of pipelines loads weights of these names; some load LoKrs, some LoRAs alone."""
    try:
        kind.load_lora_weights(_NoPipe(weights), {})  # type: ignore[attr-defined]
    except ValueError:
        return False
    except (AttributeError, ImportError, KeyError, TypeError):  # it asks for more of a pipe, or says so when it loads
        return True
    return True


def _are_there(weights: Mapping[str, Tensor], paths: list[str], prefix: str = "transformer") -> bool:
    """Return whether these are tensors of LoRAs by diffusers' names, all for layers that are there."""
    start, there = f"{prefix}.", set(paths)
    layers = [name.removeprefix(start).partition(".lora_")[0] for name in weights if ".lora_" in name]
    return bool(layers) and len(layers) == len(weights) and there.issuperset(layers)
