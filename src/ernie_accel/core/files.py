"""Check where results are to go before the work that makes them: nothing is created here."""

from __future__ import annotations

import os
from pathlib import Path

from ernie_accel.core.errors import ErnieAccelError


def check_file(path: Path, suffix: str, option: str = "--out") -> None:
    """Refuse a file that could not be written.

    Raises:
        ErnieAccelError: It is a folder, has another suffix than `suffix`, or there is no place for it.
    """
    if path.is_dir():
        raise ErnieAccelError(f"{option} {path} is a folder; name a file in it: {path / f'picture{suffix}'}")
    if path.suffix.lower() != suffix:
        named = path.with_suffix(suffix) if path.suffix else Path(f"{path}{suffix}")
        raise ErnieAccelError(f"{option} {path}: file name {path.name!r} does not end in {suffix!r}; name it {named}")
    _check_place(path, path.parent, option)


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that could not be made, or not be written to.

    Raises:
        ErnieAccelError: It is a file, or there is no place for it.
    """
    _check_place(path, path, option)


def _check_place(path: Path, folder: Path, option: str) -> None:
    there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        raise ErnieAccelError(f"{option} {path}: {there} is a file, and a folder is needed there; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ErnieAccelError(f"{option} {path}: the folder {there} cannot be written to; name another place")
