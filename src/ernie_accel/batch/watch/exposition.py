"""Turn the state of a job into Prometheus' text format; needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ernie_accel.batch.watch.snapshot import LATENCY_BOUNDS_S, Snapshot
from ernie_accel.core.errors import MissingExtraError

_PREFIX = "ernie_accel_"  # of every metric

FIRST_LINE = f"# HELP {_PREFIX}"
"""How a file begins that holds such a text."""

#: Field of a snapshot -> name and help of its metric. Units are Prometheus' base units, and in the names.
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "done": ("pictures_done", "Pictures in place."),
    "failed": ("pictures_failed", "Rows that failed."),
    "rejected": ("pictures_rejected", "Pictures sifted out."),
}
_GAUGES: Mapping[str, tuple[str, str]] = {
    "total": ("rows", "Rows of this run."),
    "pictures_per_min": ("pictures_per_minute", "Pictures per minute over the last five minutes."),
    "eta_s": ("eta_seconds", "Seconds until the end at this speed."),
    "batch_size": ("batch_size", "Rows of the last batch."),
    "engine_idle": ("engine_idle_ratio", "Part of the time in which nothing was rendered, 0 to 1."),
    "gpu_utilization": ("gpu_utilization_percent", "The GPU's utilisation as NVML reports it, 0 to 100."),
    "gpu_memory_bytes": ("gpu_memory_peak_bytes", "Memory allocated by torch, at the peak."),
}
_LATENCY = ("picture_seconds", "Seconds from the start of a row's batch to its file.")


def require_client() -> None:
    """Raise what says how to install prometheus-client if it is not.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import prometheus_client  # noqa: F401  # whether it is there
    except ImportError as error:
        raise MissingExtraError("prometheus_client", "metrics") from error


def exposition(state: Snapshot) -> bytes:
    """Return the state in the text format, version 0.0.4; what is not known is left out.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """
    require_client()
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()  # of our own: the process may have metrics that are none of a job's
    registry.register(_Collector(state))
    text: bytes = generate_latest(registry)
    return text


class _Collector:
    """What a registry asks for the metrics of one state."""

    def __init__(self, state: Snapshot) -> None:
        self._state = state

    def collect(self) -> Iterator[object]:
        """Yield every metric whose value is known."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        state = self._state
        for field, (name, words) in _GAUGES.items():
            if (value := getattr(state, field)) is not None:
                yield GaugeMetricFamily(f"{_PREFIX}{name}", words, value=value)
        for field, (name, words) in _COUNTERS.items():
            yield CounterMetricFamily(f"{_PREFIX}{name}", words, value=getattr(state, field))
        name, words = _LATENCY
        buckets = [(str(bound), count) for bound, count in zip(LATENCY_BOUNDS_S, state.latency_counts, strict=True)]
        buckets.append(("+Inf", state.done))
        yield HistogramMetricFamily(f"{_PREFIX}{name}", words, buckets=buckets, sum_value=state.latency_sum_s)
