"""Kill a batch job at random moments and resume it each time: ``python -m tests.kill_job FOLDER KILLS SEED``.

A program of its own, because it forks: a child runs the job and is killed, so no interpreter has to start 200 times.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ernie_accel.batch import produce
from ernie_accel.batch.input.task import tasks_of
from ernie_accel.batch.output.report import write_report
from tests.stub_engine import StubEngine, make_rows, picture_of

ROWS = 300


def run_job(out: Path) -> None:
    for _ in produce(StubEngine(seconds=0.001), make_rows(ROWS), out, batch_size=3, progress=False):
        pass
    write_report(out)


def run_to_the_end(out: Path) -> None:
    """Run the job in a child, too: this process must not have threads or locks that its children inherit."""
    child = os.fork()
    if child == 0:
        run_job(out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the undisturbed run ended with status {status}"


def run_until_killed(out: Path, after_s: float) -> bool:
    """Run the job in a child that is killed after some seconds; return whether the kill came before the end."""
    child = os.fork()
    if child == 0:
        run_job(out)
        os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def check(out: Path, undisturbed: Path) -> None:
    """Raise unless the folder holds exactly what the undisturbed run left."""
    expected = {f"{i:03d}.png" for i in range(ROWS)}
    found = {path.name for path in out.glob("*.png")}
    assert found == expected, f"{len(found)} pictures, missing {sorted(expected - found)}"
    leftovers = [path.name for path in out.rglob("*.tmp")]
    assert not leftovers, leftovers
    for task in tasks_of(make_rows(ROWS), 0):
        path = out / task.row.path
        assert path.read_bytes() == (undisturbed / task.row.path).read_bytes(), f"{path} differs"
        with Image.open(path) as picture:
            assert picture.tobytes() == picture_of(task.request).tobytes(), f"{path} is another picture"
    ledger = sqlite3.connect(out / ".ernie-accel" / "ledger.sqlite")
    states = ledger.execute("SELECT state, count(*), count(DISTINCT path) FROM rows GROUP BY state").fetchall()
    assert states == [("done", ROWS, ROWS)], states
    lines = (out / "manifest.jsonl").read_text().splitlines()
    assert len(lines) == ROWS, f"{len(lines)} lines in the manifest"


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    moments = random.Random(int(sys.argv[3]))
    undisturbed = folder / "undisturbed"
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and a killed child may hold it for ever
    start = time.perf_counter()
    run_to_the_end(undisturbed)
    seconds = time.perf_counter() - start
    killed = jobs = 0
    while killed < kills:
        jobs += 1
        out = folder / f"job-{jobs}"
        # A job survives many kills: each comes after a moment that is long enough for a few rows, or too short for one.
        while killed < kills and run_until_killed(out, moments.uniform(0, seconds / 8)):
            killed += 1
        run_to_the_end(out)
        check(out, undisturbed)
    print(f"{killed} kills over {jobs} jobs of {ROWS} rows")


if __name__ == "__main__":
    main()
