"""Compute checksums of large files on all cores: the SHA-256 of the SHA-256s of all 64 MiB pieces.

A plain SHA-256 of a file runs on one core, at 1 to 2 GB/s where the processor has instructions for it: slower than a
good disk. The pieces are independent of each other. They detect damage, not tampering: someone who changes a file can
also write its new checksum.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ernie_accel.common.cores import cores

PIECE_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**25  # a thread needs the interpreter's lock between two of them only, while the main one imports
_THREADS = 16
_blocks = threading.local()


class Checking:
    """The checksums of some files, computed by threads while the caller does something else.

    A context manager: leaving it stops the threads. The files are read one after the other, in the order given, and
    what was read stays in the system's cache: whoever asks for a checksum first and reads the file then, reads it
    at the speed of memory.
    """

    def __init__(self, files: Iterable[Path], threads: int | None = None) -> None:
        """Begin at once.

        Args:
            files: Their pieces are read side by side, whichever file they are of.
            threads: How many work; None: one for each core that this process may use, 16 at most.

        Raises:
            OSError: A file cannot be looked at.
        """
        sizes = {file: file.stat().st_size for file in files}
        # Hashing and reading release the interpreter's lock.
        self._pools = [ThreadPoolExecutor(threads or _most_threads(), "ernie-accel-checksum")]
        self._pieces: dict[Path, list[Future[bytes]]] = {}
        try:
            for file, size in sizes.items():
                starts = range(0, max(size, 1), PIECE_BYTES)
                self._pieces[file] = [self._pools[0].submit(_digest, file, start) for start in starts]
        except BaseException:  # Ctrl-C too: or the threads would read on
            self.close()
            raise

    def use_all_cores(self) -> None:
        """Have one thread for each core, 16 at most, do what no thread has begun: the caller only waits from now on."""
        pool = ThreadPoolExecutor(_most_threads(), "ernie-accel-checksum")
        self._pools.append(pool)
        for file, pieces in self._pieces.items():
            self._pieces[file] = [
                pool.submit(_digest, file, number * PIECE_BYTES) if piece.cancel() else piece
                for number, piece in enumerate(pieces)
            ]

    def of(self, file: Path) -> str:
        """Return the checksum of a file in hex, once it is known.

        Raises:
            OSError: The file cannot be read.
        """
        return hashlib.sha256(b"".join(piece.result() for piece in self._pieces[file])).hexdigest()

    def __enter__(self) -> Checking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=kind is not None or not all(piece.done() for of in self._pieces.values() for piece in of))

    def close(self, *, wait: bool = True) -> None:
        """Stop the threads, once they are through with the pieces under way.

        Args:
            wait: Return only then; threads with nothing left to do end by themselves.
        """
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools if wait else ():
            pool.shutdown()


def _most_threads() -> int:
    return min(_THREADS, cores())


def checksums(files: Iterable[Path], threads: int | None = None) -> list[str]:
    """Return the checksum of each file, in hex; arguments and errors are those of `Checking`."""
    files = list(files)
    with Checking(files, threads) as checking:
        return [checking.of(file) for file in files]


def _digest(path: Path, start: int) -> bytes:
    digest, left, block = hashlib.sha256(), PIECE_BYTES, _block()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(block[: min(left, _BLOCK_BYTES)])):
            digest.update(block[:count])
            left -= count
    return digest.digest()


def _block() -> memoryview:
    """Return this thread's block of memory. A new bytearray each time is cleared under the interpreter's lock."""
    if not hasattr(_blocks, "block"):
        _blocks.block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
    block: memoryview = _blocks.block
    return block
