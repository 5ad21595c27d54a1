"""START HERE: the production line. Rows wait in the schedule, the engine renders them, the writer makes files.

    schedule -> engine (in `slots` batches at once) -> writer -> ledger
        ^_________________________|   a batch that fails comes back: smaller, alone, or for another attempt

`produce` runs a line until it is empty; a `Producer` keeps one for as long as a service lives. Whatever happens,
each row ends done, failed or rejected with its reason, or pending.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ernie_accel.batch.engines.base import (
    ON_STEP,
    Begun,
    Engine,
    EngineLostError,
    OnStep,
    WorkerLostError,
    is_out_of_memory,
)
from ernie_accel.batch.errors import BatchOutputError, Problem
from ernie_accel.batch.input.row import Row
from ernie_accel.batch.input.sift import Finding
from ernie_accel.batch.input.task import SECOND_PASS_GUIDANCE, SecondPass, Task
from ernie_accel.batch.line.schedule import Schedule
from ernie_accel.batch.line.slot import Slot
from ernie_accel.batch.output.folder import OutputFolder
from ernie_accel.batch.output.ledger import REJECTED, Ledger
from ernie_accel.batch.output.writer import Writer, Written, rejected_path
from ernie_accel.batch.watch.telemetry import Telemetry
from ernie_accel.core.errors import ErnieAccelError

_log = logging.getLogger(__name__)

_MAX_LOST = 2  # a row under which workers died this often again, alone, is taken to be the cause


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one row.

    Attributes:
        row: The row.
        seed: The seed that its picture was made with.
        seconds: From the start of its batch to the finished file.
        path: The picture; None if there is none in its place.
        error: Why there is none; starts with "rejected: " where a picture was sifted out.
        batch_size: Pictures rendered together with it, itself included.
    """

    row: Row
    seed: int
    seconds: float
    path: Path | None = None
    error: str | None = None
    batch_size: int = 1

    @property
    def rejected(self) -> bool:
        """Whether there is a picture, and it was sifted out."""
        return self.error is not None and self.error.startswith(REJECTED)


@dataclass(eq=False)
class _Batch:
    """A batch under way.

    Attributes:
        tasks: Its rows.
        begun: What `Telemetry.begun` returned.
        measured: Whether it was waited for, so that its time says something about its size.
        start: The `time.perf_counter()` of its beginning.
        left: Pictures that the device is still at work on.
        rendered_s: Seconds from the beginning until the last of those that are ready.
    """

    tasks: list[Task]
    begun: float
    measured: bool
    start: float = field(default_factory=time.perf_counter)
    left: int = 0
    rendered_s: float = 0.0


class Orders(Protocol):
    """Who waits for the rows of a service: they may not want them any more, and may want to see how they get on."""

    def begin(self, task: Task) -> bool:
        """Return whether a row whose turn it is shall be made; asked by the schedule."""

    def dropped(self, task: Task) -> bool:
        """Return whether nobody wants a row any more; but it may still be wanted when its turn comes."""

    def watched(self, tasks: Sequence[Task]) -> OnStep | None:
        """Return what to call as steps of a batch are done; None: nobody looks."""


