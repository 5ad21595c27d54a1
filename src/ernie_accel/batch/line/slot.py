"""One thread that renders, beside the one that answers: a picture reaches whoever waits while the next is rendered."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class Slot:
    """Runs calls one after the other in a thread of its own, for which no exit of the process waits.

    For the threads of an executor an exit does, even if a pipe hangs in one.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="ernie-accel-slot", daemon=True).start()

    def run(self, future: Future[_T], call: Callable[[], _T]) -> None:
        """Have `call` run, and `future` hold what it returns or raises."""
        self._calls.put(functools.partial(_settle, future, call))

    def close(self) -> None:
        """End the thread after the calls that it was given; do not wait for it."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # what it holds would live until the next one comes


def _settle(future: Future[_T], call: Callable[[], _T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # all of them: the thread has nobody else to tell
        future.set_exception(error)
