"""Write a job's report, for people: what was made, what failed and why, how fast, what it cost, and the pictures."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ernie_accel.batch.input.job import EMBEDDED_MODEL
from ernie_accel.batch.input.options import REAL_MODEL, check_arguments
from ernie_accel.batch.output.ledger import FINAL, REJECTED, Ledger, LedgerEntry, open_job
from ernie_accel.batch.output.runs import read_runs
from ernie_accel.batch.watch.snapshot import percentile
from ernie_accel.batch.watch.telemetry import merged
from ernie_accel.common.text import markdown, one_line
from ernie_accel.core.errors import ErnieAccelError

REPORTS = ("report.md", "report.html")
"""The files that hold a job's report, in its output folder."""

_MAX_PICTURES = 200  # thumbnails: some 2 MB
_MAX_FAILURES = 200
_MAX_REASON = 300  # characters of an error; the manifest has all of it
_DEMO_WARNING = (
    "These pictures are from the embedded demo model, which draws flat shapes and nothing else. "
    f"For pictures of anything else name a model: --model {REAL_MODEL}"
)


def write_report(
    out: str | Path,
    *,
    gpu_price: float | None = None,
    power_price: float | None = None,
    watts: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``report.md`` and ``report.html`` from the ledger of a job nobody is working on.

    The page shows up to 200 pictures, evenly spread over the job, and needs no other file; the pictures it links to are
    those of the folder.

    Args:
        out: The output folder.
        gpu_price: Of one GPU-hour.
        power_price: Of one kilowatt-hour.
        watts: Power drawn; None: as NVML reports it now, when the job may be over.
        overwrite: Replace reports that are not this job's, or were changed since it wrote them.

    Raises:
        ErnieAccelError: A price or the power is out of range.
        BatchOutputError: The ledger is in use, or the report cannot be written, or another one is in its place.
    """
    check_arguments("write_report", locals())
    from ernie_accel.batch.output.page import (
        page,  # here, because it loads Pillow, and a job that reports nothing needs none
    )

    out = Path(out)
    with open_job(out) as (folder, ledger):  # to the end: nobody else may begin to write meanwhile
        facts = _Facts(ledger)
        facts.add(_refined(out, ledger))
        facts.add(_costs(facts, gpu_price, power_price, watts))
        facts.add([*facts.settings.items(), *read_runs(out).items()])
        folder.remove_leftovers([""])
        ledger.write("report.md", facts.markdown().encode(), overwrite=overwrite)
        ledger.write("report.html", page(facts.content(out)).encode(), overwrite=overwrite)


class _Facts:
    """What the report says, gathered in one pass: of a row that was made, only its numbers are kept."""

    def __init__(self, ledger: Ledger) -> None:
        self.settings = dict(sorted(ledger.settings().items()))
        counts = Counter(ledger.counts())
        self.done = counts["done"]
        self.counts = [(state, counts[state]) for state in ("done", "failed", "rejected", "pending", "running")]
        self.latencies: list[float] = []
        self.failures: list[LedgerEntry] = []  # the first of them
        self.shown: list[LedgerEntry] = []  # pictures evenly spread over the job
        spans: list[tuple[float, float]] = []
        sizes: Counter[int | None] = Counter()
        reasons: Counter[str] = Counter()
        for entry in ledger.entries():
            if entry.error is not None:
                reasons[_reason(entry.error)] += 1
                if len(self.failures) < _MAX_FAILURES:
                    self.failures.append(entry)
            if entry.state != "done":
                continue
            if sizes.total() * _MAX_PICTURES >= len(self.shown) * self.done:  # all of them, if they are no more
                self.shown.append(entry)
            sizes[entry.batch_size] += 1
            if entry.finished_at is not None and entry.seconds is not None:
                self.latencies.append(entry.seconds)
                spans.append((entry.finished_at - entry.seconds, entry.finished_at))
        self.latencies.sort()
        self.working_s, self.moments = _worked(spans)
        self.failed = reasons.total()
        self.reasons = [(one_line(reason, _MAX_REASON), count) for reason, count in _most_common(reasons)]
        self.numbers: list[tuple[str, str]] = []
        if spans:
            self.add([("made", _period(min(spans)[0], max(end for _, end in spans)))])
        if self.working_s:
            self.add([("pictures per minute", f"{60 * len(self.moments) / self.working_s:.1f}")])
        half, most = percentile(self.latencies, 0.5), percentile(self.latencies, 0.95)
        if half is not None and most is not None:
            self.add([("latency p50, p95", f"{half:.2f} s, {most:.2f} s")])
        if sizes:
            self.add([("batch sizes", ", ".join(f"{size}: {n}" for size, n in sorted(sizes.items(), key=_by_size)))])

    def add(self, numbers: Sequence[tuple[str, str]]) -> None:
        """Add what the report says beside the counts, in this order."""
        self.numbers += [(one_line(name, 100), one_line(value, _MAX_REASON)) for name, value in numbers]

    @property
    def warning(self) -> str:
        """What a reader must know before looking at the pictures; empty: nothing."""
        return _DEMO_WARNING if self.settings.get("model") == EMBEDDED_MODEL else ""

    def markdown(self) -> str:
        """Return the report for a terminal, a ticket or a pull request."""
        lines = ["# Batch report", ""]
        lines += [f"**{markdown(self.warning)}**", ""] if self.warning else []
        lines += ["| | |", "|---|---|"]
        lines += [f"| {state} | {count} |" for state, count in self.counts]
        lines += [f"| {markdown(name)} | {markdown(value)} |" for name, value in self.numbers]
        if self.reasons:
            lines += ["", "## Why pictures are missing", "", "| rows | reason |", "|---|---|"]
            lines += [f"| {count} | {markdown(reason)} |" for reason, count in self.reasons]
            lines += ["", f"{self._failures_title()}:", "", "| line | picture | reason |", "|---|---|---|"]
            lines += [f"| {line} | {markdown(path)} | {markdown(error)} |" for line, path, error in self._failures()]
        return "\n".join(lines) + "\n"

    def content(self, out: Path) -> Mapping[str, object]:
        """Return what the page is filled with."""
        from ernie_accel.batch.output.page import gallery, latency_chart, speed_chart
        from ernie_accel.exports import VERSION

        pictures = gallery(out, self.shown)
        return {
            "title": one_line(out.resolve().name, 200),
            "version": VERSION,
            "warning": self.warning,
            "counts": [(state, f"{count:,}") for state, count in self.counts],
            "facts": self.numbers,
            "reasons": [(reason, f"{count:,}") for reason, count in self.reasons],
            "failures": self._failures(),
            "failures_title": self._failures_title(),
            "charts": [speed_chart(self.moments), latency_chart(self.latencies)],
            "pictures": pictures,
            "shown": _shown(len(pictures), len(self.shown), self.done),
        }

    def _failures(self) -> list[tuple[int, str, str]]:
        return [(e.line, one_line(e.path, 200), one_line(e.error or "", _MAX_REASON)) for e in self.failures]

    def _failures_title(self) -> str:
        if len(self.failures) == self.failed:
            return f"All {self.failed:,} rows" if self.failed > 1 else "The row"
        return f"The first {len(self.failures):,} of {self.failed:,} rows; manifest.csv has all"


def _shown(read: int, tried: int, done: int) -> str:
    """Return which pictures the page shows, in words."""
    if not done:
        return "There are none yet."
    lost = f" {tried - read:,} could not be read: they were moved or damaged." if read < tried else ""
    if tried == done:
        count = f"all {done:,} pictures" if done > 1 else "the only picture"
        return (f"Showing {count}." if not lost else f"Showing {read:,} of {done:,} pictures.") + lost
    return f"Showing {read:,} of {done:,} pictures, evenly spread over the job.{lost}"


def _period(start: float, end: float) -> str:
    """Return two Unix times as a date and times of day."""
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.gmtime(moment)) for moment in (start, end))
    if first == last:
        return f"{first} UTC"
    return f"{first} to {last.removeprefix(first[:11])} UTC"


def _reason(error: str) -> str:
    """Return what rows with this error have in common: of a rejected picture the kind of flaw, not its measure."""
    if not error.startswith(REJECTED):
        return error
    return REJECTED + error.removeprefix(REJECTED).partition(":")[0].partition(" of ")[0]


def _most_common(reasons: Counter[str]) -> list[tuple[str, int]]:
    """Return the reasons with their counts; where every row has one of its own, the first and how many more."""
    shown = reasons.most_common(_MAX_FAILURES)
    if len(shown) < len(reasons):
        shown.append((f"{len(reasons) - len(shown)} other reasons, see manifest.csv", reasons.total() - _sum(shown)))
    return shown


def _sum(counted: Sequence[tuple[str, int]]) -> int:
    return sum(count for _, count in counted)


def _by_size(counted: tuple[int | None, int]) -> int:
    return counted[0] or 0


def _worked(spans: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """Return the seconds in which batches were under way, and how many of them had gone by at the end of each span.

    Breaks between runs do not count, and time in which batches overlap counts once.
    """
    ends = sorted(end for _, end in spans)
    worked, moments, passed = 0.0, [], 0
    for first, last in merged(spans):
        while passed < len(ends) and ends[passed] <= last:
            moments.append(worked + ends[passed] - first)
            passed += 1
        worked += last - first
    return worked, moments


def _refined(out: Path, ledger: Ledger) -> list[tuple[str, str]]:
    """Return how many pictures had a grid and were drawn once more, and what that did to it."""
    if "refine" not in ledger.settings().get("sift", ""):
        return []
    from PIL import Image

    from ernie_accel.batch.output.writer import GRID_SCORE, GRID_SCORE_BEFORE

    pairs, rejected = [], 0
    for entry in ledger.entries():
        if entry.state not in FINAL:
            continue
        is_rejected = entry.state == "rejected"  # its second pass may have been in vain; the error ends with its place
        path = (entry.error or "").rpartition("; see ")[2] if is_rejected else entry.path
        try:
            with Image.open(out / path, formats=("PNG",)) as picture:
                texts = {name: picture.info.get(name) for name in (GRID_SCORE, GRID_SCORE_BEFORE)}
            if None not in texts.values():
                pairs.append(tuple(float(str(text)) for text in texts.values()))
                rejected += is_rejected
        except (OSError, ValueError):  # moved or changed since; the gallery says so
            continue
    if not pairs:
        return [("drawn once more for a grid", "none")]
    after, before = (statistics.median(values) for values in zip(*pairs, strict=True))
    scores = f"median score of the grid {before:.2f} before, {after:.2f} after"
    in_vain = f", {rejected:,} of them rejected all the same" if rejected else ""
    return [("drawn once more for a grid", f"{len(pairs):,} pictures{in_vain}: {scores}")]


def _costs(
    facts: _Facts, gpu_price: float | None, power_price: float | None, watts: float | None
) -> list[tuple[str, str]]:
    if not facts.done or (gpu_price is None and power_price is None):
        return []
    hours_per_1000 = facts.working_s / 3600 / facts.done * 1000
    costs = []
    if gpu_price is not None:
        costs.append(("GPU cost per 1,000 pictures", f"{hours_per_1000 * gpu_price:.4g} at {gpu_price:g} an hour"))
    if power_price is not None:
        watts = measured_watts() if watts is None else watts
        if watts is None:
            raise no_watts()
        cost = hours_per_1000 * watts / 1000 * power_price
        costs.append(("power cost per 1,000 pictures", f"{cost:.4g} at {watts:g} W and {power_price:g} a kWh"))
    return costs


def no_watts() -> ErnieAccelError:
    """Return why the cost of the power is unknown."""
    return ErnieAccelError("--power-price needs the power drawn, which cannot be measured here; add --watts")


def measured_watts() -> float | None:
    """Return the power that the GPU draws now, in watts, as NVML reports it; None where it does not."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.power_draw()) / 1000  # NVML reports milliwatts
    except (ImportError, RuntimeError):
        return None
