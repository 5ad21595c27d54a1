"""What is known of a running job at one moment."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie_accel.common.text import human_bytes

LATENCY_BOUNDS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets in which latencies are counted: a small picture on a GPU, a large one on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a job at one moment. Counts are of this run; None where nothing is known yet.

    Attributes:
        time: Unix time.
        total: Rows of this run.
        done: Pictures in place.
        failed: Rows that failed.
        rejected: Pictures sifted out.
        pictures_per_min: Over the last five minutes.
        eta_s: Seconds until the end at this speed.
        batch_size: Of the last batch.
        latency_p50_s: Median seconds from the start of a row's batch to its file.
        latency_p95_s: The 95th percentile.
        latency_sum_s: Of all pictures in place, together.
        latency_counts: How many of them took at most so long, for each of `LATENCY_BOUNDS_S`.
        engine_idle: Part of the time, 0 to 1, in which nothing was rendered.
        gpu_utilization: Percent, by NVML; only where its Python binding is installed.
        gpu_memory_bytes: Allocated by torch, at the peak; None where another process has the GPU.
    """

    time: float
    total: int
    done: int
    failed: int
    rejected: int
    pictures_per_min: float | None
    eta_s: float | None
    batch_size: int | None
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_sum_s: float
    latency_counts: tuple[int, ...]
    engine_idle: float | None
    gpu_utilization: int | None
    gpu_memory_bytes: int | None


def percentile(ordered: list[float], part: float) -> float | None:
    """Return the nearest-rank percentile of ascending values; None if there are none."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else None


def in_words(state: Snapshot) -> str:
    """Return the state in the few words that fit behind a progress bar."""
    words = [f"failed={state.failed}"]
    if state.rejected:
        words.append(f"rejected={state.rejected}")
    if state.pictures_per_min is not None:
        words.append(f"{state.pictures_per_min:.1f}/min")
    if state.batch_size is not None:
        words.append(f"batch={state.batch_size}")
    if state.latency_p50_s is not None and state.latency_p95_s is not None:
        words.append(f"p50={state.latency_p50_s:.1f}s p95={state.latency_p95_s:.1f}s")
    if state.gpu_utilization is not None:
        words.append(f"gpu={state.gpu_utilization}%")
    if state.gpu_memory_bytes is not None:
        words.append(human_bytes(state.gpu_memory_bytes))
    return ", ".join(words)