class Line:
    """Moves rows from the schedule through the engine and the writer into the ledger; not thread-safe."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        writer: Writer,
        schedule: Schedule,
        telemetry: Telemetry,
        folder: OutputFolder,
        *,
        retries: int = 0,
        rerolls: int = 0,
        refiner: Engine | None = None,
        timeout_s: float | None = None,
        orders: Orders | None = None,
    ) -> None:
        """Connect the parts; nothing begins before `advance`.

        Args:
            engine: Renders.
            ledger: Keeps the states.
            writer: Makes files.
            schedule: Makes batches.
            telemetry: Counts.
            folder: The output folder.
            retries: Further attempts for a row that fails.
            rerolls: Further seeds for a row whose picture is sifted out.
            refiner: Draws a picture that is sifted out for a grid once more from itself; None: nothing does.
            timeout_s: Seconds for a batch; None: no limit.
            orders: Of a service; None: every row is made.
        """
        self._engine, self._ledger, self._writer, self._schedule = engine, ledger, writer, schedule
        self._telemetry, self._folder = telemetry, folder
        self._retries, self._rerolls, self._timeout_s = retries, rerolls, timeout_s
        self._refiner = refiner
        self._refining = threading.BoundedSemaphore(1 if refiner is None else refiner.slots)
        self._orders = orders
        # A single slot renders in the caller's thread: Ctrl-C then reaches a hung pipe, and CUDA has one thread. Where
        # somebody waits for each row, it has a thread of its own: a picture is answered while the next is rendered.
        self._pool = ThreadPoolExecutor(engine.slots, "ernie-accel-slot") if engine.slots > 1 else None
        self._slot = Slot() if engine.slots == 1 and orders is not None else None
        self._unprepared: deque[Task] = deque()
        self._prepared: list[Task] = []  # ahead of those in the schedule
        self._rendering: dict[Future[Sequence[Begun]], _Batch] = {}
        self._deferred: dict[Task, _Batch] = {}  # rows whose pictures the device is still at work on
        self._entries: list[dict[str, object]] = []  # settled, and not in the ledger yet
        self._unwritten: list[Problem] = []
        self._fatal: Exception | None = None

    def add(self, tasks: Iterable[Task]) -> None:
        """Queue rows; those alike come together, and those of one LoRA; otherwise they keep their order."""
        shapes: dict[Hashable, list[Task]] = {}
        for task in tasks:
            shapes.setdefault(task.request.shape(), []).append(task)
        by_adapter: dict[str | None, list[Task]] = {}
        for group in shapes.values():
            lora = group[0].request.lora
            by_adapter.setdefault(None if lora is None else lora.digest, []).extend(group)
        for group in by_adapter.values():
            self._unprepared.extend(group)

    @property
    def idle(self) -> bool:
        """Whether nothing is being rendered or written."""
        return not self._rendering and not self._writer.pending

    @property
    def broken(self) -> bool:
        """Whether `advance` will raise once nothing is under way any more."""
        return self._fatal is not None

    @property
    def waiting(self) -> int:
        """How many rows have not been begun."""
        return len(self._schedule) + len(self._prepared) + len(self._unprepared)

    def advance(self, *, start_more: bool = True) -> list[Result]:
        """Begin batches while there are free slots, and return the rows that are final since the last call.

        Blocks until there is something to return, or there is a free slot and more to begin.

        Args:
            start_more: Whether to begin batches; otherwise only what is under way is brought to its end.

        Raises:
            BatchOutputError: A picture or the ledger could not be written, or the folder is not there any more. Nothing
                more will be begun.
            EngineLostError: The engine cannot go on. The same.
        """
        if start_more and self._fatal is None:
            self._fill_slots()
        busy = len(self._rendering) >= self._engine.slots or not (start_more and self.waiting)
        if busy and not self.idle and self._fatal is None:
            futures: list[Future[Any]] = [*self._rendering, *self._writer.pending]
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
        results = self._collect_rendered()
        results += self._collect_written()
        self._write_ledger()
        if self._fatal is not None and self.idle and not results:
            raise self._fatal
        if self._fatal is not None and not self.idle:
            under_way: list[Future[Any]] = [*self._rendering, *self._writer.pending]
            concurrent.futures.wait(under_way)
        return results

    def close(self) -> list[Result]:
        """Finish the pictures that are rendered, and make every other row that was begun pending again."""
        results: list[Result] = []
        try:
            self._writer.close()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            if self._slot is not None:
                self._slot.close()
            # Before what the writer has finished: an interrupt may have come when it had part of a batch.
            self._release(task for batch in self._rendering.values() for task in batch.tasks)
            self._rendering.clear()
            results += self._collect_written()
            self._write_ledger()
            self._release(self._schedule.drain())
            self._prepared.clear()
            self._unprepared.clear()
        return results

    def _fill_slots(self) -> None:
        while len(self._rendering) < self._engine.slots and (tasks := self._next_batch()):
            # What a batch takes is only known of one that is waited for; and nobody could end what is deferred.
            measured = not tasks[0].alone and not self._schedule.sizer_of(tasks[0]).settled
            engine = self._engine if tasks[0].second_pass is None else self._refiner or self._engine
            method = engine.render if measured or self._timeout_s is not None else engine.begin
            batch = _Batch(tasks, self._telemetry.begun(len(tasks)), measured)
            future: Future[Sequence[Begun]] = Future()
            self._rendering[future] = batch  # before the ledger is written: an interrupt must find the rows
            self._ledger.running(tasks)
            requests = [task.current() for task in tasks]
            render: Callable[[], Sequence[Begun]] = functools.partial(method, requests, self._timeout_s)
            if engine is not self._engine:
                render = functools.partial(_one_of, self._refining, render)
            if self._orders is not None and (on_step := self._orders.watched(tasks)) is not None:
                render = functools.partial(_watched, render, on_step)
            if self._slot is not None:
                self._slot.run(future, render)
                return
            if self._pool is None:
                _render_now(future, render)
                return
            del self._rendering[future]
            self._rendering[self._pool.submit(render)] = batch

    def _next_batch(self) -> list[Task]:
        """Return the next batch, full unless no more rows can come."""
        while True:
            more = bool(self._prepared or self._unprepared)
            tasks = self._schedule.next_batch(only_full=more and not self._engine.in_rounds)
            if tasks or not more or self._fatal is not None:
                return tasks
            ready = self._prepared or self._prepare_some()
            self._prepared = self._prepare_some() if self._engine.prepares_aside else []
            self._schedule.add(ready)
            if self._fatal is not None:
                return []  # rows that had waited for these would be blamed for the engine

    def _prepare_some(self) -> list[Task]:
        """Have the engine prepare the next rows, and return them; none if it cannot go on."""
        some = [self._unprepared.popleft() for _ in range(min(self._engine.ahead, len(self._unprepared)))]
        wanted = some if self._orders is None else [task for task in some if not self._orders.dropped(task)]
        if not wanted:
            return some
        prepare = functools.partial(self._engine.prepare, [task.current() for task in wanted], self._timeout_s)
        try:
            if self._slot is not None:  # in the thread that renders
                prepared: Future[None] = Future()
                self._slot.run(prepared, prepare)
                prepared.result()
            else:
                prepare()
        except EngineLostError as error:
            self._fatal = error
            return []
        # Broad on purpose, as around rendering: a prompt that cannot be encoded will fail its own row there.
        except Exception:
            _log.debug("preparing %d rows failed", len(wanted), exc_info=True)
        return some

    def _collect_rendered(self) -> list[Result]:
        results: list[Result] = []
        for future in [future for future in self._rendering if future.done()]:
            batch = self._rendering[future]
            seconds = time.perf_counter() - batch.start
            error = future.exception()
            if error is not None:
                results += self._batch_failed(batch, error)
            else:
                results += self._batch_rendered(batch, future.result(), seconds)
            self._rendering.pop(future)
            if not batch.left:
                self._telemetry.ended(batch.begun, seconds)
        return results

    def _batch_rendered(self, batch: _Batch, outcomes: Sequence[Begun], seconds: float) -> list[Result]:
        results: list[Result] = []
        if len(outcomes) != len(batch.tasks):
            wrong = TypeError(f"the engine returned {len(outcomes)} pictures for a batch of {len(batch.tasks)}")
            return self._batch_failed(batch, wrong)
        if not batch.tasks[0].alone:
            sizer = self._schedule.sizer_of(batch.tasks[0])
            sizer.succeeded(len(batch.tasks), seconds if batch.measured else None)
        for task, outcome in zip(batch.tasks, outcomes, strict=True):
            if isinstance(outcome, Exception):
                results += self._unrendered(task, outcome, seconds, len(batch.tasks))
            else:
                if callable(outcome):
                    batch.left += 1
                    self._deferred[task] = batch
                self._writer.submit(task, outcome, batch_size=len(batch.tasks), start=batch.start)
        return results

    def _batch_failed(self, batch: _Batch, error: BaseException) -> list[Result]:
        """Give the rows of a failed batch another chance: smaller, or each alone, so that one costs no other."""
        tasks = batch.tasks
        _log.debug("a batch of %d failed", len(tasks), exc_info=error)
        if isinstance(error, EngineLostError):
            self._fatal = error
            return self._lost_with_engine(batch, error)
        if not isinstance(error, Exception):
            raise error
        if is_out_of_memory(error):
            self._schedule.sizer_of(tasks[0]).out_of_memory(len(tasks))
            if len(tasks) > 1:
                self._schedule.add(tasks, first=True)
                return []
        if isinstance(error, WorkerLostError):
            return self._worker_lost(tasks, error, time.perf_counter() - batch.start)
        if len(tasks) == 1:
            return self._row_failed(tasks[0], error, time.perf_counter() - batch.start, 1)
        for task in tasks:
            task.alone = True
        self._schedule.add(tasks, first=True)
        return []

    def _unrendered(self, task: Task, error: Exception, seconds: float, batch_size: int) -> list[Result]:
        """Give one row of a batch another chance; the pictures of its neighbours may be whole."""
        if isinstance(error, EngineLostError):
            self._fatal = error
            if batch_size == 1:
                return [self._fail(task, error, seconds, batch_size)]
            self._release([task])
            return []
        if is_out_of_memory(error) and batch_size > 1:
            self._schedule.sizer_of(task).out_of_memory(batch_size)
            self._schedule.add([task], first=True)
            return []
        if isinstance(error, WorkerLostError):
            return self._worker_lost([task], error, seconds)
        return self._row_failed(task, error, seconds, batch_size)

    def _worker_lost(self, tasks: Sequence[Task], error: WorkerLostError, seconds: float) -> list[Result]:
        results: list[Result] = []
        again: list[Task] = []
        for task in tasks:
            task.lost += 1
            task.alone = task.lost > 1 or len(tasks) == 1
            if task.lost > _MAX_LOST:
                results.append(self._fail(task, error, seconds, len(tasks)))
            else:
                again.append(task)
        self._schedule.add(again, first=True)
        return results

    def _lost_with_engine(self, batch: _Batch, error: EngineLostError) -> list[Result]:
        """Fail the row that took the engine down if it is known which; otherwise nobody is to blame."""
        if len(batch.tasks) == 1:
            return [self._fail(batch.tasks[0], error, time.perf_counter() - batch.start, 1)]
        self._release(batch.tasks)
        return []

    def _row_failed(self, task: Task, error: Exception, seconds: float, batch_size: int) -> list[Result]:
        task.attempts += 1
        if task.attempts <= self._retries:
            task.alone = True
            self._schedule.add([task], first=True)
            return []
        return [self._fail(task, error, seconds, batch_size)]

    def _fail(self, task: Task, error: Exception, seconds: float, batch_size: int) -> Result:
        _log.debug("line %d failed", task.row.line, exc_info=error)
        return self._failed(task, _described(error), seconds, batch_size)

    def _failed(self, task: Task, error: str, seconds: float, batch_size: int) -> Result:
        """Settle a row that has failed for good; no older picture stays in its place."""
        try:
            self._writer.set_aside(task.row.path)
        except OSError as reason:
            error += f"; an older picture is still in its place ({reason.strerror or reason})"
        return self._settle(task, "failed", seconds, batch_size, error=error)

    def _collect_written(self) -> list[Result]:
        written = self._writer.collect()
        results: list[Result] = []
        for picture in written:
            self._waited_for(picture)
            if isinstance(picture.error, OSError):
                self._not_written(picture.task, f"could not be written: {picture.error.strerror or picture.error}")
            else:
                results += self._picture_written(picture)
        return results

    def _not_written(self, task: Task, reason: str) -> None:
        """End the job where a picture cannot be written: the next one could not be either."""
        fix = "fix this and run again: finished pictures stay, and the others are made"
        gone = self._folder.problem()
        self._unwritten.append((task.row.line, f"{task.row.path!r} {reason}; {fix}") if gone is None else (None, gone))
        problems = sorted(dict.fromkeys(self._unwritten), key=lambda problem: (problem[0] or 0, problem[1]))
        self._fatal = BatchOutputError(self._folder.path, problems)
        self._release([task])

    def _waited_for(self, picture: Written) -> None:
        """Note that a picture which was deferred is there; with the last one its batch has been rendered."""
        batch = self._deferred.pop(picture.task, None)
        if batch is None:
            return
        batch.left -= 1
        batch.rendered_s = max(batch.rendered_s, picture.rendered_s)
        if not batch.left:
            self._telemetry.ended(batch.begun, batch.rendered_s)

    def _picture_written(self, picture: Written) -> list[Result]:
        task, finding = picture.task, picture.finding
        if picture.unrendered is not None:
            return self._unrendered(task, picture.unrendered, picture.seconds, picture.batch_size)
        if picture.error is not None:
            return [self._failed(task, str(picture.error), picture.seconds, picture.batch_size)]
        rejected = finding is not None and finding.reason is not None
        if self._folder.size(rejected_path(task) if rejected else task.row.path) != picture.bytes:
            self._not_written(task, "was written, and removed or changed by somebody else")
            return []
        if finding is None or finding.reason is None:
            digest = finding.hash if finding else None
            return [self._settle(task, "done", picture.seconds, picture.batch_size, size=picture.bytes, digest=digest)]
        again = task.second_pass
        if again is None and (planned := self._second_pass(picture, finding)) is not None:
            task.second_pass = planned
            self._schedule.add([task], first=True)
            return []
        before = ""
        if again is not None:
            before = f" after a second pass, and {again.grid_score:.2f} before it"
            if not finding.gridded:
                before = f", after a second pass for a grid of {again.grid_score:.2f}"
        if task.rerolls < self._rerolls:
            task.rerolls += 1
            task.second_pass = None
            self._schedule.add([task], first=True)
            return []
        error = f"{REJECTED}{finding.reason}{before}; see {rejected_path(task)}"
        return [self._settle(task, "rejected", picture.seconds, picture.batch_size, error=error)]

    def _second_pass(self, picture: Written, finding: Finding) -> SecondPass | None:
        """Return how a picture that was sifted out is drawn once more; None if it is not."""
        if self._refiner is None or picture.gridded is None or finding.grid_score is None:
            return None
        guidance = None if self._refiner is self._engine else SECOND_PASS_GUIDANCE
        return SecondPass(picture.gridded, finding.grid_score, guidance, picture.enhanced)

    def _release(self, tasks: Iterable[Task]) -> None:
        """Make rows pending again, but for those whose file is in its place or may still come; they stay running.

        Called pending, such a file would count as somebody else's, and the next run would be refused.
        """
        self._ledger.pending(
            [task for task in tasks if not self._writer.holds(task) and self._folder.status(task.row.path) is None]
        )

    def _write_ledger(self) -> None:
        """Enter what was settled, in one transaction; results are only shown after it.

        Raises:
            BatchOutputError: The ledger could not be written, or the folder is not where it was: no path would be true.
        """
        entries, self._entries = self._entries, []
        self._ledger.settle(entries)
        if entries and (gone := self._folder.problem()):
            raise BatchOutputError(self._folder.path, [(None, gone)])

    def _settle(
        self,
        task: Task,
        state: str,
        seconds: float,
        batch_size: int,
        *,
        error: str | None = None,
        size: int | None = None,
        digest: str | None = None,
    ) -> Result:
        seed = task.current().seed
        entry: dict[str, object] = {
            "path": task.row.path,
            "state": state,
            "seed": str(seed),
            "error": error,
            "bytes": size,
            "seconds": seconds,
            "batch_size": batch_size,
            "hash": digest,
            "finished_at": time.time(),
        }
        self._entries.append(entry)
        path = self._folder.path / task.row.path if state == "done" else None
        result = Result(row=task.row, seed=seed, seconds=seconds, path=path, error=error, batch_size=batch_size)
        self._telemetry.settled(state, seconds)
        return result


def _render_now(future: Future[Sequence[Begun]], render: Callable[[], Sequence[Begun]]) -> None:
    """Render in this thread; what fails goes into the future, but Ctrl-C and SystemExit pass."""
    try:
        future.set_result(render())
    # Broad on purpose: an engine can raise anything (out of memory, a kernel, a prompt it chokes on), and one
    # batch must not cost the others.
    except Exception as error:
        future.set_exception(error)


def _one_of(places: threading.BoundedSemaphore, render: Callable[[], Sequence[Begun]]) -> Sequence[Begun]:
    """Render in as few threads at once as the engine has slots."""
    with places:
        return render()


def _watched(render: Callable[[], Sequence[Begun]], on_step: OnStep) -> Sequence[Begun]:
    """Render with an eye on the steps, in whichever thread this is."""
    before = ON_STEP.set(on_step)
    try:
        on_step(0, None)
        return render()
    finally:
        ON_STEP.reset(before)


def _described(error: Exception) -> str:
    """Return what to say about an error; ours need no class name."""
    text = str(error) if isinstance(error, ErnieAccelError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{text}: it does not fit even alone; choose a smaller size" if is_out_of_memory(error) else text
