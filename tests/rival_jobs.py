"""Start one job many times at once and count what each says: ``python -m tests.rival_jobs FOLDER JOBS RIVALS``.

A program of its own, because it forks: all rivals begin within a millisecond, which no interpreters that start could.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from ernie_accel.batch.input.job import plan_job
from ernie_accel.cli import batch as command
from ernie_accel.core.errors import ErnieAccelError
from tests.stub_engine import StubEngine

ROWS = 5


def run_job(table: Path, out: Path) -> int:
    return command.run_job(plan_job(table, {"output_dir": out, "model": "a/b", "preset": "exact", "batch_size": 3}))


def run_rival(table: Path, out: Path, start: float, answer: int) -> None:
    """Run the command's job at a moment, in a child, and tell the parent how it went."""
    time.sleep(max(0, start - time.time()))
    try:
        text = f"exit code {run_job(table, out)}"
    except ErnieAccelError as error:
        text = str(error).splitlines()[1].strip()
    except BaseException as error:  # whatever it is, the parent is to see it
        text = f"{type(error).__name__}: {error}"
    os.write(answer, f"{json.dumps(text)}\n".encode())
    os._exit(0)


def race(table: Path, out: Path, rivals: int) -> list[str]:
    """Return what each of so many rivals said."""
    read, answer = os.pipe()
    start = time.time() + 0.02 * rivals
    children = []
    for _ in range(rivals):
        child = os.fork()
        if child == 0:
            run_rival(table, out, start, answer)
        children.append(child)
    os.close(answer)
    with os.fdopen(read) as lines:
        said = [json.loads(line) for line in lines]
    for child in children:
        os.waitpid(child, 0)
    return said


def main() -> None:
    folder, jobs, rivals = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    command._engine = lambda job, facts: StubEngine(seconds=0.001)
    command._note_run = lambda job: None  # it loads torch
    tqdm.monitor_interval = 0  # no thread that a fork would leave behind
    tqdm.set_lock(threading.RLock())  # its own is shared between processes
    table = folder / "table.csv"
    table.write_text("prompt\n" + "".join(f"cup {i}\n" for i in range(ROWS)))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  # until the end of this process
    run_job(table, folder / "first")  # here, so that everything is imported before the race
    said: Counter[str] = Counter()
    for number in range(jobs):
        out = folder / f"job-{number}" / "out"
        said.update(race(table, out, rivals))
        assert len(list(out.glob("*.png"))) == ROWS, f"{out}: {said}"
        assert not list(out.rglob("*.tmp")), f"{out}: {said}"
    print(json.dumps(said), file=sys.__stdout__)


if __name__ == "__main__":
    main()
