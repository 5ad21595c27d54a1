"""Keep the weights within a budget of device memory; fetch the rest from the host while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ernie_accel.common.language import said
from ernie_accel.common.text import human_bytes
from ernie_accel.core.components import (
    Pipeline,
    components_offloaded_by_accelerate,
    device_of,
    emptied_components,
    is_device_name,
    modules_of,
)
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.models.adapters import narrow_products
from ernie_accel.residency.guard import refuse_moves, refuse_to_compile
from ernie_accel.residency.keeper import Keeper
from ernie_accel.residency.layout import ComponentSize, Layout, lay_out, least_bytes
from ernie_accel.residency.movers import MOVERS
from ernie_accel.residency.pieces import components_of, shared_weights, sizes_of


@dataclass(frozen=True, repr=False)
class Residency(Transform):
    """Keep the weights within a budget of device memory; bring the rest from the host while the device computes.

    Everything that fits stays. Prompt enhancer, text encoder and denoiser work one after the other, so they may share
    memory, and each is brought when its turn comes. If the denoiser alone is larger than the budget, some of its
    blocks take turns in two slots: one is computed with while the next arrives. Every weight has one address for good,
    so graphs and fused kernels work on. The pictures are bit for bit those of a pipe that is on the device as a whole.

    The host holds a copy of what leaves the device, pinned in the background as far as its memory allows. Until the
    restore, the components refuse to be moved, cast, saved or given other weights; LoRAs can be loaded, but not fused.

    Pays:
        Only if the pipe does not fit otherwise. Bytes that come over PCIe 5 take 1/55 s per GB, under the computing
        where there is enough of it.

    Attributes:
        weights: Bytes of device memory for all weights.
        device: Where to, such as "cuda"; None for where the pipe is. Name it for a pipe on the host.
    """

    phase: ClassVar[Phase] = Phase.RESIDENCY
    slot: ClassVar[str] = "offload"
    effect: ClassVar[Effect] = Effect.ROUNDING  # of the other device, as `MoveTo`; the fetching changes no bit

    weights: int = field(metadata=MACHINE_LOCAL)
    device: str | None = field(default=None, kw_only=True, metadata=MACHINE_LOCAL)

    def __post_init__(self) -> None:
        if self.weights < 1:
            raise ValueError(f"weights must be at least 1 byte, got {self.weights}")
        if self.device is not None and not is_device_name(self.device):
            raise ValueError(f"device takes a name such as 'cuda' or 'cuda:1', got {self.device!r}")

    @property
    def moves_to(self) -> str | None:
        """The device."""
        return self.device

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        planned, reasons = context.planned(pipe), []
        if context.torch_device not in MOVERS:
            fix = "" if self.device is not None else said("; for a pipe on the host, name the device: device='cuda'")
            reasons.append(
                said(
                    "there is no device memory to keep weights in: this device is {device}{fix}",
                    device=context.device,
                    fix=fix,
                )
            )
        if self.device is not None and self.device.partition(":")[0] != context.torch_device:
            reasons.append(
                said("there is no {device!r} here: the device is {machine}", device=self.device, machine=context.text)
            )
        hooked = components_offloaded_by_accelerate(pipe)
        if hooked:
            reasons.append(
                said("{names}: offloaded already; call pipe.remove_all_hooks() first", names=", ".join(hooked))
            )
        freed = emptied_components(pipe, None)
        if freed or planned.freed_to is not None:
            reasons.append(
                said(
                    "{names}: freed by FreeAfterUse, which it replaces",
                    names=", ".join(freed) or said("the prompt encoders"),
                )
            )
        reasons += [
            said("{pair} have weights in common, which cannot come for each in its turn", pair=pair)
            for pair in shared_weights(pipe)
        ]
        least = least_weights(pipe, planned)
        if self.weights < least:
            reasons.append(
                said(
                    "weights={weights} is too little: the least that works is {least} bytes",
                    weights=self.weights,
                    least=least,
                )
            )
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        planned = context.planned(pipe)
        sizes = sizes_of(pipe, planned)
        layout, staying = self._layout(sizes), _staying(sizes)
        changes = tuple(_describe(layout)) or (
            said("all weights stay on {device}", device=self.device or context.device),
        )
        return Preview(changes, note=said("{size} of weights on the device", size=human_bytes(layout.nbytes + staying)))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned = context.planned(pipe)
        device = planned.device if self.device is None else self.device.partition(":")[0]
        return replace(planned, offload="residency", device=device)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        device = torch.device(self.device) if self.device is not None else device_of(pipe)
        if device.type != context.torch_device:  # a pipe on the host
            device = torch.device(context.torch_device)
        mover = MOVERS[device.type](device)
        device = mover.device  # with its number
        for module in modules_of(pipe).values():
            narrow_products(module)
        components = components_of(pipe)
        moving = [component for component in components if component.moves]
        capacity = self.weights - sum(component.size.nbytes for component in components if not component.moves)
        layout = lay_out([component.size for component in moving], capacity)
        with Undo() as undo:
            for component in components:
                undo.push(_mover_back(component.module))
            for component in components:
                if not component.moves:
                    component.module.to(device)
                for part in component.unused:
                    part.to("cpu")  # no plan has room for it
            Keeper(moving, layout, mover).take(undo)
            refuse_moves(pipe, [component.module for component in moving], device, undo)
            for component in moving:
                refuse_to_compile(component.blocks.values() if component.streams else (), undo)
        changes = tuple(_describe(layout)) or (said("all weights stay on {device}", device=device.type),)
        return Applied(
            changes, undo=undo, note=said("{size} of weights on the device at a time", size=human_bytes(layout.nbytes))
        )

    def layout(self, pipe: Pipeline, planned: PlannedPipe) -> Layout:
        """Return where the weights of a planned pipe will lie, those that never move left out."""
        return self._layout(sizes_of(pipe, planned))

    def _layout(self, sizes: list[tuple[ComponentSize, bool]]) -> Layout:
        return lay_out([size for size, moves in sizes if moves], self.weights - _staying(sizes))


def least_weights(pipe: Pipeline, planned: PlannedPipe) -> int:
    """Return the least bytes of device memory with which the weights of a planned pipe can be kept."""
    sizes = sizes_of(pipe, planned)
    return _staying(sizes) + least_bytes([size for size, moves in sizes if moves])


def _staying(sizes: list[tuple[ComponentSize, bool]]) -> int:
    return sum(size.nbytes for size, moves in sizes if not moves)


def _describe(layout: Layout) -> Iterator[str]:
    moving = layout.moving
    for component, names in layout.components.items():
        streamed = [name for name in names if name in layout.streamed]
        fetched = [name for name in names if name in moving and name not in layout.streamed]
        if streamed:
            size = human_bytes(sum(layout.sizes[name] for name in streamed))
            yield said(
                "{component}: {count} of {all} blocks ({size}) streamed at every step",
                component=component,
                count=len(streamed),
                all=len(names) - 1,
                size=size,
            )
        if fetched:
            size = human_bytes(sum(layout.sizes[name] for name in fetched))
            yield said("{component}: {size} fetched when its turn comes", component=component, size=size)


def _mover_back(module: torch.nn.Module) -> Callable[[], None]:
    tensors = (*module.parameters(), *module.buffers())
    device = next((tensor.device for tensor in tensors), None)

    def move() -> None:
        if device is not None:
            module.to(device)

    return move
