"""Free the memory of the text encoder and the prompt enhancer while a picture is being denoised."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ernie_accel.common.text import human_bytes
from ernie_accel.core.components import (
    DENOISERS,
    PROMPT_COMPONENTS,
    Pipeline,
    absent_components,
    denoisers_of,
    forget_kept,
    module_bytes,
    modules_of,
)
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo

#: Where weights go -> what the next call that needs them does.
PLACES: Mapping[str, str] = MappingProxyType(
    {
        "disk": "the next call that encodes a prompt reads them back",
        "nowhere": "the next call that encodes a prompt fails: encode all prompts in one call, or pass prompt_embeds",
    }
)


@dataclass(frozen=True, repr=False)
class FreeAfterUse(Transform):
    """Free the weights of components that have done their work when the first denoising step begins.

    ``Offload("stages")`` needs host memory for them; this frees host memory too. Of ERNIE-Image's 31 GB in bfloat16,
    the text encoder and the prompt enhancer take 15. Saving a model first reads its weights back.

    Pays:
        Where memory is short, on the host as well, and one call makes many pictures. Many calls of one picture each
        would read the weights every time: pass prompt_embeds there, or use BatchPromptEncoding with a cache.

    Attributes:
        to: "disk" writes one safetensors file per component at the first use, and the next call that needs the weights
            reads them back. "nowhere" drops them, and the next call that needs them fails with a message.
        components: Component names; None for those that only encode prompts.
        folder: Where the files go; None for a temporary folder, which is deleted with the pipe.
    """

    phase: ClassVar[Phase] = Phase.MEMORY
    slot: ClassVar[str] = "free-after-use"
    effect: ClassVar[Effect] = Effect.EXACT

    to: str = "disk"
    components: tuple[str, ...] | None = field(default=None, kw_only=True)
    folder: str | None = field(default=None, kw_only=True, metadata=MACHINE_LOCAL)

    def __post_init__(self) -> None:
        if self.to not in PLACES:
            raise UnknownNameError("place to free weights to", self.to, PLACES)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = absent_components(pipe, self.components)
        if not denoisers_of(pipe):
            reasons.append(
                f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}, whose first step shows that "
                "the prompts are encoded"
            )
        if reasons:
            return reasons
        parts = self._parts(pipe)
        if not parts:
            reasons.append(f"{type(pipe).__name__} has none of {', '.join(PROMPT_COMPONENTS)}")
        for name, part in parts.items():
            if name not in PROMPT_COMPONENTS:
                reasons.append(f"{name} works while or after the picture is denoised: it cannot be freed before")
            if self.to == "disk" and any(hasattr(tensor, "__tensor_flatten__") for tensor in part.parameters()):
                reasons.append(f"{name} is quantized, and its weights cannot be written as plain tensors: to='nowhere'")
            if hasattr(part, "_hf_hook"):
                reasons.append(f"{name} is offloaded already: use one of the two")
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return Preview(tuple(self._parts(pipe)), note=self._note(pipe))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), freed_to=self.to)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        parts, note = self._parts(pipe), self._note(pipe)
        folder: tempfile.TemporaryDirectory[str] | str | None = self.folder
        if self.to == "nowhere":
            folder = None
        elif self.folder is None:
            folder = tempfile.TemporaryDirectory(prefix="ernie_accel-")
        else:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        with Undo() as undo:
            for name, part in parts.items():
                weights = _Weights(name, part, folder)
                undo.push(weights.discard)
                undo.hook_before_forward(part, weights.ensure_loaded)
                undo.hook_before_state_dict(part, weights.ensure_loaded)
                for denoiser in denoisers_of(pipe).values():
                    undo.hook_before_forward(denoiser, weights.free)
                generate: Any = getattr(part, "generate", None)
                if generate is not None:
                    undo.setattr(part, "generate", _loading_weights_first(weights, generate))
        if self.to == "nowhere":
            return Applied(tuple(parts), no_undo="to='nowhere': freed weights are gone", note=note)
        return Applied(tuple(parts), undo=undo, note=note)

    def _parts(self, pipe: Pipeline) -> dict[str, nn.Module]:
        modules = modules_of(pipe)
        wanted = self.components if self.components is not None else PROMPT_COMPONENTS
        return {name: modules[name] for name in modules if name in wanted}

    def _note(self, pipe: Pipeline) -> str:
        size = human_bytes(sum(map(module_bytes, self._parts(pipe).values())))
        return f"frees {size} while denoising; {PLACES[self.to]}"


class _Weights:
    """The weights of one component, which are in its tensors, in a file, or gone."""

    def __init__(self, name: str, module: nn.Module, folder: tempfile.TemporaryDirectory[str] | str | None) -> None:
        self._name, self._module, self._folder = name, module, folder
        self._written = self._freed = False

    @property
    def _file(self) -> Path | None:
        if self._folder is None:
            return None
        root = self._folder if isinstance(self._folder, str) else self._folder.name
        return Path(root) / f"{self._name}.safetensors"

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self._module.named_parameters())  # without duplicates: tied weights are written once

    def free(self, *_: Any) -> None:
        """Empty the tensors, written to the file first; nothing happens if they are empty."""
        if self._freed:
            return
        if self._file is not None and not self._written:
            from safetensors.torch import save_file

            save_file({name: tensor.data.contiguous() for name, tensor in self._tensors().items()}, self._file)
            self._written = True
        forget_kept(self._module)
        for tensor in self._tensors().values():
            tensor.data = tensor.data.new_empty(0)  # keeps dtype and device, which pipelines ask for
        self._freed = True

    def ensure_loaded(self, *_: Any) -> None:
        """Fill the tensors again; nothing happens if they are full.

        Raises:
            ErnieAccelError: They are gone.
        """
        if not self._freed:
            return
        if self._file is None:
            raise ErnieAccelError(
                f"the weights of {self._name} were freed after their first use, as FreeAfterUse('nowhere') says. "
                "Encode all prompts in one call, pass prompt_embeds=..., use FreeAfterUse('disk'), or load the "
                "pipeline again."
            )
        from safetensors import safe_open

        with safe_open(self._file, framework="pt") as file, torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.data = file.get_tensor(name).to(tensor.device)
        self._freed = False

    def discard(self) -> None:
        """Fill the tensors again and remove the file."""
        self.ensure_loaded()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        self._written = False


def _loading_weights_first(weights: _Weights, generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model's ``generate`` so that it fetches the weights first; it reads the model before its first forward."""

    @wraps(generate)
    def fetch_and_generate(*args: Any, **kwargs: Any) -> Any:
        weights.ensure_loaded()
        return generate(*args, **kwargs)

    return fetch_and_generate
