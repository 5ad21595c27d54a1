"""Keep on the accelerator only what is in use; all other weights wait in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch

from ernie_accel.common.language import said
from ernie_accel.core.components import (
    DENOISERS,
    GROUP_OFFLOAD_HOOKS,
    PROMPT_COMPONENTS,
    Pipeline,
    components_offloaded_by_accelerate,
    denoisers_of,
    device_of,
    modules_of,
)
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo

#: Mode -> what is on the accelerator at a time.
MODES: Mapping[str, str] = MappingProxyType(
    {
        "model": said("one component at a time; moving ERNIE-Image's transformer in costs a second or so a picture"),
        "sequential": said("one layer at a time; the least memory, and by far the slowest"),
        "group": said("a few blocks at a time (the next are loaded meanwhile if the device has streams), and the VAE"),
        "stages": said(
            "the transformer and the VAE all the time, text encoder and prompt enhancer only while they work"
        ),
    }
)

#: Stays on the accelerator: with streams, its ``decode`` (no ``forward``) meets layers whose group nothing has brought.
_NOT_IN_GROUPS = ("vae",)


@dataclass(frozen=True, repr=False)
class Offload(Transform):
    """Offload weights to host memory between uses. This saves memory and costs time; the arithmetic stays the same.

    A pipe on the host is offloaded from the machine's accelerator: it need not have been there as a whole.

    "model", "sequential" and "group" are diffusers' own modes (``enable_model_cpu_offload`` and so on). "stages" is for
    cards that can hold the transformer, but not the 15 GB of ERNIE-Image's text encoder and prompt enhancer as well.

    Pays:
        Only if the pipe does not fit otherwise, because every mode costs time. Try a quantized transformer first,
        then "stages", "model", "group" and "sequential", from the fastest to the leanest.

    Attributes:
        mode: A key of `MODES`.
        blocks_per_group: For "group": blocks that move together, >= 1.
    """

    phase: ClassVar[Phase] = Phase.MEMORY
    slot: ClassVar[str] = "offload"
    effect: ClassVar[Effect] = Effect.EXACT

    mode: str
    blocks_per_group: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownNameError("mode of offloading", self.mode, MODES)
        if self.blocks_per_group < 1:
            raise ValueError(f"blocks_per_group must be >= 1, got {self.blocks_per_group}")

    @property
    def runs_on_accelerator(self) -> bool:
        """That is what it is for."""
        return True

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = []
        if context.device == "cpu":
            reasons.append(said("there is no accelerator to offload from: this device is cpu"))
        if self.mode == "model" and getattr(pipe, "model_cpu_offload_seq", None) is None:
            reasons.append(
                said("{pipe} does not say in which order its components work: use 'group'", pipe=type(pipe).__name__)
            )
        if self.mode == "stages" and not any(self._prompt_components(pipe)):
            reasons.append(
                said(
                    "{pipe} has none of {names}",
                    pipe=type(pipe).__name__,
                    names=", ".join(PROMPT_COMPONENTS),
                )
            )
        if self.mode == "stages" and not denoisers_of(pipe):
            reasons.append(
                said(
                    "{pipe} has none of {names}: use 'model'",
                    pipe=type(pipe).__name__,
                    names=", ".join(DENOISERS),
                )
            )
        moved = components_offloaded_by_accelerate(pipe)
        if moved:
            reasons.append(
                said("{names}: offloaded already; call pipe.remove_all_hooks() first", names=", ".join(moved))
            )
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return Preview(self._changes(pipe), note=said("on the accelerator: {mode}", mode=MODES[self.mode]))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), offload=self.mode, device=context.torch_device)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        changes, device = self._changes(pipe), device_of(pipe)
        if device.type == "cpu" and context.device != "cpu":
            device = torch.device(context.torch_device)
        places = _places(pipe)
        with Undo() as undo:
            for name in ("_offload_gpu_id", "_offload_device", "_all_hooks"):
                undo.push(_attribute_setter(pipe, name))
            for part in (part for module in modules_of(pipe).values() for part in module.modules()):
                undo.push(_attribute_setter(part, "forward"))  # hooks, when removed, leave one on the instance
            if self.mode == "stages":
                self._stage(pipe, device, places, undo)
            elif self.mode == "group":
                undo.push(partial(_end_group_offload, pipe, places))
                for name in _NOT_IN_GROUPS:
                    if name in places:
                        modules_of(pipe)[name].to(device)
                pipe.enable_group_offload(
                    onload_device=device,
                    num_blocks_per_group=self.blocks_per_group,
                    use_stream=device.type == "cuda",
                    exclude_modules=list(_NOT_IN_GROUPS),
                )
            else:
                undo.push(partial(_end_cpu_offload, pipe, places))
                enable = pipe.enable_model_cpu_offload if self.mode == "model" else pipe.enable_sequential_cpu_offload
                enable(device=device)
        return Applied(changes, undo=undo, note=said("on the accelerator: {mode}", mode=MODES[self.mode]))

    def _changes(self, pipe: Pipeline) -> tuple[str, ...]:
        if self.mode == "stages":
            return tuple(self._prompt_components(pipe))
        left = _NOT_IN_GROUPS if self.mode == "group" else ()
        return tuple(name for name in modules_of(pipe) if name not in left)

    def _prompt_components(self, pipe: Pipeline) -> Iterator[str]:
        return (name for name in modules_of(pipe) if name in PROMPT_COMPONENTS)

    def _stage(self, pipe: Pipeline, device: torch.device, places: Mapping[str, torch.device], undo: Undo) -> None:
        from accelerate import cpu_offload_with_hook
        from accelerate.hooks import remove_hook_from_module

        hooks = []
        for name, place in places.items():
            if name not in PROMPT_COMPONENTS and place != device:
                undo.push(partial(modules_of(pipe)[name].to, place))
                modules_of(pipe)[name].to(device)
        for name in self._prompt_components(pipe):
            module = modules_of(pipe)[name]
            undo.push(partial(module.to, places.get(name, device)))
            undo.push(partial(remove_hook_from_module, module, recurse=True))
            _, hook = cpu_offload_with_hook(module.to("cpu"), device)
            hooks.append(hook)

        def leave(*_: object) -> None:
            for hook in hooks:
                hook.offload()

        for denoiser in denoisers_of(pipe).values():
            undo.hook_before_forward(denoiser, leave)


def _places(pipe: Pipeline) -> dict[str, torch.device]:
    """Return where each component is; without those that hold no tensor."""
    found = {}
    for name, module in modules_of(pipe).items():
        tensor = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
        if tensor is not None:
            found[name] = tensor.device
    return found


def _move_back(pipe: Pipeline, places: Mapping[str, torch.device]) -> None:
    for name, place in places.items():
        module = modules_of(pipe).get(name)
        if module is not None:
            module.to(place)


def _end_cpu_offload(pipe: Pipeline, places: Mapping[str, torch.device]) -> None:
    pipe.remove_all_hooks()
    _move_back(pipe, places)


def _end_group_offload(pipe: Pipeline, places: Mapping[str, torch.device]) -> None:
    from diffusers.hooks import HookRegistry

    for module in modules_of(pipe).values():
        for part in module.modules():
            if library_hooks(part).diffusers is not None:
                registry = HookRegistry.check_if_exists_or_initialize(part)
                for name in [name for name in registry.hooks if name in GROUP_OFFLOAD_HOOKS]:
                    registry.remove_hook(name, recurse=False)
    _move_back(pipe, places)


def _attribute_setter(owner: object, name: str) -> Callable[[], None]:
    """Return what gives `owner` its present attribute `name` back, or takes it away where it has none."""
    if name in vars(owner):
        return partial(object.__setattr__, owner, name, vars(owner)[name])
    return lambda: object.__delattr__(owner, name) if name in vars(owner) else None
