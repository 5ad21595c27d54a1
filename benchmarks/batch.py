"""Question: how many more pictures per minute does a batch make than the loop that guides show? The aim on a CPU: 1.5.

    python benchmarks/batch.py                                   # the embedded model; minutes on two cores
    python benchmarks/batch.py --full-size --preset turbo-bf16 --preset turbo-fp8 --save benchmarks/results/batch_h200
                                                  # 8B parameters with random weights, 512 px, on a GPU; the aim: 2.5
    python benchmarks/batch.py --random tiny --preset turbo-bf16 --rows 6      # the same path, anywhere

The loop calls the stock pipe once per row and saves each picture. The batch is `produce` with ledger, manifest and text
chunks, on a pipe optimized with the preset if one is given. Both make the same rows with the same steps, guidance and
noise. A round that is not counted comes first: it compiles, captures and tunes. Without a preset the two take turns,
and the figures are medians of the rounds; with presets, whose change of the pipe takes longer than a round, the loop's
rounds come first and one more comes last, which shows what the machine itself changed.

The GPU's idle share is from a trace of one more round: the part of the time from the first to the last kernel in which
no kernel ran. The host's part is reported, too: the time from the first call of the engine to the end of its last,
outside all of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ernie_accel
from ernie_accel.batch import Row, produce
from ernie_accel.batch.engines import LocalEngine
from ernie_accel.embedded.captions import caption
from ernie_accel.embedded.scenes import random_scene

STEPS = 8
GUIDANCE_SCALE = 1.0
PACKAGES = ("torch", "diffusers", "transformers", "triton", "torchao", "pillow", "numpy")
GAP_MS = 1.0  # a pause of the GPU that is worth telling


def make_rows(prompts: Iterable[str], size: int) -> list[Row]:
    """Return a row per prompt."""
    return [
        Row(
            line=i + 2,
            index=i,
            prompt=prompt,
            file_name=f"{i:05d}.png",
            width=size,
            height=size,
            steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
        )
        for i, prompt in enumerate(prompts)
    ]


def captions(count: int) -> list[str]:
    """Return captions of random scenes, which the embedded model understands."""
    rng = random.Random(0)
    return [caption(random_scene(rng), rng, "en") for _ in range(count)]


def random_prompts(count: int) -> list[str]:
    """Return prompts of 20 to 120 tokens for the pipelines with random weights: as long as people write them."""
    from random_pipeline import prompt_of

    rng = random.Random(0)
    return [prompt_of(rng.randint(20, 120), seed=i) for i in range(count)]


def loop(pipe: Any, rows: Sequence[Row], out: Path, *, use_pe: bool) -> float:
    """Make the rows one by one, as guides show, and return the seconds."""
    out.mkdir()
    start = time.perf_counter()
    for row in rows:
        picture = pipe(
            row.prompt,
            height=row.height,
            width=row.width,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            use_pe=use_pe,
            generator=torch.Generator("cpu").manual_seed(row.index),
        ).images[0]
        picture.save(out / row.file_name)
    return time.perf_counter() - start


class Timed(LocalEngine):
    """Notes when the pipe was at work, so that the time in which it was not can be measured."""

    def __init__(self, pipe: Any, max_batch: int | None) -> None:
        super().__init__(pipe, max_batch=max_batch)
        self.renders: list[tuple[float, float, int]] = []  # start, end, rows
        self.preparations: list[tuple[float, float]] = []

    def render(self, requests: Any, timeout_s: float | None = None) -> Any:
        """Render, and note when."""
        return self._timed(super().render, requests, timeout_s)

    def begin(self, requests: Any, timeout_s: float | None = None) -> Any:
        """Begin to render, and note when."""
        return self._timed(super().begin, requests, timeout_s)

    def _timed(self, render: Callable[..., Any], requests: Any, timeout_s: float | None) -> Any:
        start = time.perf_counter()
        outcomes = render(requests, timeout_s)
        self.renders.append((start, time.perf_counter(), len(requests)))
        return outcomes

    def prepare(self, requests: Any, timeout_s: float | None = None) -> None:
        """Prepare, and note when."""
        start = time.perf_counter()
        super().prepare(requests, timeout_s)
        self.preparations.append((start, time.perf_counter()))

    def idle(self) -> float:
        """Return the part of the time, from the first call to the end of the last, outside all calls."""
        spans = [*self.preparations, *((start, end) for start, end, _ in self.renders)]
        busy, first, last = covered(spans)
        return 1 - busy / (last - first)


def batch(pipe: Any, rows: Sequence[Row], out: Path, batch_size: int | None) -> dict[str, Any]:
    """Make the rows with `produce`; return the seconds, the engine's idle part and the batch sizes.

    Raises:
        SystemExit: A row failed; then no figure means anything.
    """
    engine = Timed(pipe, batch_size)
    try:
        start = time.perf_counter()
        results = list(produce(engine, rows, out, batch_size=batch_size, progress=False))
        seconds = time.perf_counter() - start
    finally:
        engine.close()
    errors = [result.error for result in results if result.error is not None]
    if errors or len(results) != len(rows):
        raise SystemExit(f"{len(errors)} of {len(rows)} rows failed, the first with: {errors[:1]}")
    sizes = [count for _, _, count in engine.renders]
    return {"seconds": seconds, "engine_idle": engine.idle(), "batch_sizes": sizes}


def covered(spans: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Return how long at least one of the (start, end) spans lasted, the first start and the last end."""
    ordered = sorted(spans)
    busy, end = 0.0, ordered[0][0]
    for first, last in ordered:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy, ordered[0][0], end


