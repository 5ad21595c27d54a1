"""Show how a job is going: to people as a progress bar, to machines as JSON lines or Prometheus text."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import stat
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ernie_accel.batch.errors import BatchOutputError, shown
from ernie_accel.batch.input.naming import is_name_of_the_job
from ernie_accel.batch.watch.exposition import FIRST_LINE, exposition, require_client
from ernie_accel.batch.watch.snapshot import LATENCY_BOUNDS_S, Snapshot, in_words, percentile
from ernie_accel.common.atomic import write_atomically

_RECENT = 1000  # latencies kept for the percentiles
_WINDOW_S = 300.0  # over which the current speed is measured
_STATE_BYTES = 10_000  # of a file's start, by which its kind is known


class Telemetry:
    """Counts what happens on a line, and publishes it every few seconds where that was asked for.

    One thread counts; `snapshot` may be called from any.
    """

    def __init__(
        self,
        total: int,
        *,
        progress: bool | str = False,
        log_json: Path | None = None,
        prometheus: Path | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start counting.

        Args:
            total: Rows to make.
            progress: Show a bar on stderr; a text stands before it.
            log_json: Append one JSON line every `interval_s`, and a last one at the end.
            prometheus: Rewrite this file in the text format, for node_exporter's textfile collector.
            interval_s: Seconds.
            clock: Seconds that never go back.
        """
        self._total, self._interval_s = total, interval_s
        # Where they are now: what becomes a link later is not followed.
        self._log_json, self._prometheus = (None if p is None else p.resolve() for p in (log_json, prometheus))
        self._clock = clock
        self._lock = threading.RLock()  # one that an interrupt has left locked must not stop `close`
        self._warned = False
        self._counts = {"done": 0, "failed": 0, "rejected": 0}
        self._latencies: deque[float] = deque(maxlen=_RECENT)
        self._latency_sum_s = 0.0
        self._latency_counts = [0] * (len(LATENCY_BOUNDS_S) + 1)  # of each bucket alone; the last one has no bound
        self._finished: deque[float] = deque()
        self._batch_size: int | None = None
        self._under_way: list[float] = []  # when each batch was begun
        self._busy_s = 0.0  # before all that is under way
        self._busy: list[tuple[float, float]] = []  # (from, to) after that, apart and ascending
        self._begin = self._published = clock()
        self._first_batch: float | None = None
        self._last_batch = self._begin
        self._bar = tqdm(
            total=total, unit="picture", disable=not progress, desc=progress if isinstance(progress, str) else None
        )

    def expect(self, count: int) -> None:
        """Note that so many more rows are to be made."""
        with self._lock:
            self._total += count

    def begun(self, count: int) -> float:
        """Note that a batch of `count` rows is being rendered, and return what to pass to `ended`."""
        now = self._clock()
        with self._lock:
            self._first_batch = now if self._first_batch is None else self._first_batch
            self._under_way.append(now)
            self._batch_size = count
        return now

    def ended(self, begun: float, seconds: float) -> None:
        """Note that a batch which was `begun` took `seconds`; that may be noticed later, and batches may overlap."""
        with self._lock:
            self._under_way.remove(begun)
            end = min(begun + seconds, self._clock())
            self._last_batch = max(self._last_batch, end)
            self._busy = merged([*self._busy, (begun, end)])
            oldest = min(self._under_way, default=end)
            while self._busy and self._busy[0][1] < oldest:
                start, end = self._busy.pop(0)
                self._busy_s += end - start

    def settled(self, state: str, seconds: float) -> None:
        """Note that a row became "done", "failed" or "rejected", `seconds` after its batch began."""
        now = self._clock()
        with self._lock:
            self._counts[state] += 1
            if state == "done":
                self._latencies.append(seconds)
                self._latency_sum_s += seconds
                self._latency_counts[bisect.bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
                self._finished.append(now)
        self._bar.update()
        if now - self._published >= self._interval_s:
            self._publish(now)

    def snapshot(self) -> Snapshot:
        """Return the state of the job now."""
        gpu_utilization, gpu_memory_bytes = gpu_facts()
        with self._lock:
            now = self._clock()
            while self._finished and self._finished[0] < now - _WINDOW_S:
                self._finished.popleft()
            span = min(now - self._begin, _WINDOW_S)
            per_min = 60 * len(self._finished) / span if self._finished and span > 0 else None
            left = self._total - sum(self._counts.values())
            latencies = sorted(self._latencies)
            busy_s = self._busy_s + sum(end - start for start, end in self._busy)
            spent = self._last_batch - self._first_batch if self._first_batch is not None else 0.0
            return Snapshot(
                time=time.time(),
                total=self._total,
                **self._counts,
                pictures_per_min=per_min,
                eta_s=60 * left / per_min if per_min else None,
                batch_size=self._batch_size,
                latency_p50_s=percentile(latencies, 0.50),
                latency_p95_s=percentile(latencies, 0.95),
                latency_sum_s=self._latency_sum_s,
                latency_counts=tuple(itertools.accumulate(self._latency_counts[:-1])),
                engine_idle=max(0.0, 1 - busy_s / spent) if spent > 0 else None,
                gpu_utilization=gpu_utilization,
                gpu_memory_bytes=gpu_memory_bytes,
            )

    def close(self) -> Snapshot:
        """Publish the last state, take the bar down, and return that state."""
        self._publish(self._clock())
        self._bar.close()
        return self.snapshot()

    def _publish(self, now: float) -> None:
        self._published = now
        state = self.snapshot()
        if not self._bar.disable:
            self._bar.set_postfix_str(in_words(state))
        try:
            if self._log_json is not None:
                with open(self._log_json, "a", encoding="utf-8", opener=_append) as file:
                    file.write(json.dumps(asdict(state)) + "\n")
            if self._prometheus is not None:
                # Always the same temporary name: in this folder nobody removes what kills leave behind.
                temporary = f".{self._prometheus.name}.tmp"
                write_atomically(self._prometheus, exposition(state), temporary=temporary)
        except OSError as error:  # pictures matter more than their statistics
            if not self._warned:
                warnings.warn(f"the job's state could not be written: {error}; the job goes on", stacklevel=2)
            self._warned = True


def refuse_state_files(out: Path, log_json: Path | None, prometheus: Path | None) -> None:
    """Refuse to write the state of a job over anything but the state of a job.

    Args:
        out: The job's output folder, which exists.
        log_json: As `Telemetry` takes it.
        prometheus: The same.

    Raises:
        MissingExtraError: A Prometheus file is to be written, and prometheus-client is not installed.
        BatchOutputError: One of the files belongs to something else, or is one of the job's other files, or is no file.
    """
    if prometheus is not None:
        require_client()
    if log_json is not None and prometheus is not None and log_json.resolve() == prometheus.resolve():
        both = f"{log_json.name!r} cannot be both the log and Prometheus' file; choose another name for one"
        raise BatchOutputError(log_json.parent, [(None, both)])
    for path, is_ours, kind in ((log_json, _is_log, "JSON log"), (prometheus, _is_metrics, "Prometheus file")):
        if path is not None and (reason := _state_file_problem(out, path, is_ours, kind)) is not None:
            raise BatchOutputError(path.parent, [(None, f"{shown(path.name)} {reason}")])


def _state_file_problem(out: Path, path: Path, is_ours: Callable[[str], bool], kind: str) -> str | None:
    """Return why a job's state cannot be written to `path` (None: it can)."""
    target = path.resolve()
    if target.is_relative_to(out.resolve()):
        if is_name_of_the_job(target.relative_to(out.resolve()).as_posix()):
            return "is a name that the job itself uses; choose another"
    elif path.absolute().is_relative_to(out.absolute()):
        return "leads out of the output folder by a link; choose another"
    try:
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            return "is a folder; choose another name"
        if not stat.S_ISREG(mode):  # a terminal or a pipe takes lines, and is not to be replaced by a file
            return None if kind == "JSON log" else "is not a file; choose another name"
        with target.open("rb") as file:
            start = file.read(_STATE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be used: {error.strerror or error}; choose another name"
    if not start or is_ours(start.decode("utf-8", "replace").partition("\n")[0]):
        return None
    return f"exists, and is not a {kind} that a job wrote; move it, or choose another name"


def _is_log(line: str) -> bool:
    """Return whether a line is one of a JSON log."""
    try:
        state = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(state, dict) and {"time", "total", "done", "failed", "rejected"} <= state.keys()


def _is_metrics(line: str) -> bool:
    """Return whether a file that begins with this line is in the text format, with our metrics."""
    return line.startswith(FIRST_LINE)


def _append(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return what spans of time (from, to) cover, as spans that lie apart, ascending."""
    apart: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if apart and start <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((start, end))
    return apart


def gpu_facts() -> tuple[int | None, int | None]:
    """Return the GPU's utilisation in percent and torch's peak memory in bytes, each None where it is not known."""
    torch = sys.modules.get("torch")  # not imported for this: a job on image servers has no torch
    if torch is None or not torch.cuda.is_available():
        return None, None
    ours = torch.cuda.is_initialized()
    try:
        # By number where another process has the GPU: to ask for the current one would make a CUDA context here.
        utilization: int | None = int(torch.cuda.utilization(torch.cuda.current_device() if ours else 0))
    except (ImportError, RuntimeError):  # the NVML binding is not installed, or has no rights
        utilization = None
    return utilization, int(torch.cuda.max_memory_allocated()) if ours else None
