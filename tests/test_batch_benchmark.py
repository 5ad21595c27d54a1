"""The batch benchmarks run on a CPU too, and their idle share is that of the trace."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_batches", BENCHMARKS / "batch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def event(kind, start, duration):
    return {"ph": "X", "cat": kind, "ts": start, "dur": duration}


def test_time_is_idle_where_no_kernel_runs_however_they_overlap(benchmark):
    events = [
        event("kernel", 100.0, 50.0),
        event("kernel", 120.0, 10.0),  # on another stream, within the first
        event("kernel", 140.0, 20.0),
        event("gpu_memcpy", 160.0, 40.0),  # a GPU that only copies is idle
        event("kernel", 200.0, 100.0),
        event("cpu_op", 0.0, 10_000.0),
        {"ph": "i", "cat": "kernel", "ts": 5.0},
    ]
    spans = benchmark.kernel_spans({"traceEvents": events})
    assert benchmark.covered(spans) == (160.0, 100.0, 300.0)
    assert benchmark.gaps_of(spans) == [40.0]


def test_a_trace_without_kernels_says_nothing_and_says_so(benchmark):
    with pytest.raises(SystemExit, match="holds no kernel"):
        benchmark.kernel_spans({"traceEvents": [event("gpu_memcpy", 0.0, 1.0)]})


def test_the_host_is_idle_between_calls_of_the_engine(benchmark):
    engine = benchmark.Timed(lambda prompt, generator: None, None)
    engine.preparations = [(0.0, 2.0)]
    engine.renders = [(2.0, 5.0, 4), (6.0, 10.0, 4)]
    assert engine.idle() == pytest.approx(0.1)


def test_a_job_with_a_failed_row_has_no_figures(benchmark, tmp_path):
    def broken(prompt, generator, **settings):
        raise ValueError("no")

    rows = benchmark.make_rows(["a", "b"], 64)
    with pytest.raises(SystemExit, match=r"2 of 2 rows failed, the first with: \['ValueError: no'\]"):
        benchmark.batch(broken, rows, tmp_path, 1)


@pytest.mark.slow
def test_a_preset_is_measured_against_the_loop_and_saved(tmp_path):
    arguments = ("--random", "tiny", "--preset", "exact", "--rows", "3", "--rounds", "1")
    out = run("batch.py", *arguments, "--save", str(tmp_path / "batch"))
    result = json.loads((tmp_path / "batch.json").read_text())
    (found,) = result["candidates"]
    assert (result["rows"], result["size_px"], found["preset"]) == (3, 64, "exact")
    assert sum(found["batch_sizes"]) == sum(found["trace"]["batch_sizes"]) == 3
    assert found["ratio"] == pytest.approx(found["pictures_per_min"] / result["loop_pictures_per_min"], rel=0.05)
    assert 0 < found["trace"]["idle"] < 1
    assert found["trace"]["idle"] >= found["trace"]["idle_in_pauses"]
    assert result["machine"]["versions"]["torch"]
    assert out.strip() == (tmp_path / "batch.md").read_text().partition("\n| ")[2].join(["| ", ""]).strip()


@pytest.mark.slow
def test_the_scale_of_a_job_is_measured_and_saved(tmp_path):
    out = run("batch_scale.py", "--model-rows", "2", "--flat-rows", "50", "--save", str(tmp_path / "scale"))
    jobs = json.loads((tmp_path / "scale.json").read_text())["jobs"]
    assert [(job["rows"], job["engine"]) for job in jobs] == [(2, "embedded"), (50, "flat")]
    assert all(job["peak_mib"] > 20 and job["ms_per_row"] > 0 for job in jobs)
    assert "| 50 | flat |" in out
    assert "| 50 | flat |" in (tmp_path / "scale.md").read_text()
