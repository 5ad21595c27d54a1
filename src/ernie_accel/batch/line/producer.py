"""Hold a loaded pipe for as long as a service lives: rows come from any thread, and are batched as they come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ernie_accel.batch.engines.base import Engine
from ernie_accel.batch.engines.local import LocalEngine, Pipe
from ernie_accel.batch.errors import BatchInputError, BatchOutputError
from ernie_accel.batch.input.naming import REJECTED_FOLDER, collision_key
from ernie_accel.batch.input.options import check_arguments
from ernie_accel.batch.input.row import Row
from ernie_accel.batch.input.sift import Sift
from ernie_accel.batch.input.task import Task, edit_problems, tasks_of
from ernie_accel.batch.line.assembly import assemble
from ernie_accel.batch.line.line import Result
from ernie_accel.batch.output.folder import OutputFolder
from ernie_accel.batch.output.ledger import Ledger
from ernie_accel.batch.watch.metrics import MetricsServer
from ernie_accel.batch.watch.snapshot import Snapshot
from ernie_accel.batch.watch.telemetry import Telemetry
from ernie_accel.core.errors import ErnieAccelError


class Producer:
    """One production line that stays warm; use it as a context manager, or call `close`.

        with Producer(pipe, "out") as producer:
            future = producer.submit(Row(line=1, index=0, prompt="a red mug", file_name="mug.png"))
            print(future.result().path)

    Rows that wait together and are alike are rendered together. It keeps no ledger: a service has a database of its
    own, and a picture is in its place when its future is done.

    A name is taken while its picture is in progress, in every spelling that some file system treats as the same. Then
    it is forgotten, so that a service can run for years: a picture that exists is refused unless `overwrite` replaces
    it, and one that failed can be submitted again.
    """

    def __init__(
        self,
        pipe: Pipe | Engine,
        out: str | Path,
        *,
        seed: int = 0,
        overwrite: bool = False,
        batch_size: int | None = None,
        retries: int = 0,
        timeout_s: float | None = None,
        sift: Sift | None = None,
        facts: Mapping[str, str] | None = None,
        writers: int = 2,
        metrics: MetricsServer | None = None,
    ) -> None:
        """Start the line's thread; the arguments are those of `produce`.

        Raises:
            ErnieAccelError: An argument is out of range.
            BatchOutputError: The folder cannot be used.
        """
        check_arguments("Producer", locals())
        self._folder = OutputFolder(Path(out), create=True)
        if links := self._folder.link_problems(self._folder.folders_inside(REJECTED_FOLDER)):
            raise BatchOutputError(self._folder.path, links)
        self._engine = pipe if isinstance(pipe, Engine) else LocalEngine(pipe, max_batch=batch_size)
        if sift is not None and sift.refine and (problems := edit_problems(self._engine, (), refines=True)):
            raise BatchInputError(None, problems)
        self._owns_engine = self._engine is not pipe
        self._seed, self._overwrite = seed, overwrite
        self._telemetry = Telemetry(0)
        ledger = Ledger(self._folder, durable=False)
        ledger.open()
        self._line = assemble(
            self._engine,
            ledger,
            self._telemetry,
            self._folder,
            batch_size=batch_size,
            retries=retries,
            timeout_s=timeout_s,
            sift=sift,
            facts={**(facts or {}), **self._engine.identity()},
            writers=writers,
        )
        if metrics is not None:
            metrics.show(self._telemetry.snapshot)
        self._arrivals: queue.SimpleQueue[Task | None] = queue.SimpleQueue()  # None: no more will come
        self._lock = threading.Lock()
        self._futures: dict[str, Future[Result]] = {}  # by the path as the strictest file system compares it
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ernie-accel-producer", daemon=True)
        self._thread.start()

    def submit(self, row: Row) -> Future[Result]:
        """Queue a row, from any thread, and return its future; a row that fails is a `Result` with its error.

        Raises:
            BatchInputError: The engine cannot do what the row asks for.
            BatchOutputError: The picture exists, or is being made, or its folder is a link.
            ErnieAccelError: The producer is closed.
        """
        (task,) = tasks_of([row], self._seed, self._engine.default_size)
        if problems := [*edit_problems(self._engine, [task]), *self._engine.problems([(row.line, task.request)])]:
            raise BatchInputError(None, problems)
        if links := self._folder.link_problems([row.folder] if row.folder else []):
            raise BatchOutputError(self._folder.path, [(row.line, reason) for _, reason in links])
        key = collision_key(row.path)
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise ErnieAccelError("the producer is closed; create another")
            if key in self._futures:
                reason = f"{row.path!r} is being made; choose another name"
                raise BatchOutputError(self._folder.path, [(row.line, reason)])
            if not self._overwrite and self._folder.status(row.path) is not None:
                reason = f"{row.path!r} exists; allow overwriting or choose another name"
                raise BatchOutputError(self._folder.path, [(row.line, reason)])
            self._futures[key] = future
            self._arrivals.put(task)
        return future

    def snapshot(self) -> Snapshot:
        """Return counts, speed and latencies since the start."""
        return self._telemetry.snapshot()

    def close(self) -> None:
        """Make what was submitted, then stop; from here on nothing can be submitted."""
        with self._lock:
            self._closed = True
            self._arrivals.put(None)
        self._thread.join()

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        """Run the line until it is closed or broken; whatever ends it, every future gets an answer."""
        failures: list[BaseException] = []
        try:
            while self._take():
                self._answer(self._line.advance())
            while not self._line.idle or self._line.waiting or self._line.broken:
                self._answer(self._line.advance())
        except BaseException as error:  # all of them: this thread has nobody else to tell
            failures.append(error)
        try:
            with ExitStack() as closing:  # all of them, whatever one raises
                closing.callback(self._folder.close)
                if self._owns_engine:
                    closing.callback(self._engine.close)
                self._answer(self._line.close())
        except BaseException as error:
            failures.append(error)
        failures.append(ErnieAccelError("the producer was closed before the picture was made"))
        with self._lock:
            self._closed = True
            left, self._futures = self._futures, {}
        for future in left.values():
            # A caller may cancel one at any moment, until it is marked as running.
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(failures[0])

    def _take(self) -> bool:
        """Add what has arrived to the line, waiting only if it has nothing to do; False once no more will come."""
        wait = self._line.idle and not self._line.waiting and not self._line.broken
        while True:
            try:
                task = self._arrivals.get(block=wait)
            except queue.Empty:
                return True
            if task is None:
                return False
            wait = False
            if self._futures[collision_key(task.row.path)].set_running_or_notify_cancel():
                self._telemetry.expect(1)
                self._line.add([task])
            else:
                with self._lock:
                    del self._futures[collision_key(task.row.path)]

    def _answer(self, results: Iterable[Result]) -> None:
        for result in results:
            with self._lock:
                future = self._futures.pop(collision_key(result.row.path))
            future.set_result(result)
