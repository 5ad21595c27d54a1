"""Bring each piece of a pipe's weights to the device before it is used, and the next ones while it computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from ernie_accel.core.captured import BRING_WHOLE, mark_as_coming_and_going
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.undo import Undo
from ernie_accel.residency.layout import Layout
from ernie_accel.residency.movers import Mover
from ernie_accel.residency.pieces import Component, Held, Piece

_HOST = torch.device("cpu")
_HERE = object()  # the ticket of a piece that never leaves the device


class Keeper:
    """Owns one block of device memory, and knows which pieces are in it.

    From `take` on, the weights of these components are views into that block, at addresses that never change. Only the
    keeper knows whether a view holds its values. Weights that leave the device have a copy on the host, never written.
    """

    def __init__(self, components: Sequence[Component], layout: Layout, mover: Mover) -> None:
        self.components = {component.name: component for component in components}
        self.layout, self.mover = layout, mover
        self._pieces = {piece.name: piece for component in components for piece in component.pieces}
        self._component_of = {piece.name: each.name for each in components for piece in each.pieces}
        self._position = {name: i for names in layout.components.values() for i, name in enumerate(names)}
        self._overlapping = {name: tuple(layout.overlapping(name)) for name in self._pieces}
        self._hosts: dict[str, Tensor] = {}
        self._tickets: dict[str, object] = {}  # of the pieces that are on the device, or on their way
        self._lock = threading.RLock()
        self._arena: Tensor | None = None
        self._places: list[tuple[str, Held, torch.device]] = []

    # Taking and giving back -----------------------------------------------------------------------------------------

    def take(self, undo: Undo) -> None:
        """Move the weights to the device or into a copy on the host, piece by piece, and watch what runs, in place."""
        undo.push(self.release)
        self.mover.open()
        self._arena = self._allocate()
        with torch.no_grad():
            for name, piece in self._pieces.items():
                self._take_piece(name, piece)
        self.mover.pin(self._hosts.values())
        for name, component in self.components.items():
            undo.hook_before_forward(component.module, Entrance(self, name))
            undo.attach(BRING_WHOLE, component.module, partial(self.whole, name))
            if component.streams:
                for path, block in component.blocks.items():
                    undo.setattr(block, "_compiled_call_impl", Gate(self, path, block))

    def _allocate(self) -> Tensor:
        """Return the block; if the device is too full for it beside these weights, they wait on the host meanwhile."""
        try:
            return self.mover.allocate(self.layout.nbytes)
        except torch.OutOfMemoryError:
            for piece in self._pieces.values():
                for held in piece.held:
                    if held.tensor.device == self.mover.device:
                        held.tensor.data = self.mover.copy_back(held.tensor.detach(), _HOST)
            return self.mover.allocate(self.layout.nbytes)

    def _take_piece(self, name: str, piece: Piece) -> None:
        on_device = self._bytes(name)
        moves = bool(self._overlapping[name])
        there = torch.empty(piece.nbytes, dtype=torch.uint8) if moves else on_device
        for held in piece.held:
            held.within(there).copy_(held.tensor.detach())
        if moves:
            self._hosts[name] = there
        else:
            self._tickets[name] = _HERE
        for held in piece.held:
            self._places.append((name, held, held.tensor.device))
            held.tensor.data = held.within(on_device)
            mark_as_coming_and_going(held.tensor, moves)

    def release(self) -> None:
        """Give every tensor memory of its own again; a no-op where there is nothing to give back.

        That is where it was, or on the host where the device is too full for it beside the block.
        """
        with self._lock, torch.no_grad():
            self.mover.close()
            while self._places:
                name, held, device = self._places[-1]
                on_device = held.within(self._bytes(name))
                if held.tensor.data_ptr() == on_device.data_ptr():  # nobody has replaced its data since
                    host = self._hosts.get(name)
                    held.give_back(self._copy_back(on_device if host is None else held.within(host), device))
                mark_as_coming_and_going(held.tensor, False)
                self._places.pop()
                if not any(other == name for other, _, _ in self._places[-1:]):
                    self._hosts.pop(name, None)  # now, so that the host does not hold all of it twice
            self._tickets.clear()
            self._hosts.clear()
            self._arena = None

    def _copy_back(self, values: Tensor, device: torch.device) -> Tensor:
        try:
            return self.mover.copy_back(values, device)
        except torch.OutOfMemoryError:
            return self.mover.copy_back(values, _HOST)

    def _bytes(self, name: str) -> Tensor:
        """Return the place of a piece on the device."""
        if self._arena is None:
            raise RuntimeError("the weights are not kept here")
        start = self.layout.offsets[name]
        return self._arena[start : start + self._pieces[name].nbytes]

    # While the pipe runs --------------------------------------------------------------------------------------------

    def enter(self, component: str) -> None:
        """Bring what a component needs at its start, and have the rest on its way, in the order of use.

        Raises:
            ErnieAccelError: A graph is captured that would read its weights when others are in their place.
        """
        names = self.layout.components[component]
        if any(self._overlapping[name] for name in names) and self.mover.is_capturing():
            raise ErnieAccelError(
                f"{component} cannot be captured into a graph of your own: Residency brings its weights before each "
                "call, and a replay would not. Use CaptureGraphs(), or call ernie_accel.restore(pipe) first"
            )
        with self._lock:
            self._need(names[0])
            for name in names[1:]:
                if name not in self.layout.streamed:
                    self._start(name)
            self._prefetch(component, 0)
            self._look_ahead(component)

    def need(self, name: str) -> None:
        """Have what is launched from here on wait for a piece."""
        with self._lock:
            self._need(name)

    def done(self, name: str) -> None:
        """Note that a block was launched: once it has computed, its place may be overwritten."""
        with self._lock:
            self._prefetch(self._component_of[name], self._position[name])

    def whole(self, component: str) -> bool:
        """Bring all of a component, for code that reads weights without calling the blocks; return whether it fits."""
        names = self.layout.components[component]
        if not self.layout.streamed.isdisjoint(names):
            return False
        with self._lock:
            for name in names:
                self._need(name)
        return True

    def _need(self, name: str) -> None:
        self._start(name)
        if self._tickets[name] is not _HERE:
            self.mover.wait(self._tickets[name])

    def _start(self, name: str) -> None:
        if name in self._tickets:
            return
        for other in self._overlapping[name]:
            self._tickets.pop(other, None)
        self._tickets[name] = self.mover.start(self._bytes(name), self._hosts[name])

    def _prefetch(self, component: str, position: int) -> None:
        """Start the streamed pieces that are used next, in slots whose pieces are used later than they are."""
        names = self.layout.components[component]
        if self.layout.streamed.isdisjoint(names):
            return
        blocks = len(names) - 1

        def steps_until(name: str) -> int:
            return (self._position[name] - position - 1) % blocks

        for name in sorted(self.layout.streamed.intersection(names), key=steps_until):
            if name in self._tickets:
                continue
            rivals = (other for other in self._overlapping[name] if other in self._tickets and other in names)
            if any(steps_until(other) <= steps_until(name) for other in rivals):
                return
            self._start(name)

    def _look_ahead(self, component: str) -> None:
        """Start what later components will need, where that covers nothing that is on the device."""
        order = list(self.components)
        for later in order[order.index(component) + 1 :]:
            for name in self.layout.components[later]:
                if name in self._tickets or name in self.layout.streamed:
                    continue
                if not any(other in self._tickets for other in self._overlapping[name]):
                    self._start(name)

    # Copies ---------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise ErnieAccelError(_NO_COPY)

    def __reduce__(self) -> NoReturn:
        raise ErnieAccelError(_NO_COPY)


_NO_COPY = (
    "a pipe whose weights are kept by Residency cannot be copied or pickled: they share one block of device memory. "
    "Call ernie_accel.restore(pipe) first, and optimize the copy"
)


class Entrance:
    """A hook before the forward of a component."""

    def __init__(self, keeper: Keeper, component: str) -> None:
        self.keeper, self.component = keeper, component

    def __call__(self, module: nn.Module, *_: object) -> None:
        self.keeper.enter(self.component)
        if not self.keeper.components[self.component].streams:
            self.keeper.whole(self.component)


class Gate:
    """Wraps the call of a block, compiled or not; torch calls it where it would call the compiled block."""

    def __init__(self, keeper: Keeper, name: str, block: nn.Module) -> None:
        self.keeper, self.name, self.block = keeper, name, block
        self.inner: Callable[..., object] | None = block._compiled_call_impl

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.keeper.need(self.name)
        inner = self.inner or self.block._call_impl
        result = inner(*args, **kwargs)
        self.keeper.done(self.name)
        return result
