"""Processes of their own for code that needs one, forked from a process that has imported what takes longest."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TIMEOUT_S = 120


class Forked:
    """A process with some modules imported, from which others are forked: in these nothing else has happened."""

    def __init__(self, *modules: str, path: Sequence[Path] = (), environment: Mapping[str, str] | None = None) -> None:
        places = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # A forked process cannot use CUDA, and torch.compile asks a GPU that it sees for its random state.
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(places), "CUDA_VISIBLE_DEVICES": ""}
            | dict(environment or {}),
        )

    def run(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `code` as ``python -c`` does."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            job = {"code": code, "arguments": arguments, "out": str(out), "err": str(err)}
            print(json.dumps(job), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    def lines(self, code: str, *arguments: str) -> list[str]:
        """Return the lines that `code` prints; it must not fail."""
        done = self.run(code, *arguments)
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-4000:]}"
        return done.stdout.splitlines()

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what modules print while they are imported is no answer
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # or each child would copy all objects, to look for garbage among them
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _work(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    os._exit(0)  # without taking down all that was imported


def _work(code: str, arguments: list[str], out: str, err: str) -> None:
    signal.alarm(_TIMEOUT_S)
    status = 1
    try:
        for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:  # nothing of what the other process would do at its end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
