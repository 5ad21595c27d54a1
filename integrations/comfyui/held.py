"""A pipe as an edge of a graph: how to load it, and the pipe itself while ComfyUI lets it hold the card."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import ernie_accel
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.embedded import MODEL_FOLDER, SIZE_PX

from . import host

EMBEDDED = "embedded"
_HUB_ID = r"[\w.-]+/[\w.-]+"


@dataclass(frozen=True)
class Lora:
    """A LoRA that is fused into the weights when the pipe is loaded."""

    path: Path
    scale: float


@dataclass(frozen=True)
class Recipe:
    """How a pipe is loaded.

    Attributes:
        model: A hub id, a folder in ComfyUI's models/diffusers, or "embedded".
        preset: A preset's name, "auto" or "none".
        memory: As ``ernie_accel.load`` takes it; "none" leaves the pipe where it is loaded.
        dtype: Of the weights as they are read.
        transformer: A single file for the transformer; None: the model's own.
        loras: Fused, in this order.
        prompt_enhancer: Whether to keep the model's.
    """

    model: str
    preset: str = "none"
    memory: str = "auto"
    dtype: str = "auto"
    transformer: Path | None = None
    loras: tuple[Lora, ...] = ()
    prompt_enhancer: bool = True

    @property
    def is_embedded(self) -> bool:
        """Whether it draws with the model that travels with the library."""
        return self.model == EMBEDDED and self.transformer is None

    def load(self) -> Any:
        """Return the pipe, where its plan places it."""
        settings: dict[str, Any] = {
            "device": host.device(),
            "dtype": self.dtype,
            "prompt_enhancer": self.prompt_enhancer,
            "transformer": self.transformer,
        }
        preset = None if self.preset == "none" else self.preset
        memory = None if self.memory == "none" else self.memory
        place = place_of(self.model)
        if not self.loras:
            return ernie_accel.load(place, preset=preset, memory=memory, **settings)
        pipe: Any = ernie_accel.load(place, memory=None, **settings)
        for number, lora in enumerate(self.loras):
            _fuse(pipe, lora, f"comfyui_{number}")
        device = host.device() or "cpu"
        memory = None if device == "cpu" else memory
        if preset is not None:
            return ernie_accel.optimize(pipe, *_forgetful(preset, pipe), preset=preset, memory=memory)
        if memory in (None, "auto"):
            return pipe if memory is None else pipe.to(device)
        return ernie_accel.optimize(pipe, memory=memory)


def _forgetful(preset: str, pipe: Any) -> Iterator[Any]:
    """Yield a preset's casts and quantizations without their originals: what is fused is not wanted back."""
    named = ernie_accel.recommend(pipe=pipe).preset if preset == "auto" else ernie_accel.presets[preset]
    for transform in named.transforms_on(pipe):
        if hasattr(transform, "keep_originals"):
            yield replace(transform, keep_originals=False)


def _fuse(pipe: Any, lora: Lora, name: str) -> None:
    """Add a LoRA to the weights of a pipe that is not optimized yet.

    Raises:
        ErnieAccelError: It cannot be read, or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not hasattr(pipe, "load_lora_weights"):
        raise ErnieAccelError(f"{type(pipe).__name__} takes no LoRAs in the diffusers installed here")
    try:
        weights = load_file(lora.path)
        magnitudes = sum("dora_scale" in key for key in weights)
        if magnitudes:
            raise ErnieAccelError(
                f"{lora.path.name} is a DoRA ({magnitudes} tensors), of which diffusers would load only a part; merge "
                "it into a LoRA with its trainer's tools"
            )
        named = _in_diffusers_names(weights, pipe.transformer)
        # From the file itself where diffusers knows the names: its metadata has the adapter's alpha.
        source, how = (str(lora.path), {"use_safetensors": True}) if named is weights else (named, {})
        pipe.load_lora_weights(source, adapter_name=name, local_files_only=True, **how)
    except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ErnieAccelError(f"{lora.path.name} does not fit {type(pipe).__name__}: {reason}") from error
    if not any(name in names for names in pipe.get_list_adapters().values()):
        raise ErnieAccelError(f"{lora.path.name} does not fit {type(pipe).__name__}: none of its layers is there")
    pipe.fuse_lora(lora_scale=lora.scale, adapter_names=[name])
    pipe.unload_lora_weights()


def _in_diffusers_names(weights: dict[str, torch.Tensor], transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a LoRA's tensors by diffusers' names if all of them have one here; else as they are, for diffusers."""
    from ernie_accel.models.adapters import layer_paths
    from ernie_accel.models.lora_keys import as_diffusers

    if all(key.startswith("transformer.") and ".lora_" in key for key in weights):
        return weights
    paths = layer_paths(transformer)
    renamed = as_diffusers(weights, paths)
    known = {f"transformer.{path}" for path in paths}
    return renamed if all(key.rpartition(".lora_")[0] in known for key in renamed) else weights


class HeldPipe:
    """A pipe that ComfyUI may take off the card at any time between two nodes; it is then loaded again when needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.loads = 0
        self._pipe: Any = None
        self._on_device = 0
        self._patcher = host.patcher_for(self.release)

    def pipe(self) -> Any:
        """Return the pipe, with the card to itself."""
        if self._pipe is None:
            host.make_room()
            with as_written():
                self._pipe = self.recipe.load()
            self.loads += 1
            self._pipe.set_progress_bar_config(disable=True)
        pipe = self._pipe
        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        self._on_device = host.device_bytes(parts)
        host.hold_card(self._patcher, self._on_device)
        return pipe

    @property
    def is_loaded(self) -> bool:
        """Whether there is a pipe now."""
        return self._pipe is not None

    def release(self) -> None:
        """Let the pipe go; the next use loads it again. What stands for it in ComfyUI's list stays."""
        self._pipe = None
        if self._on_device:
            gc.collect()  # cycles would hold the card until the next collection

    def report(self) -> str:
        """Return what was applied, in words."""
        return str(ernie_accel.report(self.pipe()))

    def default_size(self) -> tuple[int, int] | None:
        """Return the width and height of a picture whose size is left open; None: the pipe's own default."""
        return SIZE_PX if self.recipe.is_embedded else None


def place_of(model: str) -> str:
    """Return what ``ernie_accel.load`` takes for the name in a workflow.

    Raises:
        host.HostError: It is no hub id, and no folder in models/diffusers.
    """
    if model == EMBEDDED:
        return str(MODEL_FOLDER)
    try:
        return str(host.find("diffusers", model))
    except host.HostError:
        if re.fullmatch(_HUB_ID, model):
            return model
        raise


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Run a with-block as scripts do: ComfyUI runs nodes in inference mode, whose tensors nothing else may change."""
    with torch.inference_mode(False), torch.no_grad():
        yield
