"""What a job says of itself is true: progress, JSON lines, Prometheus text, reports, exit codes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from ernie_accel.batch import Row, Sift, produce
from ernie_accel.batch.input.job import EMBEDDED_MODEL
from ernie_accel.batch.output.page import latency_chart, speed_chart
from ernie_accel.batch.output.report import _worked, write_report
from ernie_accel.batch.output.runs import note_run
from ernie_accel.batch.watch.exposition import exposition
from ernie_accel.batch.watch.snapshot import percentile
from ernie_accel.batch.watch.telemetry import Telemetry
from ernie_accel.common.text import markdown
from ernie_accel.core.errors import ErnieAccelError
from tests.child_paths import PYTHONPATH
from tests.little_work import little_work
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


def test_a_batch_that_claims_more_time_than_has_passed_ends_now():
    """An image server reports its own seconds; what it says must not count as work that is yet to come."""
    now = [0.0]
    telemetry = Telemetry(10, clock=lambda: now[0])
    begun = telemetry.begun(1)
    now[0] = 10.0
    telemetry.ended(begun, 1000.0)
    now[0] = 50.0
    begun = telemetry.begun(1)
    now[0] = 60.0
    telemetry.ended(begun, 10.0)
    assert telemetry.snapshot().engine_idle == pytest.approx(40 / 60)


def test_machines_get_json_lines_and_prometheus_text(tmp_path):
    log, metrics = tmp_path / "log.jsonl", tmp_path / "metrics.prom"
    options = {"log_json": log, "prometheus": metrics, "interval_s": 0.0, "progress": False}
    list(produce(StubEngine(), make_rows(5), tmp_path / "out", **options))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["done"] for line in lines][-1] == 5
    assert len(lines) > 1
    assert set(lines[0]) >= {"time", "total", "pictures_per_min", "eta_s", "batch_size", "latency_p95_s"}
    text = metrics.read_text()
    assert "ernie_accel_pictures_done_total 5.0\n" in text
    assert 'ernie_accel_picture_seconds_bucket{le="+Inf"} 5.0\n' in text
    number = r"[\d.e+-]+"
    for line in text.splitlines():
        assert re.fullmatch(
            rf'# HELP \w+ .+|# TYPE \w+ (counter|gauge|histogram)|\w+(\{{le="[^"]+"\}})? {number}', line
        )


def test_what_is_not_known_is_left_out_of_the_metrics():
    assert b"eta" not in exposition(Telemetry(3).snapshot())


def test_the_report_has_counts_reasons_and_cost(tmp_path):
    def before(requests, call):
        if any(request.seed == 2 for request in requests):
            raise ValueError("<bad> | prompt")

    list(produce(StubEngine(before, seconds=0.01), make_rows(12), tmp_path, progress=False, facts={"preset": "exact"}))
    write_report(tmp_path, gpu_price=2.0, power_price=0.3, watts=700)
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| done | 11 |" in markdown
    assert "| failed | 1 |" in markdown
    assert "| preset | exact |" in markdown
    assert "| 4 | 002.png | ValueError: &lt;bad&gt; \\| prompt |" in markdown
    assert re.search(r"\| GPU cost per 1,000 pictures \| [\d.e-]+ at 2 an hour \|", markdown)
    assert re.search(r"\| power cost per 1,000 pictures \| [\d.e-]+ at 700 W and 0.3 a kWh \|", markdown)
    assert re.search(r"\| made \| \d{4}-\d\d-\d\d \d\d:\d\d.* UTC \|", markdown)
    assert "&lt;bad&gt; | prompt" in page
    assert "<bad>" not in page
    assert page.count("data:image/jpeg;base64,") == 11
    assert "Showing all 11 pictures." in page
    assert page.count("<svg") == 2
    assert DEMO not in page + markdown


DEMO = "embedded demo model, which draws flat shapes and nothing else"


def report_of(tmp_path, rows, **facts):
    list(produce(StubEngine(), rows, tmp_path, progress=False, facts=facts))
    write_report(tmp_path)
    return (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()


def test_the_report_shows_what_it_says_it_shows(tmp_path):
    list(produce(StubEngine(), make_rows(450, width=16, height=16), tmp_path, progress=False))
    (tmp_path / "000.png").unlink()
    (tmp_path / "003.png").write_bytes(b"\x89PNG no more")
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    shown = re.findall(r'<a href="\./(\d{3})\.png"><img', page)
    assert shown == sorted(shown)
    assert [int(n) for n in shown[-1:]] > [440]
    assert f"Showing {len(shown)} of 450 pictures, evenly spread over the job." in page
    assert len(shown) in (198, 199)
    assert f"{200 - len(shown)} could not be read" in page
    assert '<a href="./">Open the folder</a>' in page


def test_the_report_needs_nothing_else_and_runs_nothing(tmp_path):
    _, page = report_of(tmp_path, make_rows(9))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    style = re.search(r"<style>(.*?)</style>", page, flags=re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'")
    assert "prefers-color-scheme: dark" in style
    assert not re.search(r"https?://|<script|<link|@import|url\(| style=| on\w+=", page)


def test_names_and_prompts_of_any_kind_are_shown_as_they_are(tmp_path):
    prompt = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    columns = {"SKU": "A&B <i>", "商品名称": "红色马克杯"}
    row = Row(line=2, index=0, prompt=prompt, file_name="50% off #1 杯.png", folder="mugs & cups", columns=columns)
    markdown, page = report_of(tmp_path, [row])
    assert 'href="./mugs%20%26%20cups/50%25%20off%20%231%20%E6%9D%AF.png"' in page
    assert "A&amp;B &lt;i&gt; · 红色马克杯" in page
    assert "<script" not in page + markdown
    assert "<img src=x" not in page + markdown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a | b", r"a \| b"),
        ("two\nlines\r\n\tand more", "two lines and more"),
        ("[x](javascript:alert(1))", r"\[x\](javascript:alert(1))"),
        ("<javascript:alert(1)>", "&lt;javascript:alert(1)&gt;"),
        ("`code` **bold** _it_ ~~no~~ ![i](u)", r"\`code\` \*\*bold\*\* \_it\_ \~\~no\~\~ \!\[i\](u)"),
        ("&lt; \\| \\", r"&amp;lt; \\\| \\"),
        ("\x1b[31mred\x00 \u202egnp.exe \ud800", "�\\[31mred� �gnp.exe �"),
        ("# title", r"\# title"),
    ],
)
def test_markdown_shows_foreign_text_as_it_is(text, shown):
    assert markdown(text) == shown


def test_a_long_word_costs_no_time_and_no_space(tmp_path):
    word = "masterpiece,best_quality," * 40_000

    def fail(requests, call):
        if any(request.seed == 1 for request in requests):
            raise ValueError(word)

    rows = [Row(line=i + 2, index=i, prompt=word[:131_072], file_name=f"{i}.png") for i in range(3)]
    list(produce(StubEngine(fail), rows, tmp_path, progress=False))
    with little_work(5):
        write_report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 30_000
    assert (tmp_path / "report.md").stat().st_size < 3_000


def test_the_report_says_where_each_run_made_its_pictures(tmp_path):
    list(produce(StubEngine(), make_rows(1), tmp_path, progress=False))
    note_run(tmp_path, "cuda (NVIDIA H200)", {"torch": "2.13.0", "numpy": "2.0"})
    note_run(tmp_path, "cuda (NVIDIA H200)", {"torch": "2.13.0", "numpy": "2.1"})
    note_run(tmp_path, "cpu (2 CPU cores)", {"torch": "2.13.0"})
    with (tmp_path / ".ernie-accel" / "runs.jsonl").open("a") as file:
        file.write('{"time": 1, "mach')  # by a kill
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| hardware | cuda (NVIDIA H200); cpu (2 CPU cores) |" in text
    assert "| versions | torch 2.13.0 |" in text


def test_a_report_on_pictures_of_the_demo_model_begins_with_that(tmp_path):
    text, page = report_of(tmp_path, make_rows(1), model=EMBEDDED_MODEL)
    assert DEMO in text.splitlines()[2]
    assert DEMO in page


def test_breaks_between_runs_are_no_work():
    assert _worked([(1005, 1015), (0, 10), (1000, 1010)]) == (25, [10, 20, 25])
    assert _worked([]) == (0, [])


def test_a_histogram_of_a_few_pictures_is_not_drawn():
    assert not latency_chart([1.0, 2.0, 3.0]).bars
    assert not latency_chart([1.0] * 20).bars
    assert not latency_chart([]).bars
    assert not speed_chart([1.0]).bars


def test_charts_count_every_picture_and_name_their_units():
    chart = latency_chart([float(i) for i in range(100)])
    assert sum(int(re.search(r"seconds: (\d+) pictures$", bar.title)[1]) for bar in chart.bars) == 100
    assert (chart.x_axis, chart.y_axis) == ("seconds", "pictures")
    assert [tick.label for tick in chart.x_ticks] == ["0", "20", "40", "60", "80"]
    chart = speed_chart([10.0 * i for i in range(1, 121)])  # six a minute for twenty minutes
    assert (chart.x_axis, chart.y_axis) == ("minutes of work", "pictures per minute")
    speeds = [float(re.search(r": ([\d.]+) pictures per minute$", bar.title)[1]) for bar in chart.bars]
    assert sum(speeds) / len(speeds) == pytest.approx(6, rel=0.01)
    assert all(0 <= bar.y <= chart.bottom and bar.x + bar.width <= chart.right for bar in chart.bars)


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
from ernie_accel.cli import batch as command
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
    return subprocess.Popen([*command, "--model", "a/b", "--batch-size", "2", *arguments], env=environment, **pipes)


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
    job.send_signal(signal.SIGINT)
    wait_for(job.stderr, "Ctrl-C again")
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=20)  # its batch takes 30 s
    assert job.returncode == 130


def test_failed_rows_give_exit_code_three_and_fail_fast_stops(tmp_path):
    (tmp_path / "t.csv").write_text("prompt\ngood\nbad\n" + "fine\n" * 8)
    job = start(tmp_path, 0.0, "--fail-fast", "--batch-size", "1")
    out, err = job.communicate(timeout=30)
    assert job.returncode == 3
    assert f"{tmp_path}/t.csv:3: 00001.png failed: ValueError: no" in err
    assert "1 succeeded, 1 failed, 8 " in out
    assert (tmp_path / "out" / "report.html").is_file()
