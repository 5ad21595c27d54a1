"""Replace a folder as a whole: after any interrupt, even a kill, its name leads to the old content or the new.

A folder cannot be renamed onto another one. Where the system can exchange two names in one step (Linux, macOS), that is
the switch. Elsewhere (Windows, some network file systems) it takes two renames, between which a kill leaves the old
content beside its name: `current` finds it there, and the next `replace_folder` puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

#: renameat2(2): exchange both names; renamex_np(2) of macOS.
_RENAME_EXCHANGE, _RENAME_SWAP = 2, 2
_AT_FDCWD = -100
#: Errors of a kernel or a file system that cannot exchange names.
_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})


def current(folder: Path) -> Path:
    """Return where the content of `folder` is: there, or beside it if a switch was killed half-way."""
    if folder.exists():  # also "." and "/", which have no name and so nothing beside them
        return folder
    old = _set_aside(folder.resolve() if folder.is_symlink() else folder)
    return old if old.is_dir() else folder


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with an empty folder beside `folder`, then replace `folder`, which may exist, by it.

    If `write` raises, or anything interrupts, `folder` stays as it was. Everything is on the disk before the switch.
    What earlier calls left behind when they were killed is removed; what another process is writing is not.

    Raises:
        OSError: The folder cannot be written, or something else was put in its place meanwhile.
    """
    if folder.is_symlink():
        folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if current(folder) != folder:
        _set_aside(folder).rename(folder)
    _remove_leftovers(folder)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.unfinished")
    try:
        unfinished.mkdir()
        with _in_use(unfinished):
            write(unfinished)
            _flush(unfinished)
            _switch(unfinished, folder)
        _flush_names(folder.parent)
    finally:  # the unfinished content, or after an exchange the old one
        if unfinished.exists():
            shutil.rmtree(unfinished)


def _switch(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
    elif not exchange(new, folder):
        old = _set_aside(folder)
        try:
            folder.rename(old)
            new.rename(folder)
        finally:
            if not folder.exists():
                old.rename(folder)
        shutil.rmtree(old)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False, with nothing done, where system or file system cannot.

    Raises:
        OSError: It failed for another reason.
    """
    if sys.platform not in ("linux", "darwin"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        failed = library.renamex_np(*names, ctypes.c_uint(_RENAME_SWAP))
    elif hasattr(library, "renameat2"):  # glibc from 2.28
        failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _set_aside(folder: Path) -> Path:
    """Return where the old content waits between two renames: one name, so that it can be found again."""
    return folder.with_name(f".{folder.name}.ernie_accel.old")


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed calls left beside `folder`; whoever still writes holds a lock on it."""
    unfinished = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{16}}\.unfinished")
    for path in folder.parent.iterdir():
        if unfinished.fullmatch(path.name) and not path.is_symlink():
            with contextlib.suppress(BlockingIOError), _in_use(path):
                shutil.rmtree(path)
    if folder.exists() and _set_aside(folder).is_dir():
        shutil.rmtree(_set_aside(folder))


@contextlib.contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which a kill releases.

    Raises:
        BlockingIOError: Another process holds it, or there are no such locks here.
    """
    if sys.platform == "win32":
        _check_empty(folder)
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process holds it, or the file system has no locks
            _check_empty(folder)
        yield
    finally:
        os.close(descriptor)


def _check_empty(folder: Path) -> None:
    """Without locks, treat any content as still being written."""
    if any(folder.iterdir()):
        raise BlockingIOError(errno.EWOULDBLOCK, "another process may be writing here", str(folder))


def _flush(folder: Path) -> None:
    """Flush all files of a folder to disk; otherwise a power cut could leave the name on empty ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _flush_names(path)


def _flush_names(folder: Path) -> None:
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
