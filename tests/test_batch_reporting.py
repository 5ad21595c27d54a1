"""What a job says of itself is true: progress, JSON lines, Prometheus text, reports, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from ernie_accel.batch import Sift, produce
from ernie_accel.batch.report import _bars, _worked, write_report
from ernie_accel.batch.telemetry import Telemetry, percentile, prometheus_text
from ernie_accel.core.errors import ErnieAccelError
from tests.child_paths import PYTHONPATH
from tests.stub_engine import StubEngine, make_rows


@pytest.mark.parametrize(("part", "expected"), [(0.5, 5), (0.95, 10), (0.0, 1), (1.0, 10)])
def test_percentiles_are_nearest_ranks(part, expected):
    assert percentile(list(range(1, 11)), part) == expected
    assert percentile([], part) is None


def test_counts_speed_and_idle_time_are_those_of_the_clock():
    now = [0.0]
    telemetry = Telemetry(10, clock=lambda: now[0])
    for _ in range(3):
        begun = telemetry.begun(2)
        now[0] += 9
        telemetry.ended(begun, 9)
        for _ in range(2):
            telemetry.settled("done", 9.0)
        now[0] += 1
    state = telemetry.snapshot()
    assert (state.done, state.failed, state.batch_size) == (6, 0, 2)
    assert state.pictures_per_min == pytest.approx(12)
    assert state.eta_s == pytest.approx(20)
    assert (state.latency_p50_s, state.latency_p95_s) == (9, 9)
    assert state.engine_idle == pytest.approx(2 / 29)


@pytest.mark.parametrize(
    ("batches", "idle"),
    [
        ([(0, 10), (9, 12)], 0.0),  # two slots
        ([(0, 12), (11, 12)], 0.0),  # one within the other
        ([(0, 4), (1, 3), (2, 6), (8, 10)], 0.2),
    ],
)
@pytest.mark.parametrize("late_s", [0, 5])
def test_the_engine_is_idle_while_no_batch_is_rendered_however_they_overlap(batches, idle, late_s):
    """The end of a deferred batch is noticed when its pictures are files, which does not make it longer."""
    now = [0.0]
    telemetry = Telemetry(10, clock=lambda: now[0])
    moments = sorted(
        [(start, 1, i) for i, (start, _) in enumerate(batches)]
        + [(end + late_s, 0, i) for i, (_, end) in enumerate(batches)]
    )
    begun = {}
    for now[0], begins, i in moments:
        if begins:
            begun[i] = telemetry.begun(1)
        else:
            telemetry.ended(begun[i], batches[i][1] - batches[i][0])
    assert telemetry.snapshot().engine_idle == pytest.approx(idle)


def test_machines_get_json_lines_and_prometheus_text(tmp_path):
    log, metrics = tmp_path / "log.jsonl", tmp_path / "metrics.prom"
    options = {"log_json": log, "prometheus": metrics, "interval_s": 0.0, "progress": False}
    list(produce(StubEngine(), make_rows(5), tmp_path / "out", **options))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["done"] for line in lines][-1] == 5
    assert len(lines) > 1
    assert set(lines[0]) >= {"time", "total", "pictures_per_min", "eta_s", "batch_size", "latency_p95_s"}
    text = metrics.read_text()
    assert "ernie_accel_pictures_done_total 5\n" in text
    assert re.search(r"^ernie_accel_latency_p95_seconds [\d.e-]+$", text, flags=re.MULTILINE)
    for line in text.splitlines():
        assert re.fullmatch(r"# HELP \w+ .+|# TYPE \w+ (counter|gauge)|\w+ [\d.e+-]+", line)


def test_what_is_not_known_is_left_out_of_the_metrics():
    assert "eta" not in prometheus_text(Telemetry(3).snapshot())


def test_the_report_tells_counts_reasons_and_cost(tmp_path):
    def before(requests, call):
        if any(request.seed == 2 for request in requests):
            raise ValueError("<bad> | prompt")

    list(produce(StubEngine(before, seconds=0.01), make_rows(12), tmp_path, progress=False, facts={"preset": "exact"}))
    write_report(tmp_path, gpu_price=2.0, power_price=0.3, watts=700)
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| done | 11 |" in markdown
    assert "| failed | 1 |" in markdown
    assert "| preset | exact |" in markdown
    assert "| 4 | 002.png | ValueError: <bad> \\| prompt |" in markdown
    assert re.search(r"\| GPU cost per 1,000 pictures \| [\d.e-]+ at 2 an hour \|", markdown)
    assert re.search(r"\| power cost per 1,000 pictures \| [\d.e-]+ at 700 W and 0.3 a kWh \|", markdown)
    assert "&lt;bad&gt; | prompt" in page
    assert "<bad>" not in page
    assert page.count("data:image/png;base64,") == 1
    assert page.count("<svg") == 2
    ends = [float(end) for pair in re.findall(r"<title>([\d.e-]+) to ([\d.e-]+) s: \d+ pictures", page) for end in pair]
    assert len(ends) > 4
    assert max(ends) < 60, "moments are told from the beginning of the work, not of 1970"


def test_breaks_between_runs_are_no_work():
    assert _worked([(1005, 1015), (0, 10), (1000, 1010)]) == (25, [10, 20, 25])
    assert _worked([]) == (0, [])


def test_a_histogram_of_a_few_pictures_is_not_drawn():
    assert "<svg" not in _bars([1.0, 2.0, 3.0], "seconds")
    assert "<svg" not in _bars([1.0] * 20, "seconds")
    page = _bars([float(i) for i in range(100)], "seconds")
    assert sum(map(int, re.findall(r"s: (\d+) pictures", page))) == 100


def test_rejections_are_counted_by_their_kind(tmp_path):
    list(produce(StubEngine(), make_rows(5, seed=1), tmp_path, progress=False, sift=Sift(duplicate_bits=0)))
    write_report(str(tmp_path))
    markdown = (tmp_path / "report.md").read_text()
    assert "| rejected | 4 |" in markdown
    assert "| 4 | rejected: near-duplicate |" in markdown
    assert re.search(r"\| \d \| 00\d.png \| rejected: near-duplicate of 00\d.png: 0 of 64 bits differ", markdown)


def test_a_power_price_needs_the_power(tmp_path):
    list(produce(StubEngine(), make_rows(1), tmp_path, progress=False))
    with pytest.raises(ErnieAccelError, match="add --watts"):
        write_report(tmp_path, power_price=0.3)


COMMAND = """
import sys
from ernie_accel.batch import command
from tests.stub_engine import StubEngine
def fail(requests, call):
    print("batch", call, flush=True)
    if any(r.prompt == "bad" for r in requests):
        raise ValueError("no")
