"""Put a production line together from what the caller asked for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from ernie_accel.batch.engines.base import Engine
from ernie_accel.batch.input.sift import Sift
from ernie_accel.batch.input.task import Task
from ernie_accel.batch.line.line import Line, Orders
from ernie_accel.batch.line.schedule import Schedule
from ernie_accel.batch.output.folder import OutputFolder
from ernie_accel.batch.output.ledger import Ledger
from ernie_accel.batch.output.writer import Writer
from ernie_accel.batch.watch.telemetry import Telemetry


def assemble(
    engine: Engine,
    ledger: Ledger,
    telemetry: Telemetry,
    folder: OutputFolder,
    *,
    batch_size: int | None = None,
    retries: int = 0,
    timeout_s: float | None = None,
    sift: Sift | None = None,
    refiner: Engine | None = None,
    facts: Mapping[str, str] | None = None,
    writers: int = 2,
    orders: Orders | None = None,
) -> Line:
    """Return a line without rows; the arguments are those of `produce`, with engines in the place of pipes.

    `orders` are those of a service, whose rows never stop coming: the row that has waited longest is next.
    """
    from ernie_accel.exports import VERSION

    sieve = None
    if sift is not None:
        from ernie_accel.batch.output.sieve import Sieve  # here, because it loads numpy

        sieve = Sieve(sift, ledger.hashes())
    if sift is None or not sift.refine:
        refiner = None
    elif refiner is None:
        refiner = engine
    most = engine.max_batch if refiner is None else min(engine.max_batch, refiner.max_batch)  # for both alike
    limit = most if batch_size is None else min(batch_size, most)
    # Room for two whole batches: with less, the engine would stand still until part of the first one is written.
    ahead = max(4 * writers, 2 * limit * engine.slots)
    writer = Writer(folder, dict(facts or {}) | {"version": VERSION}, threads=writers, ahead=ahead, sieve=sieve)
    schedule = Schedule(
        lambda task: _bucket(task, engine, refiner),
        similar_key_of=lambda task: task.current().shape(),
        limit=limit,
        start=1 if batch_size is None else limit,
        probe=batch_size is None,
        oldest_first=orders is not None,
        begin=None if orders is None else orders.begin,
    )
    return Line(
        engine,
        ledger,
        writer,
        schedule,
        telemetry,
        folder,
        retries=retries,
        rerolls=sift.reroll if sift is not None else 0,
        refiner=refiner,
        timeout_s=timeout_s,
        orders=orders,
    )


def _bucket(task: Task, engine: Engine, refiner: Engine | None) -> Hashable:
    """Return what rows that go together have in common; those for different engines never do."""
    if task.second_pass is None or refiner is None:
        return engine.bucket(task.current())
    return "second pass", refiner.bucket(task.current())
