"""Read the tensors of a safetensors file with several threads, straight into the memory where they stay.

One thread that copies from a mapped file waits for each page, and a device copies from such pages through a buffer of
its driver. Here several threads read large blocks: for the CPU into the tensor itself, for an accelerator into a block
of pinned memory of their own, from which the device copies.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from ernie_accel.common.cores import cores
from ernie_accel.storage.tensor_file import DTYPES

#: What a thread reads at a time; all of the host's memory that an accelerator's tensors need, per thread. Between two,
#: it takes the interpreter's lock, which the main thread may need: small tensors share a block.
BLOCK_BYTES = 32 * 2**20
#: More gain nothing: a few saturate memory, and disks too.
_THREADS = 8


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file, and what it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    nbytes: int


@dataclass
class _Block:
    """Bytes of a file that one thread reads at once: pieces of tensors that follow each other there.

    Attributes:
        start: Where they begin in the file.
        pieces: Where they go.
        parts: For each piece, what its tensor waits for.
        nbytes: Of all pieces.
    """

    start: int = 0
    pieces: list[torch.Tensor] = field(default_factory=list)
    parts: list[list[Future[None]]] = field(default_factory=list)
    nbytes: int = 0

    def takes(self, piece: torch.Tensor, start: int) -> bool:
        """Return whether a piece follows the others in the file, and there is room for it."""
        return start == self.start + self.nbytes and self.nbytes + piece.numel() <= BLOCK_BYTES


class ParallelReader:
    """Reads tensors of one safetensors file in the background.

    A context manager: leaving it ends its threads, and waits for them unless everything that was started was taken.
    """

    def __init__(
        self, file: Path, device: str, threads: int | None = None, beside: ParallelReader | None = None
    ) -> None:
        """Read the header; nothing else is read yet.

        Args:
            file: A safetensors file.
            device: Where the tensors go.
            threads: How many read; None: one for each core that this process may use, 8 at most.
            beside: A reader onto the same device, whose threads read this file, too; leaving that one ends them.

        Raises:
            SafetensorError: The file is damaged: header and size do not agree.
            ValueError: A tensor has a dtype that torch does not have.
            OSError: The file cannot be read.
        """
        self.tensors = stored_tensors(file)
        self._file, self._device = file, torch.device(device)
        if beside is None:
            self._pool = ThreadPoolExecutor(threads or min(_THREADS, cores()), "ernie-accel-read")
            self._blocks = threading.local()
            self._stream = _current_stream(self._device)
        else:
            self._pool, self._blocks, self._stream = beside._pool, beside._blocks, beside._stream
        self._pending: dict[str, tuple[torch.Tensor, list[Future[None]]]] = {}

    def start(self, names: Iterable[str]) -> None:
        """Allocate these tensors and begin to read them, in the order in which they lie in the file.

        Raises:
            torch.OutOfMemoryError: The device has no memory for them.
        """
        block = _Block()
        for name in sorted(names, key=lambda name: self.tensors[name].start):
            stored = self.tensors[name]
            tensor = torch.empty(stored.shape, dtype=stored.dtype, device=self._device)
            # A scalar has no dimension that could be counted in bytes.
            into, parts = tensor.reshape(-1).view(torch.uint8), list[Future[None]]()
            self._pending[name] = tensor, parts
            for at in range(0, stored.nbytes, BLOCK_BYTES):
                piece = into[at : at + BLOCK_BYTES]
                if not block.takes(piece, stored.start + at):
                    self._submit(block)
                    block = _Block(stored.start + at)
                block.pieces.append(piece)
                block.parts.append(parts)
                block.nbytes += piece.numel()
        self._submit(block)

    def _submit(self, block: _Block) -> None:
        if block.pieces:
            read = self._pool.submit(self._read, block.pieces, block.start)
            for parts in block.parts:
                parts.append(read)

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor that was started, once all of it has arrived. Each is given out once.

        Raises:
            OSError: The file cannot be read, or has become shorter.
        """
        tensor, parts = self._pending.pop(name)
        for part in parts:
            part.result()
        return tensor

    def _read(self, pieces: list[torch.Tensor], start: int) -> None:
        """Fill bytes on the device, one piece after the other, with those of the file that begin at `start`."""
        direct = pieces[0].device.type == "cpu"
        nbytes = [piece.numel() for piece in pieces]
        block = None if direct else self._block()[: sum(nbytes)]
        with self._file.open("rb", buffering=0) as file:
            file.seek(start)
            for into in pieces if block is None else [block]:
                array: Any = into.numpy()
                view, done = memoryview(array), 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise OSError(f"it ends at byte {file.tell()}, within a tensor")
                    done += count
        if block is not None:
            with self._stream:
                for number, (into, source) in enumerate(zip(pieces, torch.split(block, nbytes), strict=True), 1):
                    # CUDA copies in order: the last one returns once all are done, so the block is free again.
                    into.copy_(source, non_blocking=into.device.type == "cuda" and number < len(pieces))

    def _block(self) -> torch.Tensor:
        """Return this thread's block of host memory: pinned for CUDA, if the system lets us pin so much."""
        if not hasattr(self._blocks, "block"):
            made = None
            if self._device.type == "cuda":
                with contextlib.suppress(RuntimeError):
                    made = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
            self._blocks.block = torch.empty(BLOCK_BYTES, dtype=torch.uint8) if made is None else made
        block: torch.Tensor = self._blocks.block
        return block

    def __enter__(self) -> ParallelReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Threads with nothing left to do end by themselves; waiting for them only delays the load.
        self._pool.shutdown(wait=error is not None or bool(self._pending), cancel_futures=True)
        self._pending.clear()


class _CurrentStream:
    """Makes a thread launch on the stream of the thread that made this, where allocated memory is known to be free.

    Unlike torch's own context manager, several threads can enter it at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._kind: ModuleType = getattr(torch, device.type)
        self._stream = self._kind.current_stream(device)
        self._entered = threading.local()

    def __enter__(self) -> None:
        self._entered.context = self._kind.stream(self._stream)
        self._entered.context.__enter__()

    def __exit__(self, *raised: object) -> None:
        self._entered.context.__exit__(*raised)


def _current_stream(device: torch.device) -> contextlib.AbstractContextManager[None]:
    has_streams = hasattr(getattr(torch, device.type, None), "current_stream") and device.type != "cpu"
    return _CurrentStream(device) if has_streams else contextlib.nullcontext()


def stored_tensors(file: Path) -> dict[str, Stored]:
    """Return what a file holds, by name; arguments and errors are those of `ParallelReader`."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:  # checks that header and size agree, and that nothing overlaps
        names = set(opened.keys())
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header: dict[str, object] = json.loads(raw.read(length))
    return dict(_each(header, names, 8 + length))


def _each(header: dict[str, Any], names: set[str], data: int) -> Iterator[tuple[str, Stored]]:
    for name in names:
        about = header[name]
        if about["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of {about['dtype']}, which torch does not have")
        first, end = about["data_offsets"]
        yield name, Stored(tuple(about["shape"]), DTYPES[about["dtype"]], data + first, end - first)
