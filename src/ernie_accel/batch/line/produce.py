"""Make the pictures of a batch: ``produce`` streams them, ``aproduce`` awaits them, a job folder remembers them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from ernie_accel.batch.engines.base import Engine
from ernie_accel.batch.engines.local import LocalEngine, Pipe
from ernie_accel.batch.errors import BatchInputError, BatchOutputError, Problem, shown
from ernie_accel.batch.input.given import Rows, as_rows
from ernie_accel.batch.input.job import Job
from ernie_accel.batch.input.naming import REJECTED_FOLDER, TakenNames
from ernie_accel.batch.input.options import check_arguments
from ernie_accel.batch.input.row import MAX_SEED, Row
from ernie_accel.batch.input.sift import Sift
from ernie_accel.batch.input.task import Task, edit_problems, tasks_of
from ernie_accel.batch.line.assembly import assemble
from ernie_accel.batch.line.line import Line, Result
from ernie_accel.batch.output.folder import OutputFolder
from ernie_accel.batch.output.ledger import MANIFESTS, Ledger, open_job
from ernie_accel.batch.output.manifest import write_manifest
from ernie_accel.batch.output.writer import REFINER
from ernie_accel.batch.watch.metrics import MetricsServer
from ernie_accel.batch.watch.telemetry import Telemetry, refuse_state_files

__all__ = ["Result", "aproduce", "check_folder", "produce", "produce_job", "renew_manifest"]


def produce(
    pipe: Pipe | Engine,
    rows: Rows,
    out: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    batch_size: int | None = None,
    free_encoders: bool = False,
    retries: int = 0,
    fail_fast: bool = False,
    timeout_s: float | None = None,
    sift: Sift | None = None,
    refiner: Pipe | Engine | None = None,
    facts: Mapping[str, str] | None = None,
    writers: int = 2,
    progress: bool | str = True,
    log_json: str | Path | None = None,
    prometheus: str | Path | None = None,
    metrics: MetricsServer | None = None,
    interval_s: float = 5.0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """Check everything that can be checked now, and return an iterator that makes the pictures as it is advanced.

    Nothing is rendered until then::

        for result in produce(pipe, ["a red mug", "a blue mug"], "out"):
            print(result.row.line, result.path or result.error)

    A row whose picture cannot be made yields a `Result` with `error`, and the others follow. Each row has random
    numbers of its own, so that neighbours, order and batch size change its picture by no more than rounding. What a
    row leaves open is left to the pipe's own defaults; the embedded model draws 128 x 128 px then, not 1024 x 1024.
    Called again, it resumes where it was stopped or killed; what an earlier run finished is not made, nor yielded,
    again. ``manifest.jsonl`` and ``manifest.csv`` list all.

    Args:
        pipe: A diffusers pipeline, any callable like one, or an engine (see `ernie_accel.batch.engines`).
        rows: What to make: prompts, mappings from column to value, a data frame, or what `read_table` or `read_rows`
            returns. All are checked as a table is; `read_rows` says how pictures are named and more.
        out: The folder; created if it is missing.
        seed: Rows that give none get ``seed + row.index``.
        overwrite: Replace pictures that are not this job's, and make again what has changed. Otherwise both are
            errors, before anything is rendered.
        resume: Keep a ledger in the folder. Without it nothing but pictures appears there, and every row is made.
        batch_size: Rows per batch; None: tuned automatically. Halved where memory runs out either way.
        free_encoders: Enhance and encode all prompts first, and take text encoder and prompt enhancer off the device
            while the pictures are made; with an `Engine`, give it to that.
        retries: Further attempts for a row that fails.
        fail_fast: Begin nothing more once a row has failed; what is under way is finished.
        timeout_s: Seconds for a batch; see `Engine.render` for what happens to one that takes longer.
        sift: Set pictures aside that are blank, blurred, ...; None: only those with NaN, which fail.
        refiner: What draws a picture with a grid once more if `sift` says so (`Sift(refine=True)`), such as the base
            checkpoint's pipeline, with guidance 2.0; None: `pipe` itself, with the row's guidance.
        facts: What the PNGs say beside their rows' settings, such as model and preset; a job is not resumed with
            others.
        writers: Threads that encode and write PNG.
        progress: Show a progress bar on stderr; a text stands before it.
        log_json: File to which a JSON line with the job's state is appended every `interval_s`.
        prometheus: File that is rewritten as often, in Prometheus' text format.
        metrics: Where a Prometheus can scrape the same; it stays open, to be closed by whoever opened it.
        interval_s: Seconds.
        stop: Asked between batches; once it returns True, nothing more is begun, and what is under way is finished.

    Raises:
        ErnieAccelError: If an argument is out of range.
        BatchInputError: If rows are wrong, share a name, have a seed out of range, or ask for what the engine lacks.
        BatchOutputError: If the folder cannot be used, another process works on it, or files that are not this job's
            are in the way (also at `log_json` or `prometheus`); and, from the iterator, if a picture cannot be written
            (full disk), which ends the batch: the next one could not be either; if the folder or its ledger was moved
            or deleted; or, at the end, if finished pictures were.
        BatchChangedError: If finished pictures were made from other rows, facts or another kind of engine.
        EngineLostError: From the iterator, if the engine cannot render any more.
    """
    check_arguments("produce", locals())
    rows, out = as_rows(rows), Path(out)
    engine = pipe if isinstance(pipe, Engine) else LocalEngine(pipe, max_batch=batch_size, free_encoders=free_encoders)
    tasks = tasks_of(rows, seed, engine.default_size)
    lines = [(task.row.line, task.request) for task in tasks]
    second = refining_engine(refiner, batch_size)
    edits = edit_problems(engine, tasks, refines=sift is not None and sift.refine, refiner=second)
    if problems := [*_row_problems(tasks), *edits, *engine.problems(lines)]:
        raise BatchInputError(None, problems)
    log_json, prometheus = (None if path is None else Path(path) for path in (log_json, prometheus))
    facts = {**(facts or {}), **engine.identity(), **refiner_facts(second)}
    with ExitStack() as opened:
        if engine is not pipe:
            opened.callback(engine.close)
        if second is not None and second is not refiner:
            opened.callback(second.close)
        folder = OutputFolder(out, create=True)
        opened.callback(folder.close)
        refuse_state_files(out, log_json, prometheus)
        ledger = Ledger(folder, durable=resume)
        opened.callback(ledger.close)
        ledger.open()
        to_do = ledger.begin(tasks, facts | _sift_facts(sift), overwrite=overwrite)
        if resume:
            _remove_leftovers(folder, tasks)
        telemetry = Telemetry(
            len(to_do),
            progress=progress,
            log_json=log_json,
            prometheus=prometheus,
            interval_s=interval_s,
        )
        opened.callback(telemetry.close)
        line = assemble(
            engine,
            ledger,
            telemetry,
            folder,
            batch_size=batch_size,
            retries=retries,
            timeout_s=timeout_s,
            sift=sift,
            refiner=second,
            facts=facts,
            writers=writers,
        )
        opened.callback(line.close)
        line.add(to_do)
        if metrics is not None:
            metrics.show(telemetry.snapshot)
        # The stack goes on to the iterator, which closes what is open in its turn.
        return _run(opened.pop_all(), line, ledger, folder, resume, fail_fast, stop)


def produce_job(
    job: Job,
    pipe: Pipe | Engine,
    rows: Sequence[Row],
    *,
    refiner: Pipe | Engine | None = None,
    facts: Mapping[str, str] | None = None,
    progress: bool | str = True,
    metrics: MetricsServer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """Run `produce` as a job says.

    Args:
        job: Whatever it says of the production; where it says how to make an engine, `pipe` is made so already.
        pipe: As for `produce`.
        rows: The job's, see `Job.rows`.
        refiner: As for `produce`, made as the job says.
        facts: As for `produce`; so are the others.
    """
    return produce(
        pipe,
        rows,
        job.output_dir,
        seed=job.seed,
        overwrite=job.overwrite,
        batch_size=job.batch_size,
        free_encoders=job.free_encoders,
        retries=job.retries,
        fail_fast=job.fail_fast,
        timeout_s=job.timeout,
        sift=job.sifting(),
        refiner=refiner,
        facts=facts,
        progress=progress,
        log_json=job.log_json,
        prometheus=job.prometheus,
        metrics=metrics,
        stop=stop,
    )


def check_folder(
    rows: Iterable[Row],
    out: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    sift: Sift | None = None,
    facts: Mapping[str, str | None] | None = None,
    files: Iterable[str] = MANIFESTS,
) -> bool:
    """Return whether `produce` with these arguments has anything to do; raise what it would raise about the folder.

    All of that is known before a model is loaded, but for what the engine says of itself, which is taken to be as it
    was. A fact that is None is one that `produce` will not be given. `files` are those that will be written beside the
    pictures.

    Raises:
        BatchOutputError: As `produce`.
        BatchChangedError: As `produce`.
    """
    tasks = tasks_of(rows, seed)
    settings = {"sift": None} | dict(facts or {}) | _sift_facts(sift)
    durable = None
    while True:
        with open_job(Path(out), durable=durable) as (folder, ledger):
            try:
                return ledger.check(tasks, settings, overwrite=overwrite, files=files)
            except BatchOutputError:
                if ledger.durable or not Ledger.exists(folder):
                    raise
        durable = True  # a job began there meanwhile: what is in the way are its pictures, and it says so itself


def renew_manifest(rows: Iterable[Row], out: str | Path, *, seed: int = 0, overwrite: bool = False) -> None:
    """Write the manifest of a job that has nothing left to do.

    What made the last picture may have been killed before it did, and lines and the input's own columns may have
    changed since.

    Raises:
        BatchOutputError: As `produce`.
    """
    tasks = tasks_of(rows, seed)
    with open_job(Path(out)) as (folder, ledger):
        ledger.begin(tasks, ledger.settings(), overwrite=overwrite)
        _remove_leftovers(folder, tasks)
        write_manifest(ledger)


def refining_engine(refiner: Pipe | Engine | None, batch_size: int | None) -> Engine | None:
    """Return the engine that draws second passes; None: there is none beside the one that draws the rows."""
    return refiner if refiner is None or isinstance(refiner, Engine) else LocalEngine(refiner, max_batch=batch_size)


def refiner_facts(refiner: Engine | None) -> dict[str, str]:
    """Return what an engine says of itself, as facts about second passes."""
    return {} if refiner is None else {f"{REFINER}{name}": value for name, value in refiner.identity().items()}


def _remove_leftovers(folder: OutputFolder, tasks: Sequence[Task]) -> None:
    """Remove what was half-written when earlier runs were killed; the ledger must be locked."""
    rows = dict.fromkeys(task.row.folder for task in tasks)
    folder.remove_leftovers({"", *rows, *folder.folders_inside(REJECTED_FOLDER)})


def _sift_facts(sift: Sift | None) -> dict[str, str]:
    return {"sift": str(sift)} if sift else {}


def _run(
    opened: ExitStack,
    line: Line,
    ledger: Ledger,
    folder: OutputFolder,
    resume: bool,
    fail_fast: bool,
    stop: Callable[[], bool],
) -> Iterator[Result]:
    with opened:  # all of it is closed, whatever one part raises: a ledger left open would lock the folder
        anything, failed = line.waiting > 0, False
        while True:
            start_more = not (stop() or (fail_fast and failed))
            if line.idle and not line.broken and not (start_more and line.waiting):
                break
            for result in line.advance(start_more=start_more):
                failed = failed or (result.error is not None and not result.rejected)
                yield result
        if resume:
            lost = ledger.disclaim_lost() if anything else []
            write_manifest(ledger)
            if lost:
                raise BatchOutputError(folder.path, [(None, _lost_problem(lost))])


def _lost_problem(lost: Sequence[str]) -> str:
    what = f"{shown(lost[0])} was" if len(lost) == 1 else f"{len(lost)} pictures, {shown(lost[0])} first, were"
    return f"{what} removed or changed by somebody else while the job ran; run again to make what is missing"


async def aproduce(
    pipe: Pipe | Engine,
    rows: Rows,
    out: str | Path,
    *,
    on_result: Callable[[Result], object] | None = None,
    **options: Any,
) -> list[Result]:
    """Run `produce` in a thread and return its results; cancelling finishes the batch under way and stops.

    Args:
        pipe: As for `produce`.
        rows: As for `produce`.
        out: As for `produce`.
        on_result: Called with each result as it comes, in the event loop; may be a coroutine function. If it raises,
            the batch under way is finished, and its error is passed on.
        **options: The other arguments of `produce`, but for `stop`.
    """
    stopped = False
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Result] = asyncio.Queue()

    def run() -> list[Result]:
        results = []
        for result in produce(pipe, rows, out, stop=lambda: stopped, **options):
            results.append(result)
            loop.call_soon_threadsafe(arrived.put_nowait, result)
        return results

    async def deliver() -> NoReturn:
        while True:
            returned = on_result(await arrived.get()) if on_result is not None else await arrived.get()
            if inspect.isawaitable(returned):
                await returned
            arrived.task_done()

    work = asyncio.create_task(asyncio.to_thread(run))
    delivering = asyncio.create_task(deliver())
    try:
        # For either: a delivery that failed takes nothing more from the queue, and would be waited for forever.
        await asyncio.wait({work, delivering}, return_when=asyncio.FIRST_COMPLETED)
        if not delivering.done():
            results = work.result()
            all_delivered = asyncio.create_task(arrived.join())
            await asyncio.wait({all_delivered, delivering}, return_when=asyncio.FIRST_COMPLETED)
            if all_delivered.done():
                return results
            all_delivered.cancel()
        return delivering.result()  # raises: it ends by an error only
    finally:
        stopped = True
        delivering.cancel()
        await asyncio.wait({work})


def _row_problems(tasks: Sequence[Task]) -> list[Problem]:
    """Return what only shows when all rows are together: seeds out of range, and names taken twice."""
    # read_table has checked the names; rows made by hand, or from two tables, come here unchecked.
    fix = f"is not within 0 to {MAX_SEED}; choose another"
    problems: list[Problem] = [
        (task.row.line, f"seed {task.request.seed} {fix}") for task in tasks if not 0 <= task.request.seed <= MAX_SEED
    ]
    taken = TakenNames()
    for task in tasks:
        row = task.row
        if row.folder and (reason := taken.take_folder(row.folder, row.line)):
            problems.append((row.line, f"folder {shown(row.folder)} {reason}; write both alike"))
        if reason := taken.take(row.path, row.line, row.index):
            problems.append((row.line, f"file name {shown(row.path)} {reason}; change one"))
    return problems