seconds = float(sys.argv.pop(1))
command._engine = lambda job, facts: StubEngine(fail, seconds=seconds)
from ernie_accel.cli import main
main(sys.argv[1:])
"""


def start(tmp_path, seconds, *arguments):
    table = tmp_path / "t.csv"
    if not table.exists():
        table.write_text("prompt,seed\n" + "".join(f"cup {i},{i}\n" for i in range(20)))
    command = [sys.executable, "-c", COMMAND, str(seconds), "batch", str(table), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--batch-size", "2", *arguments], env=environment, **pipes)


def wait_for(stream, text):
    while text not in (line := stream.readline()):
        assert line, f"the job ended before it said {text!r}"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_an_interrupt_finishes_the_batch_and_a_second_run_the_job(tmp_path):
    job = start(tmp_path, 0.5)
    wait_for(job.stdout, "batch 2")
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=30)
    assert job.returncode == 130
    assert "Finishing the batch under way; Ctrl-C again to stop at once." in err
    assert "4 succeeded, 0 failed, 16 not begun" in out
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    again = start(tmp_path, 0.0)
    out, _ = again.communicate(timeout=30)
    assert again.returncode == 0
    assert "16 succeeded, 0 failed, 4 done before" in out


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_second_interrupt_ends_at_once(tmp_path):
    job = start(tmp_path, 30)
    wait_for(job.stdout, "batch 1")
    begun = time.perf_counter()
    job.send_signal(signal.SIGINT)
    wait_for(job.stderr, "Ctrl-C again")
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=10)
    assert job.returncode == 130
    assert time.perf_counter() - begun < 5


def test_failed_rows_give_exit_code_three_and_fail_fast_stops(tmp_path):
    (tmp_path / "t.csv").write_text("prompt\ngood\nbad\n" + "fine\n" * 8)
    job = start(tmp_path, 0.0, "--fail-fast", "--batch-size", "1")
    out, err = job.communicate(timeout=30)
    assert job.returncode == 3
    assert f"{tmp_path}/t.csv:3: 00001.png failed: ValueError: no" in err
    assert "1 succeeded, 1 failed, 8 " in out
    assert (tmp_path / "out" / "report.html").is_file()
