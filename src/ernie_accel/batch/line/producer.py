"""Hold a loaded pipe for as long as a service lives: rows come from any thread, and are batched as they come."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ernie_accel.batch.engines.base import Engine, OnStep
from ernie_accel.batch.engines.local import LocalEngine, Pipe
from ernie_accel.batch.errors import BatchInputError, BatchOutputError, QueueFullError, WaitedTooLongError, shown
from ernie_accel.batch.input.naming import REJECTED_FOLDER, collision_key
from ernie_accel.batch.input.options import check_arguments
from ernie_accel.batch.input.row import Row
from ernie_accel.batch.input.sift import Sift
from ernie_accel.batch.input.task import Task, edit_problems, tasks_of
from ernie_accel.batch.line.assembly import assemble
from ernie_accel.batch.line.line import Result
from ernie_accel.batch.line.produce import refiner_facts, refining_engine
from ernie_accel.batch.output.folder import OutputFolder
from ernie_accel.batch.output.ledger import Ledger
from ernie_accel.batch.watch.metrics import MetricsServer
from ernie_accel.batch.watch.snapshot import Snapshot
from ernie_accel.batch.watch.telemetry import Telemetry
from ernie_accel.core.errors import ErnieAccelError


@dataclass(frozen=True)
class Progress:
    """How far the picture of a row is.

    Attributes:
        step: Denoising steps done; 0 when its batch begins.
        steps: Of how many; None while that is not known.
        batch_size: Pictures rendered together with it, itself included.
    """

    step: int
    steps: int | None
    batch_size: int


class _Order:
    """What somebody waits for: a row's future, until when its batch must begin, and who looks on meanwhile."""

    def __init__(self, wait_s: float | None, on_progress: Callable[[Progress], object] | None) -> None:
        self.future: Future[Result] = Future()
        self.begun = False
        self.wait_s, self.on_progress = wait_s, on_progress
        self._ends = None if wait_s is None else time.monotonic() + wait_s

    def begin(self) -> bool:
        """Mark the future as running, from when on it cannot be cancelled; False: it has been."""
        # A caller may cancel it at any moment, until it is marked.
        self.begun = self.begun or self.future.set_running_or_notify_cancel()
        return self.begun

    def is_waiting(self) -> bool:
        return not (self.begun or self.future.cancelled())

    def is_late(self) -> bool:
        return self._ends is not None and not self.begun and time.monotonic() > self._ends


