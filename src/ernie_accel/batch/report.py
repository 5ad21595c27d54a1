"""Write a job's report, for people: what was made, what failed and why, how fast, what it cost, and a contact sheet."""

from __future__ import annotations

import base64
import html
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ernie_accel.batch.ledger import JOB_FOLDER, Entry, Ledger
from ernie_accel.batch.line import REJECTED
from ernie_accel.batch.summary import write_summary
from ernie_accel.batch.telemetry import merged, percentile
from ernie_accel.core.errors import ErnieAccelError

_SHEET_PICTURES = 12
_BARS = 40
_FEWEST = 8  # values that a histogram tells anything of
_MAX_FAILURES = 200


def write_report(
    out: str | Path,
    *,
    gpu_price: float | None = None,
    power_price: float | None = None,
    watts: float | None = None,
) -> None:
    """Write ``report.md`` and ``report.html`` from the ledger of a job nobody is working on.

    Args:
        out: The output folder.
        gpu_price: Of one GPU-hour.
        power_price: Of one kilowatt-hour.
        watts: Power drawn; None: as NVML tells now, when the job may be over.

    Raises:
        BatchOutputError: The ledger is in use, or the report cannot be written.
    """
    out = Path(out)
    ledger = Ledger(out)
    try:
        facts = _Facts(ledger)
    finally:
        ledger.close()
    facts.numbers += [*_costs(facts, gpu_price, power_price, watts), *sorted(facts.settings.items())]
    write_summary(out / "report.md", facts.markdown().encode())
    write_summary(out / "report.html", facts.html(_sheet(out, facts.shown)).encode())


