"""Free the memory of the text encoder and the prompt enhancer while a picture is being denoised."""

from __future__ import annotations

import copy
import inspect
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from ernie_accel.common.language import said
from ernie_accel.common.text import human_bytes
from ernie_accel.core.captured import version_of
from ernie_accel.core.components import (
    DENOISERS,
    PROMPT_COMPONENTS,
    Pipeline,
    absent_components,
    alignment_of,
    denoisers_of,
    forget_kept,
    module_bytes,
    modules_of,
    with_alignment,
)
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError, RestoreWarning, UnknownNameError
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.core.owners import FREES_WEIGHTS, FreedWeights, is_freed_by_another
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo

#: Where weights go -> what the next call that needs them does.
PLACES: Mapping[str, str] = MappingProxyType(
    {
        "disk": said("the next call that encodes a prompt reads them back"),
        "nowhere": said(
            "the next call that encodes a prompt fails: encode all prompts in one call, or pass prompt_embeds"
        ),
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
    slot: ClassVar[str] = FREES_WEIGHTS
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
                said(
                    "{pipe} has none of {names}, whose first step shows that the prompts are encoded",
                    pipe=type(pipe).__name__,
                    names=", ".join(DENOISERS),
                )
            )
        if reasons:
            return reasons
        parts = self._parts(pipe)
        if not parts:
            reasons.append(
                said(
                    "{pipe} has none of {names}",
                    pipe=type(pipe).__name__,
                    names=", ".join(PROMPT_COMPONENTS),
                )
            )
        for name, part in parts.items():
            if name not in PROMPT_COMPONENTS:
                reasons.append(
                    said("{name} works while or after the picture is denoised: it cannot be freed before", name=name)
                )
            if self.to == "disk" and any(hasattr(tensor, "__tensor_flatten__") for tensor in part.parameters()):
                reasons.append(
                    said(
                        "{name} is quantized, and its weights cannot be written as plain tensors: to='nowhere'",
                        name=name,
                    )
                )
            if is_freed_by_another(pipe, part):
                reasons.append(
                    said(
                        "{name} is freed already, by FreeAfterUse() on another pipe that shares it: this pipe's calls "
                        "free and fetch it, too, as long as the pipes share their denoiser; or restore that pipe first",
                        name=name,
                    )
                )
            if library_hooks(part).accelerate is not None:
                reasons.append(said("{name} is offloaded already: use one of the two", name=name))
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
                weights = _ComponentWeights(name, part, folder)
                undo.push(weights.discard)
                undo.hook_before_forward(part, weights.ensure_loaded)
                undo.hook_before_state_dict(part, weights.ensure_loaded)
                for denoiser in denoisers_of(pipe).values():
                    undo.hook_before_forward(denoiser, weights.free)
                for method in ("generate", "load_state_dict"):  # look at the weights before any forward
                    if hasattr(part, method):
                        undo.setattr(part, method, _LoadingFirst(weights, getattr(part, method)))
        if self.to == "nowhere":
            return Applied(tuple(parts), no_undo=said("to='nowhere': freed weights are gone"), note=note)
        return Applied(tuple(parts), undo=undo, note=note)

    def _parts(self, pipe: Pipeline) -> dict[str, nn.Module]:
        modules = modules_of(pipe)
        wanted = self.components if self.components is not None else PROMPT_COMPONENTS
        return {name: modules[name] for name in modules if name in wanted}

    def _note(self, pipe: Pipeline) -> str:
        size = human_bytes(sum(map(module_bytes, self._parts(pipe).values())))
        return said("frees {size} while denoising; {then}", size=size, then=PLACES[self.to])


class _ComponentWeights(FreedWeights):
    """The weights of one component, which are in its tensors, in a file, or gone."""

    def __init__(self, name: str, module: nn.Module, folder: tempfile.TemporaryDirectory[str] | str | None) -> None:
        self._name, self._module, self._folder = name, module, folder
        self._file = None if folder is None else _new_file(name, folder)
        self._freed = False
        #: Where the tensors began in memory, for the same bits when they are read again.
        self._alignments: dict[str, int] = {}
        #: What the tensors were when the file was written or read; None: there is no file.
        self._written: list[tuple[object, ...]] | None = None
        #: The emptied tensors by their names in the file, which a LoRA gives other names; and their versions then.
        self._emptied: dict[str, Tensor] = {}
        self._versions: dict[str, int | None] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> _ComponentWeights:
        """Return the weights of the copied component, with a file of their own: either pipe may be restored first."""
        if self._folder is not None:
            memo[id(self._folder)] = self._folder  # which goes away with the last pipe that needs it
        made = _ComponentWeights(self._name, self._module, self._folder)
        memo[id(self)] = made  # before the module is copied, whose hooks lead back here
        made._module = copy.deepcopy(self._module, memo)
        made._freed, made._alignments = self._freed, self._alignments
        if self._freed and self._file is not None and made._file is not None:
            shutil.copyfile(self._file, made._file)
            made._written = []
            made._emptied = {name: copy.deepcopy(tensor, memo) for name, tensor in self._emptied.items()}
            changed = self._changed()
            made._versions = {n: -1 if n in changed else version_of(tensor) for n, tensor in made._emptied.items()}
        return made

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self._module.named_parameters())  # without duplicates: tied weights are written once

    def _state(self) -> list[tuple[object, ...]]:
        """Return what tells whether anybody changed a weight since."""
        return [
            (id(tensor), tensor.dtype, tensor.data_ptr(), version_of(tensor)) for tensor in self._tensors().values()
        ]

    def _changed(self) -> list[str]:
        """Return the names of emptied tensors that somebody computed with in place, which changed nothing."""
        return [name for name, tensor in self._emptied.items() if version_of(tensor) != self._versions[name]]

    def free(self, *_: object) -> None:
        """Empty the tensors, written to the file first; nothing happens if they are empty."""
        if self._freed:
            return
        if self._folder is not None and self._file is not None and self._written != self._state():
            from safetensors.torch import save_file

            old, new = self._file, _new_file(self._name, self._folder)
            # Never over the old file, into which the tensors may be mapped.
            save_file({name: tensor.data.contiguous() for name, tensor in self._tensors().items()}, new)
            self._file = new
            old.unlink(missing_ok=True)
        forget_kept(self._module)
        self._alignments = {name: alignment_of(tensor) for name, tensor in self._tensors().items()}
        self._emptied = self._tensors()
        self._versions = {name: version_of(tensor) for name, tensor in self._emptied.items()}
        self._freed = True  # before the first is emptied: an interrupt must not leave empty ones to be written
        for tensor in self._emptied.values():
            tensor.data = tensor.data.new_empty(0)  # keeps dtype and device, which pipelines ask for

    def ensure_loaded(self, *_: object) -> None:
        """Fill the tensors again, in the dtype that they were cast to since; nothing happens if they are full.

        Raises:
            ErnieAccelError: They are gone, or somebody changed them in place while they were empty.
        """
        if self._freed and (changed := self._changed()):
            raise ErnieAccelError(
                f"{self._name}: {_and_more(changed)} changed in place while FreeAfterUse() had freed the weights, and "
                "the change was lost. Call ernie_accel.restore(pipe), change the weights again, then optimize."
            )
        self._fill()

    def _fill(self) -> None:
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
            for name, tensor in self._emptied.items():
                values = file.get_tensor(name).to(tensor.device, tensor.dtype)
                tensor.data = with_alignment(values, self._alignments[name])
        # With a LoRA that came meanwhile, there are tensors that the file does not have, under other names.
        same = self._tensors().keys() == self._emptied.keys()
        self._freed, self._emptied = False, {}
        self._written = self._state() if same else []

    def discard(self) -> None:
        """Fill the tensors again and remove the file; warn of changes that were lost."""
        if self._freed and (changed := self._changed()):
            warnings.warn(
                f"{self._name}: {_and_more(changed)} changed in place while FreeAfterUse() had freed the weights, and "
                "the change was lost. They have the values from before again.",
                RestoreWarning,
                stacklevel=2,
            )
        self._fill()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        self._written = None


class _LoadingFirst:
    """A method of a model that fetches its weights first; an object, so that a deep copy calls its own model's."""

    def __init__(self, weights: _ComponentWeights, method: Callable[..., object]) -> None:
        self._weights, self._method = weights, method
        self.__signature__ = inspect.signature(method)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the method."""
        self._weights.ensure_loaded()
        return self._method(*args, **kwargs)


def _and_more(names: list[str]) -> str:
    return f"{names[0]} was" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more were"


def _new_file(name: str, folder: tempfile.TemporaryDirectory[str] | str) -> Path:
    """Return the path of a file that no other pipe writes, also where several were given one folder."""
    return Path(folder if isinstance(folder, str) else folder.name) / f"{name}-{uuid.uuid4().hex}.safetensors"
