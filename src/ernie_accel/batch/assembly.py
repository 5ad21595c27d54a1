"""Put a production line together from what the caller asked for, and check the folder it will fill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ernie_accel.batch.engines.base import Engine
from ernie_accel.batch.errors import BatchOutputError
from ernie_accel.batch.ledger import Ledger
from ernie_accel.batch.line import Line
from ernie_accel.batch.schedule import Schedule
from ernie_accel.batch.sift import Sift
from ernie_accel.batch.telemetry import Telemetry
from ernie_accel.batch.writer import Writer
from ernie_accel.core.atomic import write_atomically

_PROBE = ".ernie-accel-probe.tmp"


def assemble(
    engine: Engine,
    ledger: Ledger,
    telemetry: Telemetry,
    out: Path,
    *,
    batch_size: int | None = None,
    retries: int = 0,
    timeout_s: float | None = None,
    sift: Sift | None = None,
    facts: Mapping[str, str] | None = None,
    writers: int = 2,
) -> Line:
    """Return a line without rows; the arguments are those of `produce`."""
    from ernie_accel import __version__

    sieve = None
    if sift is not None:
        from ernie_accel.batch.sieve import Sieve  # here, because it loads numpy

        sieve = Sieve(sift, ledger.hashes())
    limit = engine.max_batch if batch_size is None else min(batch_size, engine.max_batch)
    # Room for two whole batches: with less, the engine would stand still until part of the first one is written.
    ahead = max(4 * writers, 2 * limit * engine.slots)
    writer = Writer(out, dict(facts or {}) | {"version": __version__}, threads=writers, ahead=ahead, sieve=sieve)
    schedule = Schedule(
        lambda task: engine.bucket(task.current()),
        kin_of=lambda task: task.request.shape(),
        limit=limit,
        start=1 if batch_size is None else limit,
        probe=batch_size is None,
    )
    return Line(
        engine,
        ledger,
        writer,
        schedule,
        telemetry,
        out,
        retries=retries,
        rerolls=sift.reroll if sift is not None else 0,
        timeout_s=timeout_s,
    )


def prepare_folder(out: Path) -> None:
    """Create the output folder, and make sure that it can be written to.

    Raises:
        BatchOutputError: It cannot.
    """
    probe = out / _PROBE
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"")
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file of this name is in the way" if in_the_way else f"{error.strerror or error}"
        raise BatchOutputError(out, [(None, f"{reason}; choose a folder that can be written to")]) from error
    probe.unlink()
