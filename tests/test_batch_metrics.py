"""What a Prometheus scrapes while a job runs: its text format, the moment's counts, a port that is given back."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ernie_accel.batch import MetricsServer, Producer, produce
from ernie_accel.batch.errors import MetricsServerError
from ernie_accel.batch.watch.exposition import _COUNTERS, _GAUGES, exposition
from ernie_accel.batch.watch.metrics import page_url
from ernie_accel.batch.watch.snapshot import LATENCY_BOUNDS_S, Snapshot
from ernie_accel.batch.watch.telemetry import Telemetry
from ernie_accel.cli import main
from ernie_accel.core.errors import ErnieAccelError
from tests.child_paths import PYTHONPATH
from tests.stub_engine import StubEngine, make_rows


def scrape(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return parse(answer.read().decode())


def parse(text):
    """Return the values by metric and part of a histogram; each metric has its help and its type, and is there once."""
    values, families = {}, 0
    for family in text_string_to_metric_families(text):
        families += 1
        assert family.documentation and family.type in ("counter", "gauge", "histogram"), family.name
        assert len(family.samples) == 1 or family.type == "histogram"
        for sample in family.samples:
            name = sample.name + "".join(f" {label}={value}" for label, value in sample.labels.items())
            assert name not in values
            values[name] = sample.value
    assert text == "" or text.endswith("\n")
    assert len(re.findall("^# HELP ", text, re.M)) == len(re.findall("^# TYPE ", text, re.M)) == families
    return values


def test_a_running_job_can_be_scraped(tmp_path):
    with MetricsServer(0) as metrics:
        assert scrape(metrics.url) == {}  # the model may still be loading
        seen = []

        def before(requests, call):  # in the middle of the job: the engine is at work
            seen.append(scrape(metrics.url))

        engine = StubEngine(before)
        options = {"batch_size": 2, "progress": False, "metrics": metrics}
        results = list(produce(engine, make_rows(6), tmp_path, **options))
        assert len(results) == 6
        seen.append(scrape(metrics.url))
    done = [state["ernie_accel_pictures_done_total"] for state in seen]
    assert done[0] == 0
    assert done == sorted(done)
    assert done[-1] == 6
    assert {state["ernie_accel_rows"] for state in seen} == {6}
    assert seen[-1]["ernie_accel_batch_size"] == 2
    assert 0 <= seen[-1]["ernie_accel_engine_idle_ratio"] <= 1
    assert seen[-1]["ernie_accel_picture_seconds_count"] == 6
    assert 0 < seen[-1]["ernie_accel_picture_seconds_sum"] < 60


def test_every_field_of_a_snapshot_has_a_metric_and_keeps_all_its_digits():
    # A percentile cannot be aggregated over jobs; the histogram can.
    fields = set(Snapshot.__dataclass_fields__) - {"time", "latency_p50_s", "latency_p95_s"}
    assert _COUNTERS.keys() | _GAUGES.keys() | {"latency_sum_s", "latency_counts"} == fields
    names = dict(_GAUGES) | {name: (f"{metric}_total", words) for name, (metric, words) in _COUNTERS.items()}
    known = {name: 1_234_567 + number for number, name in enumerate(names)}
    counts = tuple(range(len(LATENCY_BOUNDS_S)))
    state = Snapshot(
        time=0.0, latency_p50_s=1, latency_p95_s=1, latency_sum_s=0.1 + 0.2, latency_counts=counts, **known
    )
    values = parse(exposition(state).decode())
    assert {name: values.pop(f"ernie_accel_{metric}") for name, (metric, _) in names.items()} == known
    assert values.pop("ernie_accel_picture_seconds_sum") == 0.1 + 0.2
    assert values.pop("ernie_accel_picture_seconds_count") == known["done"]
    bounds = [f"ernie_accel_picture_seconds_bucket le={bound}" for bound in (*LATENCY_BOUNDS_S, "+Inf")]
    assert values == dict(zip(bounds, (*counts, known["done"]), strict=True))


def test_seconds_of_pictures_are_counted_in_buckets_and_those_that_failed_are_not():
    telemetry = Telemetry(9)
    for seconds in (0.05, 0.1, 0.11, 9.0, 599.0, 600.0, 10_000.0):
        telemetry.settled("done", seconds)
    telemetry.settled("failed", 1.0)
    telemetry.settled("rejected", 1.0)
    values = parse(exposition(telemetry.snapshot()).decode())
    buckets = {name.partition("le=")[2]: value for name, value in values.items() if "_bucket" in name}
    expected = {"0.1": 2, "0.25": 3, "0.5": 3, "1.0": 3, "2.5": 3, "5.0": 3, "10.0": 4, "30.0": 4, "60.0": 4}
    assert buckets == expected | {"120.0": 4, "300.0": 4, "600.0": 6, "+Inf": 7}
    assert values["ernie_accel_picture_seconds_sum"] == pytest.approx(11208.26)


@pytest.mark.parametrize("arguments", [["--metrics-port", "0"], ["--prometheus", "job.prom"]])
def test_a_missing_package_is_named_with_its_extra_before_anything_is_drawn(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr("ernie_accel.cli.batch._engine", lambda job, facts: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("prompt\none\n")
    with pytest.raises(SystemExit) as caught:
        main(["batch", "t.csv", "--out", "out", "--model", "a/b", *arguments])
    assert caught.value.code == 2
    missing = "error: prometheus_client is not installed: pip install 'ernie-accel[metrics]'\n"
    assert capsys.readouterr().err == missing
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    with pytest.raises(ErnieAccelError, match=r"ernie-accel\[metrics\]"):
        produce(StubEngine(), make_rows(1), tmp_path / "out", prometheus=tmp_path / "job.prom", progress=False)
    with pytest.raises(ErnieAccelError, match=r"ernie-accel\[metrics\]"):
        MetricsServer(0)
    assert not list(tmp_path.glob("out/*.png"))


def test_a_job_that_nobody_scrapes_does_not_load_the_client(tmp_path):
    code = (
        "import sys; from ernie_accel.batch import produce; from tests.stub_engine import StubEngine, make_rows; "
        f"list(produce(StubEngine(), make_rows(1), {str(tmp_path / 'out')!r}, progress=False)); "
        "print('prometheus_client' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_a_service_can_be_scraped_and_its_eta_is_not_negative(tmp_path):
    with MetricsServer(0) as metrics, Producer(StubEngine(), tmp_path, metrics=metrics) as producer:
        for row in make_rows(3):
            producer.submit(row).result(timeout=10)
        values = scrape(metrics.url)
    assert (values["ernie_accel_rows"], values["ernie_accel_pictures_done_total"]) == (3, 3)
    assert values["ernie_accel_eta_seconds"] == 0


def test_scraping_while_counting_is_safe():
    telemetry = Telemetry(20_000)
    errors, over = [], threading.Event()

    def read():
        try:
            while not over.is_set():
                state = telemetry.snapshot()
                assert state.done <= 20_000
        except Exception as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(20_000):
        telemetry.settled("done", 0.1)
    over.set()
    for reader in readers:
        reader.join()
    assert errors == []
    assert telemetry.snapshot().done == 20_000


def test_only_the_metrics_are_served():
    with MetricsServer(0) as metrics:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(metrics.url.replace("/metrics", "/etc/passwd"), timeout=10)
        assert caught.value.code == 404
        assert caught.value.read() == b"the metrics are at /metrics\n"
        head = urllib.request.Request(metrics.url, method="HEAD")
        with urllib.request.urlopen(head, timeout=10) as answer:
            assert answer.read() == b""


def address_of(metrics):
    return "127.0.0.1", int(metrics.url.split(":")[2].split("/")[0])


def threads_of_the_server():
    return [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]


def test_half_open_connections_take_few_threads_and_keep_nobody_out():
    with MetricsServer(0) as metrics, ExitStack() as opened:
        most = 0
        for number in range(200):
            silent = opened.enter_context(socket.create_connection(address_of(metrics), timeout=10))
            silent.sendall(b"GET /metr"[: number % 10])
            most = max(most, len(threads_of_the_server()))
            if number % 20 == 19:
                assert scrape(metrics.url) == {}
        assert most <= 12  # eight, and some that are ending


def test_a_client_that_trickles_is_ended_in_time(monkeypatch):
    monkeypatch.setattr("ernie_accel.batch.watch.metrics._CLIENT_S", 0.3)
    start = time.monotonic()
    with MetricsServer(0) as metrics, socket.create_connection(address_of(metrics), timeout=10) as slow:
        slow.sendall(b"GET /metrics HTTP/1.0\r\nX: ")
        with suppress(OSError):  # whichever end the system notices first
            while time.monotonic() < start + 60:
                slow.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 30, "it was served until it ended by itself"
        assert scrape(metrics.url) == {}


@pytest.mark.parametrize("request_", [b"GET /" + b"x" * 10**6, b"GET /metrics HTTP/1.0\r\n" + b"X: y\r\n" * 10**5])
def test_an_endless_request_is_not_read(request_):
    with MetricsServer(0) as metrics, socket.create_connection(address_of(metrics), timeout=10) as client:
        answer = b""
        with suppress(OSError):  # reset, since the rest was not read
            client.sendall(request_)
            answer = client.recv(10_000)
        assert b"200" not in answer[:20]
        assert scrape(metrics.url) == {}


@pytest.mark.parametrize(
    "garbage", [b"\0" * 100, b"\xff\xfe\r\n\r\n", b"GET\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"\r\n"]
)
def test_garbage_is_answered_quietly(garbage, capfd):
    with MetricsServer(0) as metrics:
        for read in (True, False):
            with socket.create_connection(address_of(metrics), timeout=10) as client:
                client.sendall(garbage)
                client.shutdown(socket.SHUT_WR)
                if read:
                    with suppress(OSError):
                        assert b" 200 " not in client.recv(10_000)
        assert scrape(metrics.url) == {}
    assert capfd.readouterr() == ("", "")


def test_it_listens_on_this_machine_only_unless_asked_otherwise():
    with MetricsServer(0) as metrics:
        assert metrics.url.startswith("http://127.0.0.1:")


def test_an_ipv6_address_is_written_in_brackets():
    assert page_url("::1", 9400) == "http://[::1]:9400/metrics"


def test_a_port_is_free_again_at_once_and_no_thread_stays():
    with MetricsServer(0) as metrics:
        port = int(metrics.url.split(":")[2].split("/")[0])
        scrape(metrics.url)
    with MetricsServer(port) as again:
        scrape(again.url)
    assert "ernie-accel-metrics" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(OSError, match="refused"):
        scrape(again.url)


@pytest.mark.parametrize(
    ("port", "host", "message"),
    [
        (70000, "127.0.0.1", "127.0.0.1:70000: a port is within 0 to 65535; choose another"),
        (0, "192.0.2.1", "192.0.2.1:0: no address of this machine"),  # TEST-NET-1: nobody's
    ],
)
def test_an_address_that_cannot_be_had_is_named(port, host, message):
    with pytest.raises(MetricsServerError, match=re.escape(f"Cannot serve metrics at {message}")) as caught:
        MetricsServer(port, host=host)
    assert (caught.value.host, caught.value.port) == (host, port)


COMMAND = """
import sys
from ernie_accel.cli import batch as command
from tests.stub_engine import StubEngine
def load(job, facts):
    print("loading the model", flush=True)
    return StubEngine(lambda *_: (print("rendering", flush=True), sys.stdin.readline()))
