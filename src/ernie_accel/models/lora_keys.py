"""The names that trainers and ComfyUI give a LoRA's tensors, as diffusers' names, where it lacks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ernie_accel.core.components import Pipeline
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
    return any(key.startswith(("lora_", "lycoris_")) or key.endswith(_ALPHA) or _has(key, marks) for key in weights)


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


class ReadsForeignKeys(StandInMethod):
    """`lora_state_dict` of a pipe for whose model diffusers converts no names of kohya's trainers or of ComfyUI."""

    def __call__(self, source: object, **kwargs: object) -> object:
        """Return the weights of a LoRA under diffusers' names, and its metadata if asked.

        Raises:
            ErnieAccelError: It is a DoRA, of which diffusers would drop a part and load the rest.
        """
        wants_metadata = kwargs.pop("return_lora_metadata", False)
        weights, rest = fetched(source, kwargs, allow_pickle=kwargs.get("use_safetensors") is None)
        metadata = rest.pop("metadata", None)
        magnitudes = [key for key in weights if "dora_scale" in key]
        if magnitudes:
            raise ErnieAccelError(
                f"{type(self.owner).__name__}.load_lora_weights: this is a DoRA ({len(magnitudes)} tensors such as "
                f"{magnitudes[0]}), of which diffusers would load only a part; nothing was changed. Merge it into a "
                "LoRA with its trainer's tools."
            )
        if is_foreign(weights):
            transformer: nn.Module = cast(Pipeline, self.owner).transformer
            with torch.no_grad():
                weights = as_diffusers(weights, layer_paths(transformer))
        made = self.call_inner(weights, return_lora_metadata=False, **rest)
        return (made, metadata) if wants_metadata else made