class _Orders:
    """The orders that are not answered, by the path of the picture as the strictest file system compares it."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._lock = threading.Lock()
        self._orders: dict[str, _Order] = {}

    def __len__(self) -> int:
        return len(self._orders)

    def has(self, path: str) -> bool:
        return collision_key(path) in self._orders

    def add(self, path: str, order: _Order) -> None:
        with self._lock:
            self._orders[collision_key(path)] = order

    def pop(self, path: str) -> _Order:
        with self._lock:
            return self._orders.pop(collision_key(path))

    def waiting(self) -> int:
        with self._lock:
            return sum(order.is_waiting() for order in self._orders.values())

    def fail_all(self, error: BaseException) -> None:
        with self._lock:
            left, self._orders = self._orders, {}
        for order in left.values():
            if order.begin():
                order.future.set_exception(error)

    def begin(self, task: Task) -> bool:
        """Return whether a row whose turn it is shall be made; see `line.Orders`, also for the next two."""
        order = self._orders[collision_key(task.row.path)]
        late = order.is_late()
        if order.begin() and not late:
            return True
        self.pop(task.row.path)
        self._telemetry.expect(-1)
        if late and order.begun:
            order.future.set_exception(WaitedTooLongError(order.wait_s or 0.0))
        return False

    def dropped(self, task: Task) -> bool:
        order = self._orders[collision_key(task.row.path)]
        return order.future.cancelled() or order.is_late()

    def watched(self, tasks: Sequence[Task]) -> OnStep | None:
        orders = [self._orders[collision_key(task.row.path)] for task in tasks]
        watchers = [order.on_progress for order in orders if order.on_progress is not None]

        def on_step(step: int, steps: int | None) -> None:
            for watcher in watchers:
                watcher(Progress(step, steps, len(orders)))

        return on_step if watchers else None


class Producer:
    """One production line that stays warm; use it as a context manager, or call `close`.

        with Producer(pipe, "out") as producer:
            future = producer.submit(Row(line=1, index=0, prompt="a red mug", file_name="mug.png"))
            print(future.result().path)

    Rows that wait together and are alike are rendered together. It keeps no ledger: a service has a database of its
    own, and a picture is in its place when its future is done.

    The row that has waited longest is next, and those like it with it. Until its batch begins a row can be cancelled by
    its future's `cancel`: nothing is rendered for it then. `max_queue` bounds how many wait.

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
        refiner: Pipe | Engine | None = None,
        facts: Mapping[str, str] | None = None,
        writers: int = 2,
        metrics: MetricsServer | None = None,
        max_queue: int | None = None,
    ) -> None:
        """Start the line's thread; the arguments are those of `produce`, but for `max_queue`.

        Args:
            max_queue: Rows that may wait for their batch, beside those that are being made; None: any number.

        Raises:
            ErnieAccelError: An argument is out of range.
            BatchOutputError: The folder cannot be used.
        """
        check_arguments("Producer", locals())
        if max_queue is not None and (type(max_queue) is not int or max_queue < 1):
            raise ErnieAccelError(f"max_queue is {shown(max_queue)}; expected 1 or more, or None for any number")
        self._max_queue = max_queue
        self._folder = OutputFolder(Path(out), create=True)
        if links := self._folder.link_problems(self._folder.folders_inside(REJECTED_FOLDER)):
            raise BatchOutputError(self._folder.path, links)
        self._engine = pipe if isinstance(pipe, Engine) else LocalEngine(pipe, max_batch=batch_size)
        self._refiner = refining_engine(refiner, batch_size)
        refines = sift is not None and sift.refine
        if problems := edit_problems(self._engine, (), refines=refines, refiner=self._refiner):
            raise BatchInputError(None, problems)
        both = (self._engine, self._refiner)
        self._owned = [each for each in both if each is not None and each is not pipe and each is not refiner]
        self._seed, self._overwrite = seed, overwrite
        self._telemetry = Telemetry(0)
        self._orders = _Orders(self._telemetry)
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
            refiner=self._refiner,
            facts={**(facts or {}), **self._engine.identity(), **refiner_facts(self._refiner)},
            writers=writers,
            orders=self._orders,
        )
        if metrics is not None:
            metrics.show(self._telemetry.snapshot)
        self._arrivals: queue.SimpleQueue[Task | None] = queue.SimpleQueue()  # None: no more will come
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ernie-accel-producer", daemon=True)
        self._thread.start()

    def submit(
        self, row: Row, *, wait_s: float | None = None, on_progress: Callable[[Progress], object] | None = None
    ) -> Future[Result]:
        """Queue a row, from any thread, and return its future; a row that fails is a `Result` with its error.

        Args:
            row: What to make.
            wait_s: Seconds that the row waits for its batch at most. One that is not begun by then is not made, and its
                future has a `WaitedTooLongError`, as soon as the batch under way is done. None: no limit.
            on_progress: Called from other threads, and not for long: when the row's batch begins, and after each step
                of a pipe that tells. What it raises fails the batch.

        Raises:
            BatchInputError: The engine cannot do what the row asks for.
            BatchOutputError: The picture exists, or is being made, or its folder is a link.
            QueueFullError: `max_queue` rows wait already.
            ErnieAccelError: The producer is closed, or `wait_s` is out of range.
        """
        if wait_s is not None and not wait_s >= 0:
            raise ErnieAccelError(f"wait_s is {shown(wait_s)}; expected seconds, 0 or more")
        (task,) = tasks_of([row], self._seed, self._engine.default_size)
        if problems := [
            *edit_problems(self._engine, [task], refines=self._refiner is not None, refiner=self._refiner),
            *self._engine.problems([(row.line, task.request)]),
        ]:
            raise BatchInputError(None, problems)
        if links := self._folder.link_problems([row.folder] if row.folder else []):
            raise BatchOutputError(self._folder.path, [(row.line, reason) for _, reason in links])
        order = _Order(wait_s, on_progress)
        with self._lock:
            if self._closed:
                raise ErnieAccelError("the producer is closed; create another")
            if self._orders.has(row.path):
                reason = f"{row.path!r} is being made; choose another name"
                raise BatchOutputError(self._folder.path, [(row.line, reason)])
            if not self._overwrite and self._folder.status(row.path) is not None:
                reason = f"{row.path!r} exists; allow overwriting or choose another name"
                raise BatchOutputError(self._folder.path, [(row.line, reason)])
            if self._max_queue is not None and (waiting := self._orders.waiting()) >= self._max_queue:
                raise QueueFullError(waiting, self._max_queue)
            self._orders.add(row.path, order)
            self._arrivals.put(task)
        return order.future

    @property
    def waiting(self) -> int:
        """How many rows wait for their batch."""
        return self._orders.waiting()

    @property
    def closed(self) -> bool:
        """Whether it takes no more rows: it was closed, the engine is lost, or pictures cannot be written."""
        return self._closed

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
                for engine in self._owned:
                    closing.callback(engine.close)
                self._answer(self._line.close())
        except BaseException as error:  # likewise
            failures.append(error)
        failures.append(ErnieAccelError("the producer was closed before the picture was made"))
        with self._lock:
            self._closed = True
        self._orders.fail_all(failures[0])

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
            self._telemetry.expect(1)
            self._line.add([task])

    def _answer(self, results: Iterable[Result]) -> None:
        for result in results:
            self._orders.pop(result.row.path).future.set_result(result)
