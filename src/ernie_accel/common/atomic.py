"""Write a file whole or not at all, whatever interrupts the write."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress

_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.tmp")


def write_atomically(
    path: str | os.PathLike[str], data: bytes, *, dir_fd: int | None = None, temporary: str | None = None
) -> None:
    """Write `data` to `path`, replacing an existing file in one step.

    Other programs see the old file or the new one, never a part. On any error or interrupt the old file stays
    and the temporary one beside it is removed. A link of this name is replaced, never followed.

    Args:
        path: Path of the file.
        data: The whole content.
        dir_fd: A descriptor of the folder that a relative `path` starts from; None: the working directory.
        temporary: Name of the temporary file, for a file that only one program writes. If a kill leaves it behind, the
            next write removes it. None: a unique name, see `remove_leftovers`.

    Raises:
        OSError: If the folder cannot be written to, or the disk is full.
    """
    # In the same folder, because a rename is only atomic within one file system. Not tempfile.mkstemp: its
    # files can be read by their owner only.
    beside = os.path.join(os.path.dirname(path), temporary or f".{secrets.token_hex(8)}.tmp")
    if temporary is not None:
        remove_if_there(beside, dir_fd=dir_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # O_EXCL follows no link
    try:
        with open(os.open(beside, flags, 0o666, dir_fd=dir_fd), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the final name on an empty file
        os.replace(beside, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    finally:
        remove_if_there(beside, dir_fd=dir_fd)  # gone already if the rename was reached


def remove_if_there(path: str, *, dir_fd: int | None = None) -> None:
    """Remove a file or a link; do nothing if there is none."""
    with suppress(FileNotFoundError):
        os.unlink(path, dir_fd=dir_fd)


def remove_leftovers(folder: str | int) -> None:
    """Remove the temporary files that killed writes left in `folder`; nobody else may be writing there.

    Args:
        folder: Its path, or a descriptor of it where the system takes one.
    """
    for name in os.listdir(folder):
        if _LEFTOVER.fullmatch(name):
            if isinstance(folder, int):
                remove_if_there(name, dir_fd=folder)
            else:
                remove_if_there(os.path.join(folder, name))
