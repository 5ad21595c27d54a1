"""Keep every write of a job inside its output folder: it is opened once, and no link below it is followed.

Where the system takes descriptors of folders (not on Windows) all names start at that descriptor, so that neither a
link made later nor a rename of the folder leads a write elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ernie_accel.batch.errors import BatchOutputError, Problem, shown
from ernie_accel.common.atomic import remove_if_there, remove_leftovers, write_atomically

_BY_DESCRIPTOR = hasattr(os, "O_NOFOLLOW") and {os.open, os.mkdir, os.stat, os.unlink, os.rename} <= os.supports_dir_fd
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


class OutputFolder:
    """The folder of a job or a service. Names of files start there, with '/' between parts on every system.

    The folder itself may be a link, as may any folder above it. It stays the one that was opened; `problem` says when
    another one has taken its path.

    Attributes:
        path: As it was given, for results and messages.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open the folder.

        Args:
            path: Where it is.
            create: Create it if it is missing, and make sure that files can be made there.

        Raises:
            BatchOutputError: It cannot be opened, or not be written to.
        """
        self.path = path
        self._absolute = os.path.abspath(path)  # the working directory may change
        self._descriptor: int | None = None
        try:
            if create:
                os.makedirs(self._absolute, exist_ok=True)
            if _BY_DESCRIPTOR:
                self._descriptor = os.open(self._absolute, _FOLDER)
                self._close = weakref.finalize(self, os.close, self._descriptor)
            self._identity = _identity(os.stat(self._absolute if self._descriptor is None else self._descriptor))
            if create:
                self._probe()
        except OSError as error:
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "a file of this name is in the way" if in_the_way else f"{error.strerror or error}"
            raise BatchOutputError(path, [(None, f"{reason}; choose a folder that can be written to")]) from error

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor is not None:
            self._close()

    def absolute(self, name: str) -> str:
        """Return where a file is, for what takes nothing but paths."""
        return os.path.join(self._absolute, *name.split("/"))

    def write(self, name: str, data: bytes) -> None:
        """Write a file in one step, see `write_atomically`; folders below this one are made as they are needed.

        Raises:
            OSError: It cannot be written, or one of its folders is a link.
        """
        with self._parent_of(name, make=True) as (last, parent):
            write_atomically(last, data, dir_fd=parent)

    def append(self, name: str, data: bytes) -> None:
        """Write at the end of a file, creating it, and its folders, if it is missing.

        Raises:
            OSError: It cannot be written, or it or one of its folders is a link.
        """
        with self._parent_of(name, make=True) as (last, parent):
            if (error := _is_link(name, _status(last, parent))) is not None:
                raise error
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_FOLLOW | getattr(os, "O_BINARY", 0)
            with open(os.open(last, flags, 0o666, dir_fd=parent), "ab") as file:
                file.write(data)

    def move(self, name: str, to: str) -> None:
        """Rename a file, making the folders of its new name, and replacing what has it.

        Raises:
            OSError: It cannot be renamed, or one of the folders is a link.
        """
        with self._parent_of(name) as (old, old_parent), self._parent_of(to, make=True) as (new, new_parent):
            os.replace(old, new, src_dir_fd=old_parent, dst_dir_fd=new_parent)

    def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            OSError: It cannot be removed, or one of its folders is a link.
        """
        with suppress(FileNotFoundError), self._parent_of(name) as (last, parent):
            remove_if_there(last, dir_fd=parent)

    def status(self, name: str) -> os.stat_result | None:
        """Return what has this name, a link's own status if it is one; None if there is nothing.

        Unlike the other methods this one follows links to folders, which `link_problems` finds: it is called for every
        row of a job.
        """
        if self._descriptor is None:
            return _status(os.path.join(self._absolute, name), None)
        return _status(name, self._descriptor)

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None if there is no file of this name, but nothing, a folder or a link."""
        found = self.status(name)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of what a file holds; None if it is no file or cannot be read."""
        if self.size(name) is None:
            return None
        try:
            with (
                self._parent_of(name) as (last, parent),
                open(os.open(last, os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_BINARY", 0), dir_fd=parent), "rb") as file,
            ):
                digest = hashlib.sha256()
                while block := file.read(2**16):
                    digest.update(block)
                return digest.hexdigest()
        except OSError:
            return None

    def problem(self) -> str | None:
        """Return why the path leads to this folder no more (None: it does)."""
        try:
            same = _identity(os.stat(self._absolute)) == self._identity
        except OSError:
            same = False
        return None if same else "it was moved, deleted or replaced while the job ran; move it back, and run again"

    def link_problems(self, names: Iterable[str]) -> list[Problem]:
        """Return which of these folders a job cannot use, since they are links or files."""
        problems: list[Problem] = []
        for name in names:
            found = self.status(name)
            if found is None:
                continue
            if (error := _is_link(name, found)) is not None:
                problems.append((None, f"{error.strerror}; replace it with a folder, or choose another output"))
            elif not stat.S_ISDIR(found.st_mode):
                problems.append(
                    (None, f"{shown(name)} is a file, and must be a folder; move it, or choose another output")
                )
        return problems

    def folders_inside(self, name: str) -> Iterator[str]:
        """Yield a folder and all those in it, links to folders included, but not what is behind these."""
        found = self.status(name)
        if found is None:
            return
        yield name
        if is_link(found):
            return
        start = self.absolute(name)
        for folder, inner, _ in os.walk(start):
            within = os.path.relpath(folder, start).replace(os.sep, "/")
            for each in inner:
                yield f"{name}/{each}" if within == "." else f"{name}/{within}/{each}"

    def remove_leftovers(self, names: Iterable[str]) -> None:
        """Remove what kills have left of files in these folders ("": this one); nobody else may be writing there.

        Raises:
            BatchOutputError: They cannot be removed, or one of the folders is a link.
        """
        for name in names:
            try:
                with self._parent_of(f"{name}/_" if name else "_") as (last, parent):
                    remove_leftovers(os.path.dirname(last) if parent is None else parent)
            except FileNotFoundError:
                continue
            except OSError as error:
                reason = f"what a killed run left there cannot be removed: {error.strerror or error}"
                raise BatchOutputError(self.path, [(None, f"{reason}; fix this, or choose another output")]) from error

    def _probe(self) -> None:
        """Make sure that files can be made here, by making one."""
        # Removed by anybody who removes leftovers, which does not matter here. Its name is its own: several processes
        # may be starting at once.
        name = f".{secrets.token_hex(8)}.tmp"
        with self._parent_of(name) as (last, parent):
            try:
                os.close(os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=parent))
            finally:
                remove_if_there(last, dir_fd=parent)

    @contextmanager
    def _parent_of(self, name: str, *, make: bool = False) -> Iterator[tuple[str, int | None]]:
        """Enter a file's folder, one part after the other; yield the file's name there, and the folder's descriptor.

        Without descriptors the name is a whole path, and links are only looked for beforehand.
        """
        *folders, last = name.split("/")
        if self._descriptor is None:
            at = self._absolute
            for part in folders:
                at = os.path.join(at, part)
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(at)
                if (error := _is_link(part, os.lstat(at))) is not None:
                    raise error
            yield os.path.join(at, last), None
            return
        opened = self._descriptor
        try:
            for part in folders:
                inner = _enter(part, opened, make=make)
                if opened != self._descriptor:
                    os.close(opened)
                opened = inner
            yield last, opened
        finally:
            if opened != self._descriptor:
                os.close(opened)


def is_link(found: os.stat_result) -> bool:
    """Return whether a status, taken without following it, is that of a link or of a Windows junction."""
    junction = getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)  # other tags are no links, such as OneDrive's
    return stat.S_ISLNK(found.st_mode) or (junction is not None and getattr(found, "st_reparse_tag", 0) == junction)


def _enter(part: str, parent: int, *, make: bool) -> int:
    """Open a folder inside another, which must not be a link."""
    if make:
        with suppress(FileExistsError):
            os.mkdir(part, dir_fd=parent)
    try:
        return os.open(part, _FOLDER | _NO_FOLLOW, dir_fd=parent)
    except OSError as error:
        raise _is_link(part, _status(part, parent)) or error from error


def _is_link(name: str, found: os.stat_result | None) -> OSError | None:
    """Return the error to raise if something is a link."""
    if found is None or not is_link(found):
        return None
    return OSError(errno.ELOOP, f"{shown(name)} is a link, which can lead out of the folder")


def _status(name: str, parent: int | None) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return None


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
