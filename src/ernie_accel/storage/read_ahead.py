"""Begin to read a saved folder's weights while everything else that loading needs is imported and built.

Imports take seconds, and hold the interpreter; reading and copying need it between blocks only. Bytes that were read
are in tensors that nobody has seen: whoever asks for them has verified and vetted by then, as if they were read only
now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError

from ernie_accel.common.cores import background_threads
from ernie_accel.storage.parallel_read import ParallelReader, Stored

#: Kinds of devices onto which other threads than the main one were seen to read.
_KINDS = ("cpu", "cuda")


class ReadAhead:
    """Reads weights of several files onto a device in the background.

    A context manager: leaving it stops the threads, and drops what was not taken.
    """

    def __init__(self, files: Iterable[Path], device: str | None) -> None:
        """Begin at once, in this order.

        Args:
            files: Safetensors files.
            device: Where the tensors go; nothing is read ahead for None, nor for unsupported devices.
        """
        where = None if device is None else torch.device(device)
        # This thread creates no context and no stream, which would wait for the device to wake up.
        self._starter = ThreadPoolExecutor(1, "ernie-accel-read-ahead")
        self._readers: dict[Path, ParallelReader] = {}
        self._where = where if where is not None and where.type in _KINDS else None
        if self._where is None:
            return
        if self._where == torch.device("cuda"):  # a new thread's current device is the first one
            self._where = torch.device("cuda", torch.cuda.current_device())
        try:
            files = tuple(files)
            self._opened = self._starter.submit(self._open, files)
            self._started = {file: self._starter.submit(self._start, file) for file in files}
        except BaseException as error:  # Ctrl-C too: or the threads would read on
            self._close(error)
            raise

    def opened(self, file: Path) -> FileBeingRead | None:
        """Return one of the files; None for one that is not read ahead, or cannot be opened."""
        if self._where is None:
            return None
        self._opened.result()
        reader = self._readers.get(file)
        return None if reader is None else FileBeingRead(reader, self._started[file])

    def _open(self, files: Iterable[Path]) -> None:
        threads = background_threads()
        for file in files:
            beside = next(iter(self._readers.values()), None)
            try:
                self._readers[file] = ParallelReader(file, str(self._where), threads, beside)
            except (SafetensorError, ValueError, OSError, RuntimeError):  # the last: the device is not there
                continue  # whoever opens it once it was verified says what is wrong with it

    def _start(self, file: Path) -> None:
        if file in self._readers:
            self._readers[file].start(self._readers[file].tensors)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)
        if error is not None and self._where is not None and self._where.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a device that failed may fail here too: `error` says why
                torch.cuda.empty_cache()  # what was read for nothing

    def _close(self, error: BaseException | None) -> None:
        try:
            self._starter.shutdown(wait=error is not None, cancel_futures=True)
        finally:
            for reader in self._readers.values():
                reader.__exit__(None if error is None else type(error), error, None)


class FileBeingRead:
    """A file that is being read; what `ParallelReader` is for one that is read only now."""

    def __init__(self, reader: ParallelReader, started: Future[None]) -> None:
        self.tensors: dict[str, Stored] = reader.tensors
        self._reader, self._started = reader, started

    def start(self, names: Iterable[str]) -> None:
        """Wait until there is memory for all tensors of this file.

        Raises:
            torch.OutOfMemoryError: The device has no memory for them.
        """
        self._started.result()

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor, once all of it has arrived. Each is given out once.

        Raises:
            OSError: The file cannot be read, or has become shorter.
        """
        tensor = self._reader.take(name)
        if tensor.is_cuda:  # it was allocated on the stream of another thread
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor
