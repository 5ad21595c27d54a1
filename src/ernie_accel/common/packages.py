"""Which packages are installed here, looked up once while several libraries are imported that all ask."""

from __future__ import annotations

import csv
import importlib.metadata
import inspect
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_Declared = Callable[[importlib.metadata.Distribution], Iterable[str]]
_STANDARD = importlib.metadata.packages_distributions
#: Versions of Python whose own function looks for every file of every package, which takes most of its time.
_LOOKS_FOR_ALL_FILES = (3, 12) <= sys.version_info[:2] <= (3, 13)

#: What a package with unusual or damaged metadata raises.
_ODD = (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error)


class _Answer:
    """What ``importlib.metadata.packages_distributions`` returns, remembered until a block ends."""

    def __init__(self, look_up: Callable[[], Mapping[str, list[str]]]) -> None:
        self.look_up = look_up
        self._lock = threading.Lock()
        self._known: Mapping[str, list[str]] | None = None
        self._is_over = False

    def answer(self) -> Mapping[str, list[str]]:
        """Return the distributions that each top-level package is of."""
        known = self._known
        if known is None:
            quickly = _LOOKS_FOR_ALL_FILES and self.look_up is _STANDARD
            known = dict(_looked_up() if quickly else self.look_up())
            with self._lock:
                if not self._is_over:  # a library may have kept this function for later
                    self._known = known
        return {package: list(names) for package, names in known.items()}  # whoever asks may change it

    def end(self) -> None:
        """Remember nothing from now on."""
        with self._lock:
            self._known, self._is_over = None, True


class _Lookup:
    """An answer of ``importlib.metadata.packages_distributions``, shared by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._shared = _Answer(importlib.metadata.packages_distributions)

    def remember(self) -> None:
        with self._lock:
            if not self._users:
                self._shared = _Answer(importlib.metadata.packages_distributions)
                importlib.metadata.packages_distributions = self._shared.answer
            self._users += 1

    def forget(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._shared.end()
                # Somebody may have replaced it meanwhile.
                if importlib.metadata.packages_distributions == self._shared.answer:
                    importlib.metadata.packages_distributions = self._shared.look_up


def _looked_up() -> Mapping[str, list[str]]:
    """Return what ``packages_distributions`` does, without looking for files that make no difference."""
    declared: _Declared | None = getattr(importlib.metadata, "_top_level_declared", None)
    if declared is None:
        return _STANDARD()
    found: dict[str, list[str]] = defaultdict(list)
    try:
        for distribution in importlib.metadata.distributions():
            for package in declared(distribution) or _inferred(distribution):
                found[package].append(distribution.metadata["Name"])
    except _ODD:  # what exactly, Python's own function says
        return _STANDARD()
    return found


def _inferred(distribution: importlib.metadata.Distribution) -> Iterable[str]:
    """Return the top-level packages of which a distribution has at least one file."""
    record = distribution.read_text("RECORD")
    if record is None:
        inferred: Iterable[str] = importlib.metadata._top_level_inferred(distribution)  # type: ignore[attr-defined]
        return inferred
    files: dict[str, list[str]] = defaultdict(list)
    for path, *_ in csv.reader(record.splitlines()):
        first, is_within, _ = path.partition("/")
        name = first if is_within else inspect.getmodulename(first)
        if name is None and hasattr(importlib.metadata, "_get_toplevel_name"):  # of later releases, 3.13 among them
            name = first
        if name is not None:
            files[name].append(path)
    return [
        name
        for name, paths in files.items()
        if "." not in name and any(Path(str(distribution.locate_file(path))).exists() for path in paths)
    ]


_lookup = _Lookup()


@contextmanager
def packages_looked_up_once() -> Iterator[None]:
    """Have ``importlib.metadata.packages_distributions`` look at the disk once within the block, in the whole process.

    diffusers and some versions of transformers ask when they are imported. Blocks of several threads may overlap.
    """
    _lookup.remember()
    try:
        yield
    finally:
        _lookup.forget()
