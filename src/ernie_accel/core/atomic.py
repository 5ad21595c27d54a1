"""Write a file so that it is there whole or not at all, whatever interrupts."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there in one step.

    Other programs see the old file or the new one, never a part. On any error or interrupt the old file stays
    and the temporary one beside it is removed.

    Raises:
        OSError: If the folder cannot be written to, or the disk is full.
    """
    # In the same folder, because a rename is only atomic within one file system. Not tempfile.mkstemp: its
    # files can be read by their owner only.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the final name on an empty file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already if the rename was reached


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writes in `folder` that were killed; nobody else may be writing there."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)
