"""Copy pieces of weights from the host to a device, beside what it computes."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor

#: Share of the host's memory that may be pinned; the rest is copied through a buffer of the driver, more slowly.
PINNED_SHARE = 0.6
#: Where users set up torch's allocator.
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class Mover(ABC):
    """Brings bytes to one device. Copies are made in the order in which they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, nbytes: int) -> Tensor:
        """Return a block of device memory.

        Raises:
            torch.OutOfMemoryError: There is not so much.
        """
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy_back(self, values: Tensor, device: torch.device) -> Tensor:
        """Return a copy of `values` in memory of its own.

        Raises:
            torch.OutOfMemoryError: There is not so much.
        """
        return values.to(device, copy=True)

    def is_capturing(self) -> bool:
        """Return whether what is launched now goes into a graph."""
        return False

    @abstractmethod
    def start(self, target: Tensor, source: Tensor) -> object:
        """Copy once all is computed that was launched so far; return what `wait` takes. Does not wait itself."""

    @abstractmethod
    def wait(self, ticket: object) -> None:
        """Have what is launched from here on wait for that copy."""

    def pin(self, sources: Iterable[Tensor]) -> None:  # noqa: B027  most need not
        """Make copies from these faster, in the background, as far as the host's memory allows."""

    def open(self) -> None:  # noqa: B027
        """Prepare the device's allocator for a budget; called before the first allocation."""

    def close(self) -> None:  # noqa: B027
        """Unpin what `pin` pinned, and give the allocator its settings back."""


class StreamMover(Mover):
    """For an accelerator with streams: copies in order on a stream of its own, while others compute."""

    def __init__(self, device: torch.device, kind: ModuleType | None = None) -> None:
        """Move to `device`; `kind` has its streams and events, ``torch.cuda`` for "cuda"."""
        self._kind: ModuleType = getattr(torch, device.type) if kind is None else kind
        if device.index is None:  # the current device may be another one by the time of a call
            device = torch.device(device.type, self._kind.current_device())
        super().__init__(device)
        self._stream = self._kind.Stream(device)
        self._readers: dict[object, None] = {}  # streams that waited for a copy, and may still read what it brought
        self._pins = _Pins(self._kind, device, self._stream)
        # Memory that is freed while it is pinned cannot be copied from when it is used again, so a pipe that is dropped
        # unpins as one that is restored does. At exit the device may be gone already, and so is the memory.
        weakref.finalize(self, self._pins.close_later).atexit = False
        self._expands = False

    def open(self) -> None:
        if self.device.type == "cuda" and not any(map(os.environ.get, _ALLOCATOR_SETTINGS)):
            # Segments that grow: little memory is left beside the weights, and none of it is lost to fragmentation.
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
            self._expands = True

    def allocate(self, nbytes: int) -> Tensor:
        self._kind.empty_cache()  # it takes one block, and what was freed lies in many
        return super().allocate(nbytes)

    def is_capturing(self) -> bool:
        return bool(getattr(self._kind, "is_current_stream_capturing", bool)())

    def start(self, target: Tensor, source: Tensor) -> object:
        for stream in (*self._readers, self._kind.current_stream(self.device)):
            computed = self._kind.Event()
            computed.record(stream)
            self._stream.wait_event(computed)
        with self._kind.stream(self._stream):
            target.copy_(source, non_blocking=True)
        arrived = self._kind.Event()
        arrived.record(self._stream)
        return arrived

    def wait(self, ticket: object) -> None:
        if self.is_capturing():
            return  # a graph may not wait for what is outside of it; whoever replays it has waited (`bring_whole`)
        stream = self._kind.current_stream(self.device)
        stream.wait_event(ticket)
        self._readers[stream] = None

    def pin(self, sources: Iterable[Tensor]) -> None:
        if self.device.type != "cuda":
            return
        self._pins.begin(list(sources))

    def close(self) -> None:
        self._pins.close()
        if self._expands:
            torch.cuda.memory._set_allocator_settings("expandable_segments:False")
            self._expands = False


class _Pins:
    """The host memory that a mover has pinned; it outlives the mover until it is unpinned."""

    def __init__(self, kind: ModuleType, device: torch.device, stream: torch.Stream) -> None:
        self._kind, self._device, self._stream = kind, device, stream
        self._pinned: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def begin(self, sources: list[Tensor]) -> None:
        """Pin memory in the background, as far as the host's allows."""
        self._thread = threading.Thread(target=self._pin, args=(sources,), name="ernie-accel-pinning", daemon=True)
        self._thread.start()

    def _pin(self, sources: list[Tensor]) -> None:
        limit, total = int(PINNED_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), 0
        self._kind.set_device(self._device)  # a thread begins on the first one, which may not be in use
        for source in sources:
            total += source.nbytes
            if total > limit or self._stop.is_set():
                return
            # Not pin_memory(): its allocator rounds up to powers of two, and copies.
            if int(_runtime().cudaHostRegister(source.data_ptr(), source.nbytes, 0)) != 0:
                return
            self._pinned.append(source)

    def close(self) -> None:
        """Unpin all of it, once nothing pins or copies from it any more, and let it go."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._stream.synchronize()
        while self._pinned:
            with self._kind.device(self._device):
                _runtime().cudaHostUnregister(self._pinned[-1].data_ptr())
            self._pinned.pop()

    def close_later(self) -> None:
        """Do so in a thread of its own: garbage is collected anywhere, also while others capture a graph."""
        if self._thread is not None:
            threading.Thread(target=self.close, name="ernie-accel-unpinning", daemon=True).start()


def _runtime() -> ModuleType:
    runtime: ModuleType = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return runtime


#: How to move to each type of device. Tests put a stand-in for "cpu" here.
MOVERS: dict[str, Callable[[torch.device], Mover]] = {"cuda": StreamMover, "npu": StreamMover}
