"""Find the pictures and LoRAs that rows name: below one folder only, plain files, known by what they hold."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from ernie_accel.batch.engines.base import AdapterFile, PictureFile
from ernie_accel.batch.errors import shown
from ernie_accel.batch.input.gate import text_problem
from ernie_accel.editing.files import PictureError, size_in

F = TypeVar("F", PictureFile, AdapterFile)

MAX_PICTURE_BYTES = 2**28
"""Of one file: 256 MiB."""

MAX_ADAPTER_BYTES = 2**33
"""Of one LoRA: 8 GiB."""


_MAX_HEADER = 100_000_000  # bytes, as safetensors has it


class _UnusableError(Exception):
    """A file that a row cannot name; caught inside this module."""


class _Folder(ABC, Generic[F]):
    """The folder below which rows may name files of one kind. Each file is read once; rows may share it."""

    kind: ClassVar[str]
    option: ClassVar[str]
    most_bytes: ClassVar[int]

    def __init__(self, root: Path) -> None:
        self._given = root
        self._root = Path(os.path.realpath(root))
        self._found: dict[str, F | str] = {}

    def find(self, text: str) -> F | str:
        """Return the file that a row names, or why it cannot be used.

        Args:
            text: A path, relative to the folder or absolute; whatever it is, the file is below the folder.
        """
        if text not in self._found:
            try:
                path = self._path(text)
                self._found[text] = self._known(text, str(path), path.read_bytes())
            except (_UnusableError, PictureError) as error:
                self._found[text] = str(error)
            except OSError as error:
                self._found[text] = (
                    f"{shown(text)} cannot be read ({error.strerror or error}) below {shown(str(self._given))}; "
                    "correct it, or, if the column is your own, name it in extra_columns (--extra-columns)"
                )
        return self._found[text]

    @abstractmethod
    def _known(self, text: str, path: str, data: bytes) -> F:
        """Return what is known of a file; raises `_UnusableError` or `PictureError`."""

    def _path(self, text: str) -> Path:
        """Return where a file is; raises `_UnusableError`, or OSError if there is none."""
        name = shown(text)
        if reason := text_problem(text):
            raise _UnusableError(f"{name} {reason}")
        if "\0" in text:
            raise _UnusableError(f"{name} has a NUL character")
        path = Path(os.path.realpath(self._root / text))
        if not path.is_relative_to(self._root):  # also of what a link points to
            raise _UnusableError(
                f"{name} is outside of the folder for {self.kind}s, {shown(str(self._given))}; put the {self.kind} "
                f"below it, or choose that folder ({self.option})"
            )
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _UnusableError(f"{name} is no file; name a {self.kind}")
        if found.st_size > self.most_bytes:
            raise _UnusableError(f"{name} has {found.st_size:,} bytes; at most {self.most_bytes:,} are read")
        return path


class PictureFolder(_Folder[PictureFile]):
    """The folder below which rows may name pictures."""

    kind = "picture"
    option = "--image-root"
    most_bytes = MAX_PICTURE_BYTES

    def _known(self, text: str, path: str, data: bytes) -> PictureFile:
        width, height = size_in(io.BytesIO(data), shown(text))
        return PictureFile(text, path, hashlib.sha256(data).hexdigest(), width, height)


class AdapterFolder(_Folder[AdapterFile]):
    """The folder below which rows may name LoRAs."""

    kind = "LoRA"
    option = "--lora-root"
    most_bytes = MAX_ADAPTER_BYTES

    def _known(self, text: str, path: str, data: bytes) -> AdapterFile:
        # Only that it is one: a pickle never comes this far. Whether it fits the model shows once that is loaded.
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length]) if 2 <= length <= min(len(data) - 8, _MAX_HEADER) else None
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict) or not header.keys() - {"__metadata__"}:
            raise _UnusableError(f"{shown(text)} is no safetensors file with weights; only those are read")
        return AdapterFile(text, path, hashlib.sha256(data).hexdigest())
