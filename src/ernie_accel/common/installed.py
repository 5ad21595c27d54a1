"""Know when a package may have been installed or removed: what is read of installed packages is kept until then."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from pathlib import Path
from typing import TypeAlias

#: The folders in which Python looks for packages, each with when something was last added or removed there.
Places: TypeAlias = tuple[tuple[str, int | None], ...]


def package_places() -> Places:
    """Return where Python looks for packages; equal to an earlier result if nothing was installed or removed since."""
    return tuple((folder, _changed_ns(folder)) for folder in sys.path)


@functools.lru_cache(maxsize=256)
def version_of(distribution: str, places: Places) -> str | None:
    """Return the version of an installed distribution, None if there is none; read once for each `places`.

    Reading it takes a millisecond, and a plan asks for two dozen.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _changed_ns(folder: str) -> int | None:
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return None
