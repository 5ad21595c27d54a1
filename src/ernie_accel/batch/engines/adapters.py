"""Switch a pipeline between the LoRAs that rows name; each is read once, and the last few stay loaded."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_accel.batch.engines.base import AdapterFile, is_out_of_memory
from ernie_accel.core.errors import ErnieAccelError

if TYPE_CHECKING:
    from torch import Tensor

    from ernie_accel.core.components import CallablePipeline

KEPT = 8
"""Adapters that stay loaded."""
_LAYER = re.compile(r"(\w+\..+)\.lora_[AB]\.weight")
_CONFIGURATIONS = frozenset({"lora_adapter_metadata"})
"""Where a file has what an adapter was made with, its alpha among it."""


class AdapterError(ErnieAccelError):
    """A LoRA that cannot be used with this pipeline."""


class Adapters:
    """The LoRAs of one pipe that belong to a batch, and which of them is at work."""

    def __init__(self, pipe: CallablePipeline) -> None:
        self._pipe = pipe
        self._loaded: OrderedDict[str, str] = OrderedDict()  # digest -> name of the adapter
        self._active: tuple[str, float] | None = None

    def use(self, lora: AdapterFile | None, scale: float | None) -> None:
        """Let the pipe draw with a LoRA, or with none; nothing happens if it does already.

        Raises:
            AdapterError: It cannot be read any more, has changed, or does not fit the pipe.
        """
        wanted = None if lora is None else (lora.digest, 1.0 if scale is None else scale)
        if wanted == self._active:
            return
        if lora is None or wanted is None:
            self._active = None
            self._pipe.disable_lora()
            return
        self._active = None
        if lora.digest not in self._loaded:
            self._load(lora)
        self._loaded.move_to_end(lora.digest)
        self._pipe.set_adapters([self._loaded[lora.digest]], [wanted[1]])
        self._pipe.enable_lora()
        self._active = wanted

    def close(self) -> None:
        """Remove the LoRAs; the pipe is as it was."""
        if self._loaded:
            self._loaded.clear()
            self._active = None
            self._pipe.unload_lora_weights()

    def _load(self, lora: AdapterFile) -> None:
        from safetensors import SafetensorError

        name = f"batch_{lora.digest[:16]}"
        try:
            self._read(lora.read(), name)
        except (SafetensorError, ValueError, LookupError, RuntimeError, ErnieAccelError) as error:
            self._remove(name)
            if is_out_of_memory(error):
                raise  # for the batch to try again, smaller
            lines = str(error).strip().splitlines() or [type(error).__name__]
            # An optimized pipe lists all that is wrong, below a line that says what was asked of it.
            listed = [line.removeprefix("  - ") for line in lines[1:] if isinstance(error, ErnieAccelError)]
            reason = "; ".join(listed) or lines[0]
            raise AdapterError(f"{lora.name} does not fit {type(self._pipe).__name__}: {reason}") from error
        if not self._has(name):
            raise AdapterError(f"{lora.name} does not fit {type(self._pipe).__name__}: none of its layers is there")
        self._loaded[lora.digest] = name
        while len(self._loaded) > KEPT:
            self._remove(self._loaded.popitem(last=False)[1])

    def _read(self, content: bytes, name: str) -> None:
        """Load an adapter from the bytes that were checked."""
        from safetensors.torch import load

        weights = load(content)
        _check_layers(self._pipe, weights)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if not header.get("__metadata__", {}).keys() & _CONFIGURATIONS:
            self._pipe.load_lora_weights(weights, adapter_name=name)
            return
        # diffusers reads an adapter's configuration from files only; without it, the alpha would be the rank.
        with tempfile.TemporaryDirectory(prefix="ernie-accel-lora-") as folder:
            file = Path(folder) / "lora.safetensors"
            file.write_bytes(content)
            self._pipe.load_lora_weights(
                folder, weight_name=file.name, adapter_name=name, local_files_only=True, use_safetensors=True
            )

    def _has(self, name: str) -> bool:
        return any(name in names for names in self._pipe.get_list_adapters().values())

    def _remove(self, name: str) -> None:
        if self._has(name):
            self._pipe.delete_adapters(name)


def _check_layers(pipe: CallablePipeline, weights: Mapping[str, Tensor]) -> None:
    """Refuse a LoRA of which diffusers would leave layers out with no more than a line in its log.

    Raises:
        ValueError: Some of its layers are not in the pipe; they are counted.
    """
    from ernie_accel.core.components import modules_of
    from ernie_accel.models.adapters import layer_paths
    from ernie_accel.quantization.layers import excludable_paths

    read = pipe.lora_state_dict(dict(weights))
    tensors = read[0] if isinstance(read, tuple) else read  # Stable Diffusion's gives the alphas beside them
    layers = dict.fromkeys(match[1] for key in tensors if (match := _LAYER.fullmatch(key)) is not None)
    there = {
        f"{component}.{path}"
        for component, module in modules_of(pipe).items()
        for path in (*layer_paths(module), *excludable_paths(pipe, (component,)))
    }
    missing = [layer for layer in layers if layer not in there]
    if missing:
        count = f"{len(missing)} of its {len(layers)} layers are not in this {type(pipe).__name__}"
        raise ValueError(f"{count} (the first is {missing[0]})")


def adapter_problem(pipe: CallablePipeline) -> str | None:
    """Return why rows cannot name LoRAs for a pipe; None if they can."""
    name = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights") or not hasattr(pipe, "disable_lora"):
        return f"{name} loads no LoRAs"
    if importlib.util.find_spec("peft") is None:  # without it diffusers refuses even to list adapters
        return "peft is not installed: pip install peft"
    if any(pipe.get_list_adapters().values()):
        return f"{name} has adapters of its own: call its unload_lora_weights() first, or fuse them"
    return None
