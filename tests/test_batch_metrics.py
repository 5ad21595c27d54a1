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
from ernie_accel.batch.metrics import page_url
from ernie_accel.batch.telemetry import _METRICS, Snapshot, Telemetry, prometheus_text
from tests.child_paths import PYTHONPATH
from tests.stub_engine import StubEngine, make_rows


def scrape(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return parse(answer.read().decode())


def parse(text):
    """Return the values by metric; each has its help and its type, and is there once."""
    values = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "gauge"), family.name
        (sample,) = family.samples
        assert sample.name not in values
        values[sample.name] = sample.value
    assert text == "" or text.endswith("\n")
    assert len(re.findall("^# HELP ", text, re.M)) == len(re.findall("^# TYPE ", text, re.M)) == len(values)
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
    assert seen[-1]["ernie_accel_latency_p95_seconds"] > 0


def test_every_field_of_a_snapshot_has_a_metric_and_keeps_all_its_digits():
    fields = set(Snapshot.__dataclass_fields__) - {"time"}
    assert set(_METRICS) == fields
    known = {name: 1_234_567 + number for number, name in enumerate(_METRICS)}
    values = parse(prometheus_text(Snapshot(time=0.0, **known)))
    assert list(values.values()) == list(known.values())
    assert all(re.fullmatch("ernie_accel_[a-z0-9_]+", name) for name in values)


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
    monkeypatch.setattr("ernie_accel.batch.metrics._CLIENT_S", 0.3)
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


def test_it_listens_on_this_machine_only_unless_told_otherwise():
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


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path):
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
