"""Read pictures from files that may come from anybody. Loads no torch."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ernie_accel.core.errors import ErnieAccelError

#: What is read from files. Nothing that runs a program (EPS starts Ghostscript) or is drawn by a script.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
#: Pixels of a picture in a file, 64 megapixels: a small file may claim to hold a huge one.
MAX_PIXELS = 2**26

_ORIENTATION = 0x0112  # of EXIF
_SIDEWAYS = range(5, 9)  # its values for pictures that lie on a side
#: What PIL raises for damaged files, besides OSError, of which its own "cannot identify" is one.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class PictureError(ErnieAccelError, ValueError):
    """A picture, a mask or a strength that cannot be used; nothing was drawn."""


def read_picture(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Return the picture in a file, turned as its camera says.

    Args:
        file: Its path, or what it holds.
        name: What messages call it; None: the path.

    Raises:
        PictureError: There is none, it is damaged, of another format or too large.
    """
    name = name or (os.fspath(file) if isinstance(file, (str, os.PathLike)) else "the file")
    try:
        with Image.open(file, formats=FORMATS) as opened:
            _check_pixels(opened, name)
            opened.load()
            return ImageOps.exif_transpose(opened)
    except PictureError:
        raise
    except _DAMAGED as error:
        raise _unreadable(name, error) from error


def size_in(file: BinaryIO, name: str) -> tuple[int, int]:
    """Return width and height of the picture in a file, by its header, as `read_picture` would return it.

    Raises:
        PictureError: There is none, or it is of another format or too large.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            _check_pixels(opened, name)
            sideways = opened.getexif().get(_ORIENTATION) in _SIDEWAYS
            return (opened.height, opened.width) if sideways else (opened.width, opened.height)
    except PictureError:
        raise
    except _DAMAGED as error:
        raise _unreadable(name, error) from error


def _check_pixels(opened: Image.Image, name: str) -> None:
    if opened.width * opened.height > MAX_PIXELS:
        size = f"{opened.width} x {opened.height}"
        raise PictureError(f"{name} has {size} pixels; at most {MAX_PIXELS:,} are read")


def _unreadable(name: str, error: Exception) -> PictureError:
    if isinstance(error, UnidentifiedImageError):
        what = "it is none, or damaged"  # Pillow's own words name the object in memory
    else:
        what = (isinstance(error, OSError) and error.strerror) or str(error)
    return PictureError(f"{name} cannot be read as a picture ({what}); expected {', '.join(FORMATS)}")
