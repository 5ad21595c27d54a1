"""Render in a child process: a step that hangs or a crash costs one batch, not the job.

Nothing can end a hung kernel from within its process, and after a CUDA error that sticks no call in it succeeds. So
the pipeline lives in a child: a batch that is out of time has its child killed, and the next batch gets a new one.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

from ernie_accel.batch.engines.base import (
    BatchTimeoutError,
    Engine,
    EngineLostError,
    Outcome,
    Request,
    WorkerLostError,
    in_batches,
)
from ernie_accel.batch.engines.local import CallSignature, LocalEngine, Pipe
from ernie_accel.batch.errors import Problem
from ernie_accel.core.errors import ErnieAccelError

_STOP_S = 5.0  # seconds a child has to end by itself


class RemoteError(ErnieAccelError):
    """What went wrong in another process, as its class and message; the original need not be picklable."""


class ProcessEngine(Engine):
    """A pipeline in a child process, loaded there by a function that can be pickled.

    What was encoded ahead is lost with a child: the next one encodes the prompts of each batch with the batch. A child
    has as many of torch's threads as this process: sums are split among them, so that their number shows in last bits.
    """

    edits = adapts = True

    def __init__(
        self,
        load: Callable[[], Pipe],
        *,
        max_batch: int | None = None,
        free_encoders: bool = False,
        load_timeout_s: float = 1800,
    ) -> None:
        """Start the child and load the pipeline in it.

        Args:
            load: Returns the pipeline; a function of a module, or a `functools.partial` of one.
            max_batch: As for `LocalEngine`.
            free_encoders: As for `LocalEngine`.
            load_timeout_s: Seconds that loading may take.

        Raises:
            EngineLostError: The pipeline could not be loaded.
        """
        self._load = load
        self._load_timeout_s = load_timeout_s
        self._options = {"max_batch": max_batch, "free_encoders": free_encoders}
        self._buckets: OrderedDict[Request, Hashable] = OrderedDict()  # as the child reported them
        self._child: multiprocessing.process.BaseProcess | None = None
        self._start()
        self.max_batch = int(self._call("max_batch"))
        self.ahead, self.in_rounds = int(self._call("ahead")), bool(self._call("in_rounds"))
        self._identity: dict[str, str] = self._call("identity")
        self._signature: CallSignature = self._call("signature")

    def render(self, requests: Sequence[Request], timeout_s: float | None = None) -> Sequence[Outcome]:
        """Have the child render; see `Engine.render`."""
        if self._child is None:
            self._start()
        outcomes: Sequence[Outcome] = self._call("render", list(requests), timeout_s=timeout_s)
        return outcomes

    def prepare(self, requests: Sequence[Request], timeout_s: float | None = None) -> None:
        """Have the child enhance and encode the prompts; see `Engine.prepare`."""
        if self._child is None:
            self._start()
        for some in in_batches(requests):
            buckets = self._call("encode", list(some), timeout_s=timeout_s)
            self._buckets.update(zip(some, buckets, strict=True))
        while len(self._buckets) > 4 * self.ahead:
            self._buckets.popitem(last=False)
        self._call("free", timeout_s=timeout_s)

    def bucket(self, request: Request) -> Hashable:
        """Return the request's shape and the class of its prompt's length, where the child has reported it."""
        return self._buckets.get(request, (request.shape(), 0))

    def problems(self, requests: Sequence[tuple[int, Request]]) -> list[Problem]:
        """Return what the child's pipe has no argument for; the child, which may be rendering, is not asked."""
        return self._signature.problems(requests)

    def identity(self) -> Mapping[str, str]:
        """Return the pipeline's class."""
        return self._identity

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._connection.close()  # the child ends when it next looks
            self._child.join(_STOP_S)
            self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # not fork: CUDA does not survive it
        self._connection, theirs = context.Pipe()
        torch = sys.modules.get("torch")  # not imported for this
        threads = None if torch is None else torch.get_num_threads()
        arguments = (theirs, self._load, self._options, threads)
        self._child = context.Process(target=_serve, args=arguments, name="ernie-accel-engine", daemon=True)
        self._child.start()
        theirs.close()
        try:
            self._receive(self._load_timeout_s)
        except (WorkerLostError, BatchTimeoutError, RemoteError) as error:
            self._kill()
            raise EngineLostError(f"the pipeline could not be loaded in a child process: {error}") from error

    def _call(self, method: str, *arguments: object, timeout_s: float | None = None) -> Any:
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._died() from error
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float | None) -> object:
        try:
            if not self._connection.poll(timeout_s):
                self._kill()
                raise BatchTimeoutError(timeout_s or 0.0)
            good, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        except KeyboardInterrupt:
            self._kill()  # or its late answer would be read as the next one
            raise
        if not good:
            raise value
        return value

    def _died(self) -> WorkerLostError:
        child = self._child
        if child is not None:
            child.join(_STOP_S)
        code = child.exitcode if child is not None else None
        self._kill()
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return WorkerLostError(f"the process that rendered it died ({how})")

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._connection.close()
            self._child = None


def portable(error: Exception) -> Exception:
    """Return an error of ours as it is, and any other in words."""
    return error if isinstance(error, ErnieAccelError) else RemoteError(f"{type(error).__name__}: {error}")


def _serve(connection: Connection, load: Callable[[], Pipe], options: Mapping[str, Any], threads: int | None) -> None:
    """Load the pipeline and answer calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides what it means
    engine: LocalEngine | None = None
    call: tuple[str, tuple[object, ...]] | None = None
    while True:
        try:
            if engine is None:
                torch = importlib.import_module("torch")  # as part of loading: a first batch must not pay for it
                if threads is not None:
                    torch.set_num_threads(threads)
                engine = LocalEngine(load(), **options)
                answer: object = None
            elif call is not None:
                answer = getattr(engine, call[0])
                answer = answer(*call[1]) if callable(answer) else answer
                if call[0] == "render":
                    outcomes = cast(Sequence[Outcome], answer)
                    answer = [portable(o) if isinstance(o, Exception) else o for o in outcomes]
            reply = (True, answer)
        # Broad on purpose: whatever a pipe raises is an answer.
        except Exception as error:
            reply = (False, portable(error))
        try:
            connection.send(reply)
            if engine is None:
                return
            call = connection.recv()
        except (EOFError, OSError):  # the parent closed its end, or died
            return