def gaps_of(spans: Iterable[tuple[float, float]]) -> list[float]:
    """Return the lengths of the pauses between the spans, the longest first."""
    ordered = sorted(spans)
    gaps, end = [], ordered[0][0]
    for first, last in ordered:
        if first > end:
            gaps.append(first - end)
        end = max(end, last)
    return sorted(gaps, reverse=True)


def kernel_spans(trace: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (start, end) in microseconds of every kernel in a Chrome trace of torch.profiler.

    Copies are left out: a GPU that only copies is idle. Without a GPU the operators of the CPU stand in, so that the
    path can be tried anywhere.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    for kind in ("kernel", "cpu_op"):
        if spans := [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == kind]:
            return spans
    raise SystemExit("the trace holds no kernel: nothing can be said of the GPU's idle time")


def traced(job: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run a job under torch.profiler, and return what its trace says of the device."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    # Kernels only: to record every operator of the host would slow it down, and so make the pauses that are measured.
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        done = job()
        if cuda:
            torch.cuda.synchronize()
    path = folder / "trace.json"
    seen.export_chrome_trace(str(path))
    spans = kernel_spans(json.loads(path.read_text()))
    path.unlink()
    busy_us, first_us, last_us = covered(spans)
    gaps_ms = [gap / 1e3 for gap in gaps_of(spans)]
    pauses = [gap for gap in gaps_ms if gap > GAP_MS]
    return {
        "of": "kernels of the GPU" if cuda else "operators of the CPU",
        "idle": 1 - busy_us / (last_us - first_us),
        "idle_in_pauses": sum(pauses) / ((last_us - first_us) / 1e3),
        "seconds": (last_us - first_us) / 1e6,
        "kernels": len(spans),
        "pauses_over_1_ms": len(pauses),
        "longest_pauses_ms": [round(gap, 2) for gap in gaps_ms[:10]],
        "batch_sizes": done["batch_sizes"],
    }


def psnr_db(one: Path, other: Path) -> float:
    """Return the PSNR of two pictures of 8 bits."""
    a, b = (np.asarray(Image.open(path), dtype=np.float64) for path in (one, other))
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def per_min(rows: Sequence[Row], seconds: Sequence[float]) -> float:
    return round(60 * len(rows) / statistics.median(seconds), 1)


def measure(
    pipe: Any, rows: Sequence[Row], options: argparse.Namespace, folder: Path, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return the loop's figures and those of each candidate; `keep` is given what there is after each candidate."""
    names = iter(range(10**6))

    def place() -> Path:
        return folder / str(next(names))

    def one_by_one(count: int | None = None) -> tuple[float, Path]:
        out = place()
        return loop(pipe, rows[:count], out, use_pe=not options.random and not options.no_enhancer), out

    def together() -> tuple[dict[str, Any], Path]:
        out = place()
        return batch(pipe, rows, out, options.batch_size), out

    def so_far(again: float | None) -> dict[str, Any]:
        return {
            "loop_pictures_per_min": per_min(rows, loops),
            "loop_seconds": [round(seconds, 2) for seconds in loops],
            "loop_again_pictures_per_min": None if again is None else per_min(rows, [again]),
            "candidates": candidates,
        }

    one_by_one(2)
    loops: list[float] = []
    pictures = folder
    candidates: list[dict[str, Any]] = []
    if not options.preset:
        first, _ = together()
        rounds = []
        for _ in range(options.rounds):
            seconds, pictures = one_by_one()
            loops.append(seconds)
            done, out = together()
            rounds.append(done)
        candidates.append(figures("none", rows, first, loops, rounds, same(pictures, out, rows)))
        say(f"loop {per_min(rows, loops)}, batch {candidates[-1]['pictures_per_min']} pictures/min")
    else:
        for _ in range(options.rounds):
            seconds, pictures = one_by_one()
            loops.append(seconds)
            say(f"loop: {seconds:.1f} s")
        for preset in options.preset:
            start = time.perf_counter()
            ernie_accel.optimize(pipe, preset=preset, on_unsupported="skip" if options.skip_unsupported else "error")
            first, _ = together()
            warm_up_s = time.perf_counter() - start
            say(f"{preset}: optimized and warmed up in {warm_up_s:.1f} s")
            rounds = []
            for _ in range(options.rounds):
                done, out = together()
                rounds.append(done)
                say(f"{preset}: {done['seconds']:.1f} s")
            found = figures(preset, rows, first, loops, rounds, same(pictures, out, rows)) | {"warm_up_s": warm_up_s}
            if options.trace:
                found["trace"] = traced(lambda: together()[0], folder)
                say(f"{preset}: idle {found['trace']['idle']:.2%} of {found['trace']['seconds']:.1f} s traced")
            candidates.append(found)
            keep(so_far(None))  # a machine that is lent for minutes may be gone before the next preset is through
            ernie_accel.restore(pipe)
        again, _ = one_by_one()
        say(f"loop again: {again:.1f} s")
        return so_far(again)
    return so_far(None)


def figures(
    name: str,
    rows: Sequence[Row],
    first: dict[str, Any],
    loops: Sequence[float],
    rounds: Sequence[dict[str, Any]],
    psnrs: Sequence[float],
) -> dict[str, Any]:
    """Return a candidate's figures; round by round the ratio is to the loop's round of the same number."""
    seconds = [done["seconds"] for done in rounds]
    return {
        "preset": name,
        "pictures_per_min": per_min(rows, seconds),
        "ratio": round(statistics.median(loops) / statistics.median(seconds), 2),
        "ratios_by_round": [round(a / b, 2) for a, b in zip(loops, seconds, strict=True)],
        "seconds": [round(value, 2) for value in seconds],
        "uncounted_round_s": round(first["seconds"], 2),
        "engine_idle": round(statistics.median(done["engine_idle"] for done in rounds), 4),
        "batch_sizes": rounds[-1]["batch_sizes"],
        "psnr_db_min_median": [_decibels(min(psnrs)), _decibels(statistics.median(psnrs))],
    }


def _decibels(value: float) -> float | str:
    return "equal" if value == float("inf") else round(value, 1)  # JSON has no infinity


def same(one: Path, other: Path, rows: Sequence[Row]) -> list[float]:
    return [psnr_db(one / row.file_name, other / row.file_name) for row in rows]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on and the command does not say."""
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    versions = {"python": platform.python_version(), "ernie-accel": ernie_accel.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": versions,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as a markdown table."""
    head = [
        "",
        "pictures/min",
        "x loop",
        "x loop by round",
        "idle in the trace",
        "of it in pauses over 1 ms",
        "host idle",
        "batch sizes",
        "PSNR dB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    again = result["loop_again_pictures_per_min"]
    note = f" (afterwards {again})" if again else ""
    lines.append(f"| stock pipe, one by one | {result['loop_pictures_per_min']}{note} | 1.00 | | | | | 1 | |")
    for found in result["candidates"]:
        trace = found.get("trace")
        cells = [
            f"batch, preset {found['preset']}",
            str(found["pictures_per_min"]),
            f"{found['ratio']:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in found["ratios_by_round"]),
            f"{trace['idle']:.2%}" if trace else "",
            f"{trace['idle_in_pauses']:.2%}" if trace else "",
            f"{found['engine_idle']:.2%}",
            ", ".join(map(str, found["batch_sizes"])),
            "{}, median {}".format(*found["psnr_db_min_median"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(result: dict[str, Any], stem: Path) -> None:
    """Write the result as JSON and as markdown."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['device']}; {about['processor']}, {about['cores']} cores, {about['torch_threads']} torch threads"
    text = f"# Batch against the loop\n\n`{result['command']}`\n\n{where}. {versions}. {about['date']}.\n\n"
    stem.with_suffix(".md").write_text(text + table(result) + "\n")


def main() -> None:
    """Measure, print a table, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="default: 24, with --full-size 48")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, help="pixels; default: 128, with --full-size 512, with --random tiny 64")
    parser.add_argument("--batch-size", type=int, help="default: tuned automatically, anew in each round; full size: 8")
    parser.add_argument("--preset", action="append", help="optimize the pipe of the batch; repeatable")
    parser.add_argument("--skip-unsupported", action="store_true", help="leave out what the preset cannot do here")
    parser.add_argument("--no-enhancer", action="store_true", help="leave the prompt enhancer out of both")
    parser.add_argument("--full-size", dest="random", action="store_const", const="full", help="8B, random weights")
    parser.add_argument("--random", choices=("full", "tiny"), help="random weights; tiny: to try the path")
    parser.add_argument("--no-trace", dest="trace", action="store_false", help="no round under the profiler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, help="path without suffix for .json and .md")
    options = parser.parse_args()
    full = options.random == "full"
    options.rows = options.rows or (48 if full else 24)
    options.size = options.size or {"full": 512, "tiny": 64, None: 128}[options.random]
    options.batch_size = options.batch_size or (8 if full else None)

    start = time.perf_counter()
    if options.random:
        from random_pipeline import random_pipeline

        pipe = random_pipeline(options.random, options.device, torch.bfloat16)
        rows = make_rows(random_prompts(options.rows), options.size)
    else:
        pipe = ernie_accel.demo.load(prompt_enhancer=not options.no_enhancer).to(options.device)
        rows = make_rows(captions(options.rows), options.size)
    pipe.set_progress_bar_config(disable=True)
    say(f"the pipe was made in {time.perf_counter() - start:.1f} s")
    about = {
        "command": shlex.join(["python", "benchmarks/batch.py", *sys.argv[1:]]),
        "machine": machine(options.device),
        "rows": options.rows,
        "size_px": options.size,
        "steps": STEPS,
    }

    def keep(measured: dict[str, Any]) -> None:
        if options.save:
            save(about | measured, options.save)

    with tempfile.TemporaryDirectory() as folder:
        result = about | measure(pipe, rows, options, Path(folder), keep)
    print(table(result))
    keep(result)
    if not options.save:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
