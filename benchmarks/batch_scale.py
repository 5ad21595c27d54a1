"""Question: what do 10, 100, ... 100,000 rows take, and does a row cost more where there are more of them?

    python benchmarks/batch_scale.py --save benchmarks/results/batch_scale_cpu_202611   # some ten minutes on 2 cores

10 to 1,000 rows are rendered by the embedded model at 128 px. 10,000 and 100,000 are "rendered" by an engine that
answers at once with small pictures of one colour: what is left is what the job itself costs a row, from the table to
the report. Each line is a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ernie_accel.batch import produce, read_table
from ernie_accel.batch.engines import Engine, LocalEngine, Outcome, Request
from ernie_accel.batch.output.report import write_report
from ernie_accel.embedded.captions import caption
from ernie_accel.embedded.scenes import random_scene

MODEL_ROWS, STUB_ROWS = (10, 100, 1_000), (10_000, 100_000)
T = TypeVar("T")


class Flat(Engine):
    """Answers at once, with a small picture of one colour."""

    max_batch = 16

    def render(self, requests: Sequence[Request], timeout_s: float | None = None) -> list[Outcome]:
        return [Image.new("RGB", (32, 32), (request.seed % 256, 7, 9)) for request in requests]

    def identity(self) -> dict[str, str]:
        return {"pipeline": "Flat"}


def embedded() -> LocalEngine:
    """Return an engine with the embedded model, prompt enhancer included."""
    import ernie_accel

    pipe = ernie_accel.demo.load()
    pipe.set_progress_bar_config(disable=True)
    return LocalEngine(pipe)


def write_table(path: Path, rows: int) -> None:
    """Write a table as shops have them: a number, a category, a prompt, the settings."""
    rng = random.Random(0)
    prompts = [caption(random_scene(rng), rng, "en") for _ in range(min(rows, 2000))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sku", "category", "prompt", "width", "height", "steps", "guidance_scale"])
        for i in range(rows):
            writer.writerow([f"sku-{i:06d}", f"shelf {i % 100}", f"{prompts[i % len(prompts)]}", 128, 128, 8, 1.0])


def clocked(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def peak_mib() -> float:
    """Return the most memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure(rows: int, engine: str, folder: Path) -> dict[str, Any]:
    """Run a job of so many rows from the table to the report, and once more when nothing is left to do."""
    table, out = folder / "table.csv", folder / "out"
    write_table(table, rows)
    checked, validate_s = clocked(lambda: read_table(table, folder_by="category"))
    maker, load_s = clocked(Flat if engine == "flat" else embedded)
    options: dict[str, Any] = {"progress": False, "batch_size": maker.max_batch if engine == "flat" else None}
    try:
        started, begin_s = clocked(lambda: produce(maker, checked, out, **options))
        count, make_s = clocked(lambda: sum(result.error is None for result in started))
        again, resume_s = clocked(lambda: list(produce(maker, checked, out, **options)))
    finally:
        maker.close()
    assert (count, len(again)) == (rows, 0), (count, len(again))
    _, report_s = clocked(lambda: write_report(out))
    sizes = {name: (out / name).stat().st_size for name in ("manifest.jsonl", "report.html")}
    return {
        "rows": rows,
        "engine": engine,
        "validate_s": validate_s,
        "load_s": load_s,
        "begin_s": begin_s,
        "make_s": make_s,
        "pictures_per_min": 60 * rows / make_s,
        "ms_per_row": 1e3 * make_s / rows,
        "resume_s": resume_s,
        "report_s": report_s,
        "peak_mib": peak_mib(),
        "ledger_mib": (out / ".ernie-accel" / "ledger.sqlite").stat().st_size / 2**20,
        "manifest_mib": sizes["manifest.jsonl"] / 2**20,
        "report_kib": sizes["report.html"] / 2**10,
    }


COLUMNS = (
    ("rows", "rows", "{:,}"),
    ("engine", "rendered by", "{}"),
    ("validate_s", "table checked, s", "{:.2f}"),
    ("begin_s", "ledger begun, s", "{:.2f}"),
    ("make_s", "pictures made, s", "{:.1f}"),
    ("ms_per_row", "a row, ms", "{:.2f}"),
    ("pictures_per_min", "pictures/min", "{:,.0f}"),
    ("resume_s", "run again, all done, s", "{:.2f}"),
    ("report_s", "report, s", "{:.2f}"),
    ("report_kib", "report.html, KiB", "{:.0f}"),
    ("ledger_mib", "ledger, MiB", "{:.1f}"),
    ("peak_mib", "peak memory, MiB", "{:.0f}"),
)


def in_words(found: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a markdown table."""
    lines = ["| " + " | ".join(head for _, head, _ in COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(form.format(one[name]) for name, _, form in COLUMNS) + " |" for one in found]
    return "\n".join(lines)


def main() -> None:
    """Measure each number of rows in a process of its own, print a table, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-rows", type=int, nargs="*", default=MODEL_ROWS)
    parser.add_argument("--flat-rows", type=int, nargs="*", default=STUB_ROWS)
    parser.add_argument("--note", help="what else is to be known of the machine, such as that it is shared")
    parser.add_argument("--save", type=Path, help="path without suffix for .json and .md")
    parser.add_argument("--one", nargs=2, metavar=("ROWS", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(int(options.one[0]), options.one[1], Path(folder))))
        return
    found = []
    jobs = [*((rows, "embedded") for rows in options.model_rows), *((rows, "flat") for rows in options.flat_rows)]
    for rows, engine in jobs:
        command = [sys.executable, __file__, "--one", str(rows), engine]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout))
        print(found[-1], file=sys.stderr, flush=True)
    print(in_words(found))
    if options.save:
        from batch import machine  # here, as it loads torch, which would count in every peak of memory

        about = machine("cpu")
        result = {
            "command": shlex.join(["python", "benchmarks/batch_scale.py", *sys.argv[1:]]),
            "machine": about,
            "note": options.note,
            "jobs": [{name: round(v, 4) if isinstance(v, float) else v for name, v in one.items()} for one in found],
        }
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        where = f"{about['processor']}, {about['cores']} cores, {about['torch_threads']} torch threads"
        note = f" {options.note}." if options.note else ""
        text = (
            f"# Batches from 10 to 100,000 rows\n\n`{result['command']}`\n\n{where}.{note} {versions}. {about['date']}."
        )
        options.save.with_suffix(".md").write_text(f"{text}\n\n{in_words(found)}\n")


if __name__ == "__main__":
    main()
