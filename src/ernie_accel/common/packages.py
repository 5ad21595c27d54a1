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


class _Lookup:
    """An answer of ``importlib.metadata.packages_distributions``, which several threads may have remembered at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by = 0  # how many have it remembered
        self._look_up = importlib.metadata.packages_distributions
        self._known: dict[str, list[str]] | None = None

    def remember(self) -> None:
        with self._lock:
            if not self._by:
                self._look_up, self._known = importlib.metadata.packages_distributions, None
                importlib.metadata.packages_distributions = self.answer
            self._by += 1

    def forget(self) -> None:
        with self._lock:
            self._by -= 1
            if not self._by:
                self._known = None
                if importlib.metadata.packages_distributions == self.answer:  # or somebody has replaced it meanwhile
                    importlib.metadata.packages_distributions = self._look_up

    def answer(self) -> Mapping[str, list[str]]:
        """Return the distributions that each top-level package is of."""
        known = self._known
        if known is None:
            quickly = _LOOKS_FOR_ALL_FILES and self._look_up is _STANDARD
            known = self._known = dict(_looked_up() if quickly else self._look_up())
        return {package: list(names) for package, names in known.items()}  # whoever asks may change it


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
    except Exception:  # whatever is odd about a package, Python's own function says
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

    diffusers and many a transformers ask when they are imported, 0.8 s each where a few hundred packages are installed.
    Blocks of several threads may overlap.
    """
    _lookup.remember()
    try:
        yield
    finally:
        _lookup.forget()