command._engine = load
from ernie_accel.cli import main
main(sys.argv[1:])
"""


def start(tmp_path, port):
    (tmp_path / "t.csv").write_text("prompt\none\ntwo\n")
    job = [
        "batch",
        str(tmp_path / "t.csv"),
        "--out",
        str(tmp_path / "out"),
        "--metrics-port",
        str(port),
        "--model",
        "a/b",
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.Popen([sys.executable, "-c", COMMAND, *job, "--batch-size", "1"], env=environment, **pipes)


def test_the_command_serves_while_it_works(tmp_path):
    job = start(tmp_path, 0)
    url = re.fullmatch(r"Metrics: (\S+)\n", job.stderr.readline())[1]
    assert job.stdout.readline() == "loading the model\n"
    assert job.stdout.readline() == "rendering\n"
    values = scrape(url)
    assert (values["ernie_accel_rows"], values["ernie_accel_pictures_done_total"]) == (2, 0)
    out, err = job.communicate("\n\n", timeout=60)
    assert job.returncode == 0, err
    assert "2 succeeded" in out


def test_a_port_in_use_is_refused_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        job = start(tmp_path, port)
        out, err = job.communicate(timeout=60)
    assert job.returncode == 2
    assert out == ""
    assert err == (
        f"error: Cannot serve metrics at 127.0.0.1:{port}: the port is in use; "
        "end what listens there, or choose another (0: any that is free)\n"
    )
