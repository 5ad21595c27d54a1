"""Refuse what stock tools do to quantized layers and get wrong: saving them, adding and merging a LoRA.

Each would fail halfway with the pipe changed, or write a checkpoint that reloads as noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ernie_accel.core.components import Pipeline, modules_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import Bound
from ernie_accel.core.undo import Undo
from ernie_accel.quantization.layers import holder_of


def refuse_saving(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make ``save_pretrained`` of the pipe and of these components raise, on the instances, in place."""
    for owner in (pipe, *modules_of(pipe, components).values()):
        if hasattr(owner, "save_pretrained"):
            undo.setattr(owner, "save_pretrained", Bound(_refuse_saving, owner))


def refuse_loras(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make components whose layers cannot take a LoRA refuse one, and all of them refuse to merge one, in place."""
    for module in modules_of(pipe, components).values():
        backends = {holder for part in module.modules() if (holder := holder_of(part)) is not None}
        methods: dict[str, Any] = {"fuse_lora": _refuse_merging, "unfuse_lora": _refuse_merging}
        if not all(backend.takes_loras for backend in backends):
            methods |= {"load_lora_adapter": _refuse_lora, "load_adapter": _refuse_lora, "add_adapter": _refuse_lora}
        for name, method in methods.items():
            if hasattr(module, name):
                undo.setattr(module, name, Bound(method, module))


def _refuse_saving(self: object, *args: object, **kwargs: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}.save_pretrained: its weights are quantized, and what that writes cannot be loaded, or "
        "loads as noise. Save the pipe with ernie_accel.save(pipe, folder), which ernie_accel.load reads; for a stock "
        "checkpoint, ernie_accel.restore(pipe) first."
    )


def _refuse_lora(self: object, *args: object, **kwargs: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}: cannot load a LoRA, because PEFT has no adapter for its quantized layers. Load the "
        "LoRA before quantizing: ernie_accel.restore(pipe), load it, then optimize again; or quantize with torchao, "
        "quanto or gguf, which take one afterwards."
    )


def _refuse_merging(self: object, *args: object, **kwargs: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}: cannot merge a LoRA into quantized weights, or take it out of them. Call "
        "ernie_accel.restore(pipe), load and merge it (pipe.fuse_lora()), then optimize again. Unmerged, it works."
    )
