"""Find the pictures that rows name: below one folder only, whole files, known by what they hold."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path

from ernie_accel.batch.engines.base import PictureFile
from ernie_accel.batch.errors import shown
from ernie_accel.batch.input.gate import text_problem
from ernie_accel.editing.files import PictureError, size_in

MAX_PICTURE_BYTES = 2**28
"""Of one file: 256 MiB."""


class PictureFolder:
    """The folder below which rows may name pictures. Each file is read once; rows may share it."""

    def __init__(self, root: Path) -> None:
        self._given = root
        self._root = Path(os.path.realpath(root))
        self._found: dict[str, PictureFile | str] = {}

    def find(self, text: str) -> PictureFile | str:
        """Return the picture that a row names, or why it cannot be used.

        Args:
            text: A path, relative to the folder or absolute; whatever it is, the file is below the folder.
        """
        if text not in self._found:
            try:
                self._found[text] = self._read(text)
            except PictureError as error:
                self._found[text] = str(error)
        return self._found[text]

    def _read(self, text: str) -> PictureFile:
        """Raises PictureError: It is outside of the folder, no file, too large, or no picture."""
        name = shown(text)
        if reason := text_problem(text):
            raise PictureError(f"{name} {reason}")
        path = Path(os.path.realpath(self._root / text))
        if not path.is_relative_to(self._root):  # also of what a link points to
            raise PictureError(
                f"{name} is outside of the folder for pictures, {shown(str(self._given))}; put the picture below it, "
                "or choose that folder (--image-root)"
            )
        try:
            kind = path.stat()
            if not stat.S_ISREG(kind.st_mode):
                raise PictureError(f"{name} is no file; name a picture")
            if kind.st_size > MAX_PICTURE_BYTES:
                raise PictureError(f"{name} has {kind.st_size:,} bytes; at most {MAX_PICTURE_BYTES:,} are read")
            data = path.read_bytes()
        except OSError as error:
            raise PictureError(
                f"{name} cannot be read ({error.strerror or error}) below {shown(str(self._given))}; correct it, or, "
                "if the column is your own, name it in extra_columns (--extra-columns)"
            ) from error
        width, height = size_in(io.BytesIO(data), name)
        return PictureFile(text, str(path), hashlib.sha256(data).hexdigest(), width, height)
