"""Move a pipe to the device that it will run on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from ernie_accel.common.language import said
from ernie_accel.core.components import (
    Pipeline,
    components_offloaded_by_accelerate,
    is_device_name,
    is_skeleton,
    modules_of,
)
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo


@dataclass(frozen=True, repr=False)
class MoveTo(Transform):
    """Move all components to one device, after they were cast and quantized; ``restore`` moves each back.

    A plan checks what that device can do.

    Pays:
        In a preset for a device that scripts do not name by themselves, such as "npu". If the pipe is larger than the
        device, use `Quantize(..., device=...)` or `Offload` instead.

    Attributes:
        device: A torch device: "npu", "cuda", "cuda:1", "cpu".
    """

    phase: ClassVar[Phase] = Phase.MEMORY
    slot: ClassVar[str] = "device"
    effect: ClassVar[Effect] = Effect.ROUNDING

    device: str = field(metadata=MACHINE_LOCAL)

    def __post_init__(self) -> None:
        if not is_device_name(self.device):
            raise ValueError(f"device takes a name such as 'npu' or 'cuda:1', got {self.device!r}")

    @property
    def moves_to(self) -> str | None:
        """The device."""
        return self.device

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = []
        if self.device.partition(":")[0] != context.torch_device:
            reasons.append(
                said("there is no {device!r} here: the device is {machine}", device=self.device, machine=context.text)
            )
        hooked = components_offloaded_by_accelerate(pipe)
        if hooked:
            reasons.append(
                said(
                    "{names}: offloaded, and moved by that; call pipe.remove_all_hooks() first",
                    names=", ".join(hooked),
                )
            )
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        changes = self._changes(pipe)
        return Preview(changes, note="" if changes else said("the pipe is on {device} already", device=self.device))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), device=self.device.partition(":")[0])

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        changes = self._changes(pipe)
        with Undo() as undo:
            for name, module in modules_of(pipe).items():
                if name in _places(pipe):
                    undo.push(partial(module.to, _places(pipe)[name]))
            pipe.to(self.device)
        return Applied(changes, undo=undo)

    def _changes(self, pipe: Pipeline) -> tuple[str, ...]:
        kind, _, index = self.device.partition(":")
        return tuple(
            f"{name} {place} -> {self.device}"
            for name, place in _places(pipe).items()
            if place.partition(":")[0] != kind or (index and place != self.device)
        )


def _places(pipe: Pipeline) -> dict[str, str]:
    """Return where each component is, "cpu" or "cuda:0"; without those that hold no tensor."""
    found = {}
    for name, module in modules_of(pipe).items():
        tensor = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
        if tensor is not None:
            found[name] = "host" if is_skeleton(module) else str(tensor.device)  # where they would be loaded
    return found
