"""Which packages are installed here, looked up once while several libraries are imported that all ask."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


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
            known = self._known = dict(self._look_up())
        return {package: list(names) for package, names in known.items()}  # whoever asks may change it


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