class _Facts:
    """What the report says, gathered in one pass: of a row that was made, only its numbers are kept."""

    def __init__(self, ledger: Ledger) -> None:
        self.settings = ledger.settings()
        counts = Counter(ledger.counts())
        self.done = counts["done"]
        self.latencies: list[float] = []
        self.failures: list[Entry] = []  # the first of them
        self.shown: list[Entry] = []  # on the contact sheet: pictures evenly spread over the job
        spans: list[tuple[float, float]] = []
        sizes: Counter[int | None] = Counter()
        reasons: Counter[str] = Counter()
        step = max(1, self.done // _SHEET_PICTURES)
        for entry in ledger.entries():
            if entry.error is not None:
                reasons[_reason(entry.error)] += 1
                if len(self.failures) < _MAX_FAILURES:
                    self.failures.append(entry)
            if entry.state != "done":
                continue
            if sizes.total() % step == 0 and len(self.shown) < _SHEET_PICTURES:
                self.shown.append(entry)
            sizes[entry.batch_size] += 1
            if entry.finished_at is not None and entry.seconds is not None:
                self.latencies.append(entry.seconds)
                spans.append((entry.finished_at - entry.seconds, entry.finished_at))
        self.latencies.sort()
        self.working_s, self.moments = _worked(spans)
        self.reasons = _most_common(reasons)
        self.numbers = [(state, str(counts[state])) for state in ("done", "failed", "rejected", "pending", "running")]
        if self.working_s:
            self.numbers.append(("pictures per minute", f"{60 * len(self.moments) / self.working_s:.1f}"))
        half, most = percentile(self.latencies, 0.5), percentile(self.latencies, 0.95)
        if half is not None and most is not None:
            self.numbers.append(("latency p50, p95", f"{half:.2f} s, {most:.2f} s"))
        if sizes:
            self.numbers.append(
                ("batch sizes", ", ".join(f"{size}: {n}" for size, n in sorted(sizes.items(), key=_by_size)))
            )

    def markdown(self) -> str:
        """Return the report for a terminal, a ticket or a pull request."""
        lines = ["# Batch report", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in self.numbers]
        if self.reasons:
            lines += ["", "## Why pictures are missing", "", "| rows | reason |", "|---|---|"]
            lines += [f"| {count} | {_cell(reason)} |" for reason, count in self.reasons]
            lines += ["", "| line | picture | reason |", "|---|---|---|"]
            lines += [f"| {e.line} | {_cell(e.path)} | {_cell(e.error or '')} |" for e in self.failures[:_MAX_FAILURES]]
        return "\n".join(lines) + "\n"

    def html(self, sheet: bytes | None) -> str:
        """Return the report as one page that needs no other file; `sheet` is a contact sheet as PNG."""
        parts = [_HEAD, "<h1>Batch report</h1>", _table(self.numbers)]
        if self.reasons:
            parts += ["<h2>Why pictures are missing</h2>", _table([(str(n), reason) for reason, n in self.reasons])]
            rows = [(f"line {entry.line}", f"{entry.path}: {entry.error}") for entry in self.failures[:_MAX_FAILURES]]
            parts += ["<details><summary>Row by row</summary>", _table(rows), "</details>"]
        parts += ["<h2>Pictures over time</h2>", _bars(self.moments, "seconds of work, without breaks between runs")]
        parts += ["<h2>Latency</h2>", _bars(self.latencies, "seconds from the start of a batch to the file")]
        if sheet is not None:
            picture = base64.b64encode(sheet).decode()
            parts += ["<h2>Contact sheet</h2>", f'<img alt="contact sheet" src="data:image/png;base64,{picture}">']
        return "\n".join(parts) + "\n</body></html>\n"


_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Batch report</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2328}
table{border-collapse:collapse}td{border:1px solid #d0d7de;padding:.3rem .6rem;vertical-align:top}img{max-width:100%}
</style></head><body>"""


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
    """Return why the cost of the power cannot be told."""
    return ErnieAccelError("--power-price needs the power drawn, which cannot be measured here; add --watts")


def measured_watts() -> float | None:
    """Return the power that the GPU draws now, in watts, as NVML tells it; None where it does not."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.power_draw()) / 1000  # NVML tells milliwatts
    except (ImportError, RuntimeError):
        return None


def _sheet(out: Path, entries: Sequence[Entry]) -> bytes | None:
    """Return a contact sheet of the pictures that are still there, as PNG; None if there are none."""
    from ernie_accel.demo.sheet import Column, contact_sheet

    columns = []
    for entry in entries:
        try:
            with Image.open(out / entry.path) as picture:
                columns.append(Column(str(entry.request["prompt"]), [picture.convert("RGB")]))
        except OSError:  # moved away, or damaged: the report is of the others
            continue
    if not columns:
        return None
    path = contact_sheet(columns, out / JOB_FOLDER / "contact-sheet.png", rows=("",), cell=192)
    return path.read_bytes()


def _bars(values: Sequence[float], caption: str) -> str:
    """Return a histogram of ascending seconds as inline SVG."""
    if len(values) < _FEWEST or values[0] == values[-1]:
        return "<p>Too few pictures to draw.</p>"
    bars = min(_BARS, math.ceil(2 * len(values) ** (1 / 3)))  # Rice's rule
    width = (values[-1] - values[0]) / bars
    counts = Counter(min(bars - 1, int((value - values[0]) / width)) for value in values)
    highest = max(counts.values())
    drawn = "".join(
        f'<rect x="{10 * i}" y="{100 - 100 * n / highest:.1f}" width="8" height="{100 * n / highest:.1f}">'
        f"<title>{_seconds(values[0] + i * width)} to {_seconds(values[0] + (i + 1) * width)} s: {n} pictures</title>"
        "</rect>"
        for i, n in sorted(counts.items())
    )
    ends = f"{_seconds(values[0])} to {_seconds(values[-1])} {caption}; the highest bar is {highest} pictures"
    svg = f'<svg viewBox="0 0 {10 * bars} 100" width="{10 * _BARS}" height="100" preserveAspectRatio="none"'
    return f'{svg} fill="#0969da">{drawn}</svg><p>{html.escape(ends)}</p>'


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
