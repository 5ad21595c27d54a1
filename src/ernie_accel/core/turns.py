"""Let threads take turns: one call at a time of the optimized pipes that have a component in common.

A pipe keeps the state of a picture in its scheduler, and transforms keep buffers, graphs and caches beside a component.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ernie_accel.core.components import Pipeline, inside_of, modules_of
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import CallLayer, Inner, add_layer, has_layer, remove_layers

_guard = threading.Lock()
_numbers = itertools.count()


class _Lock:
    """A lock that threads get in the order in which they asked; the one that has it may take it again.

    Python's own goes to whoever is fastest: a thread that calls a pipe in a loop would keep all others from it.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def __enter__(self) -> None:
        me, gate = threading.get_ident(), threading.Lock()
        with self._guard:
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return
            gate.acquire()
            self._waiting.append((me, gate))
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C: leave the queue, or hand on what has just been handed over
            with self._guard:
                waits = (me, gate) in self._waiting
                if waits:
                    self._waiting.remove((me, gate))
            if not waits:
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                self._owner, gate = self._waiting.popleft()
                self._depth = 1
                gate.release()


#: The lock of each component, and a number: all threads take their locks in the same order.
_locks: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, _Lock]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Turns(CallLayer):
    """Wait, around everything else, until no other thread is in a call of a pipe with one of these components."""

    outermost: ClassVar[bool] = True

    def call(
        self, inner: Inner, signature: inspect.Signature, pipe: Pipeline, *args: object, **kwargs: object
    ) -> object:
        with turn_of(pipe):
            return inner(pipe, *args, **kwargs)


def take_turns(pipe: Pipeline) -> None:
    """Let threads that call `pipe` take turns, in place; a no-op if they already do."""
    if not has_layer(pipe, Turns):
        add_layer(pipe, Turns(), Undo())


def stop_taking_turns(pipe: Pipeline) -> None:
    """Undo `take_turns`; a no-op if there is nothing to undo."""
    remove_layers(pipe, Turns)


@contextlib.contextmanager
def turn_of(pipe: Pipeline) -> Iterator[None]:
    """Wait, before the block, until no other thread is in a call of a pipe with one of these components."""
    with _guard:
        parts = map(inside_of, modules_of(pipe).values())  # one pipe may have it with a wrapper of torch.compile
        locks = [_locks.setdefault(part, (next(_numbers), _Lock())) for part in parts]
    with contextlib.ExitStack() as held:
        for _, lock in sorted(locks, key=lambda numbered: numbered[0]):
            held.enter_context(lock)
        yield
