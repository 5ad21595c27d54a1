"""The example of a service: OpenAI's images API, its limits and its errors, from clients that behave and others."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from ernie_accel.batch.engines import EngineLostError, Request
from ernie_accel.core.errors import ErnieAccelError
from tests.child_paths import PYTHONPATH
from tests.stub_engine import StubEngine, picture_of

httpx = pytest.importorskip("httpx", reason="the example of a service needs the extra `service`, and its tests httpx")
uvicorn = pytest.importorskip("uvicorn", reason="the example of a service needs the extra `service`")
pytest.importorskip("fastapi", reason="the example of a service needs the extra `service`")
pytest.importorskip("python_multipart", reason="the example of a service needs the extra `service`")

from examples.service.app import create_app  # noqa: E402  # needs what was looked for
from examples.service.connection import connection  # noqa: E402
from examples.service.settings import Settings  # noqa: E402

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SECRET = "/srv/weights/model.safetensors"


class Engine(StubEngine):
    """Draws noise; stands still while `hold` is clear. Prompts say what goes wrong."""

    edits = True

    def __init__(self) -> None:
        super().__init__(self._before, max_batch=4)
        self.hold, self.begun = threading.Event(), threading.Event()
        self.hold.set()
        self.pictures: list[tuple[Image.Image, Image.Image | None]] = []

    def _before(self, requests, call):
        self.begun.set()
        assert self.hold.wait(30)
        if any(request.prompt == "fail" for request in requests):
            raise OSError(f"cannot read {SECRET}")
        if any(request.prompt == "lost" for request in requests):
            raise EngineLostError(f"hangs in {SECRET}")
        for request in requests:
            if request.image is not None:
                self.pictures.append((request.image.read(), request.mask and request.mask.read()))

    def prompts(self):
        return [request.prompt for batch in self.batches for request in batch]


class Served:
    """A service on loopback, and a client of it."""

    def __init__(self, **settings) -> None:
        self.engine = Engine()
        self.settings = Settings(**({"timeout_s": 20, "batch_size": 4, "max_pixels": 256 * 256} | settings))
        self.app = create_app(self.settings, lambda settings: self.engine)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(
            self.app,
            log_level="critical",
            lifespan="on",
            http=connection(self.settings.body_s),
            timeout_graceful_shutdown=5,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def __enter__(self):
        self.thread.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)
        return self

    def __exit__(self, *_):
        self.engine.hold.set()
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    @property
    def studio(self):
        return self.app.state.service.studio

    def draw(self, prompt="a cup", **fields):
        return self.client.post(GENERATIONS, json={"prompt": prompt, "size": "32x32"} | fields)

    def in_background(self, work):
        answers = []
        thread = threading.Thread(target=lambda: answers.append(work()))
        thread.start()
        return thread, answers

    @contextlib.contextmanager
    def busy(self):
        """Have a picture at work that is not finished before the block is."""
        self.engine.hold.clear()
        self.engine.begun.clear()
        thread, answers = self.in_background(lambda: self.draw("first"))
        assert self.engine.begun.wait(20)
        try:
            yield
        finally:
            self.engine.hold.set()
            thread.join(20)
        assert answers[0].status_code == 200

    def settle(self):
        """Wait until nothing waits."""
        wait_until(lambda: len(self.studio._producer._orders) == 0)

    def files(self):
        return [name for _, _, names in os.walk(self.studio._folder.name) for name in names if name != "ledger.sqlite"]


def wait_until(true, seconds=20.0):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.fixture(scope="module")
def service():
    with Served() as served:
        yield served


def picture(data):
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def refusal(answer, status, code=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


def png(size=(32, 32), colour=(9, 8, 7), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_picture_is_that_of_its_seed_and_no_file_stays(service):
    answer = service.draw(seed=7, n=2).json()
    assert (answer["size"], answer["output_format"], answer["background"]) == ("32x32", "png", "opaque")
    assert abs(answer["created"] - time.time()) < 60
    assert [each["seed"] for each in answer["data"]] == [7, 8]
    for each in answer["data"]:
        expected = picture_of(Request(prompt="", seed=each["seed"], width=32, height=32))
        assert picture(each).tobytes() == expected.tobytes()
    assert service.files() == []


def test_pictures_without_a_seed_differ(service):
    seeds = {service.draw().json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_a_format_is_what_was_asked_for(service, name):
    answer = service.draw(output_format=name, output_compression=80).json()
    assert (picture(answer["data"][0]).format, answer["output_format"]) == (name.upper(), name)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": "64x32", "response_format": "b64_json", "use_pe": True, "output_format": "png", "seed": 3},
        {
            "size": "64x32",
            "extra_params": {"apply_pe": True},
            "vae_use_slicing": False,
            "true_cfg_scale": None,
            "seed": 3,
        },
        {"width": 64, "height": 32, "size": None, "generator_device": "cuda", "enable_teacache": False, "seed": 3},
    ],
    ids=["SGLang", "vLLM-Omni", "width and height"],
)
def test_requests_of_other_servers_are_understood(service, fields):
    common = {"n": 1, "num_inference_steps": 9, "guidance_scale": 2, "negative_prompt": "blurry", "model": None}
    answer = service.draw("theirs", **common, **fields)
    assert answer.status_code == 200, answer.text
    assert service.engine.batches[-1] == (
        Request(prompt="theirs", seed=3, negative_prompt="blurry", width=64, height=32, steps=9, guidance_scale=2.0),
    )


@pytest.mark.parametrize("kind", ["sglang", "vllm-omni"])
def test_batches_over_http_reach_it_as_they_reach_those_servers(service, tmp_path, kind):
    from ernie_accel.batch import produce
    from ernie_accel.batch.engines.http import HttpEngine
    from tests.stub_engine import make_rows

    engine = HttpEngine([f"http://127.0.0.1:{service.port}"], server=kind, use_pe=True)
    rows = make_rows(3, width=32, height=32)
    results = list(produce(engine, rows, tmp_path, progress=False))
    engine.close()
    assert [result.error for result in results] == [None] * 3


def test_requests_that_wait_together_are_made_together(service):
    with service.busy():
        threads = [service.in_background(lambda n=n: service.draw(f"together {n}")) for n in range(4)]
        wait_until(lambda: service.studio.waiting == 4)
    for thread, answers in threads:
        thread.join(20)
        assert answers[0].status_code == 200
    assert sorted(request.prompt for request in service.engine.batches[-1]) == [f"together {n}" for n in range(4)]


def test_events_show_the_queue_and_bring_the_pictures(service):
    with service.client.stream(
        "POST", GENERATIONS, json={"prompt": "x", "size": "32x32", "n": 2, "stream": True}
    ) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        text = got.read().decode()
    events = [dict(line.split(": ", 1) for line in event.splitlines()) for event in text.split("\n\n") if event]
    data = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == [each["type"] for each in data]
    assert [each["type"].partition(".")[2] for each in data] == ["progress", "progress", "completed", "completed"]
    assert {(each["index"], each["step"]) for each in data[:2]} == {(0, 0), (1, 0)}
    assert {each["index"] for each in data[2:]} == {0, 1}
    assert all(picture(each).size == (32, 32) for each in data[2:])
    assert service.files() == []


def test_an_error_among_events_is_an_event(service):
    answer = service.draw("fail", stream=True)
    last = answer.text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["error"]["type"] == "server_error"
    assert SECRET not in answer.text


def test_a_picture_is_drawn_from_another_and_openais_mask_is_turned_round(service):
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 32))
    file = io.BytesIO()
    mask.save(file, "PNG")
    files = {"image": ("a.png", png(), "image/png"), "mask": ("m.png", file.getvalue(), "image/png")}
    fields = {"prompt": "a cup", "strength": "0.5", "seed": "5", "n": "1", "response_format": "b64_json"}
    answer = service.client.post(EDITS, data=fields, files=files)
    assert answer.status_code == 200, answer.text
    request = service.engine.batches[-1][0]
    assert (request.strength, request.seed, request.width, request.height) == (0.5, 5, 32, 32)
    image, drawn = service.engine.pictures[-1]
    assert image.getpixel((0, 0)) == (9, 8, 7)
    assert (drawn.getpixel((3, 3)), drawn.getpixel((20, 3))) == (255, 0)
    assert service.files() == []


def test_edits_stream_too(service):
    files = {"image[]": ("a.png", png(), "image/png")}
    answer = service.client.post(EDITS, data={"prompt": "a cup", "stream": "true"}, files=files)
    assert "event: image_edit.completed" in answer.text
    wait_until(lambda: service.files() == [])


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": ["a"]}, "prompt", "invalid_value"),
        ({"prompt": "x" * 4001}, "prompt", "above_max_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt", "above_max_value"),
        ({"n": 5}, "n", "above_max_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"size": "big"}, "size", "invalid_value"),
        ({"size": "33x32"}, "size", "invalid_value"),
        ({"size": "0x0"}, "size", "invalid_value"),
        ({"size": "16x99999"}, "size", "invalid_value"),
        ({"size": "32x32", "width": 64, "height": 64}, "size", "invalid_value"),
        ({"size": None, "width": 64}, "width", "invalid_value"),
        ({"num_inference_steps": 51}, "num_inference_steps", "above_max_value"),
        ({"num_inference_steps": 10**400}, "num_inference_steps", "above_max_value"),
        ({"n": 10**4000}, "n", "above_max_value"),
        ({"num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
        ({"guidance_scale": 21}, "guidance_scale", "above_max_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"seed": 2**64 - 1, "n": 2}, "seed", "above_max_value"),
        ({"strength": 0.5}, "strength", "invalid_value"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"output_format": "svg"}, "output_format", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"lora": {"path": "/etc"}}, "lora", "invalid_value"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale", "invalid_value"),
        ({"enable_teacache": True}, "enable_teacache", "invalid_value"),
        ({"use_pe": False}, "use_pe", "invalid_value"),
        ({"extra_params": {"apply_pe": False}}, "extra_params", "invalid_value"),
        ({"extra_params": {"other": 1}}, "extra_params.other", "unknown_parameter"),
        ({"colour": "red"}, "colour", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused_with_its_field(service, fields, param, code):
    drawn = len(service.engine.batches)
    answer = service.client.post(
        GENERATIONS, content=json.dumps({"prompt": "x", "size": "32x32"} | fields), headers=JSON
    )
    error = refusal(answer, 400, code)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(answer.text) < 500
    assert len(service.engine.batches) == drawn


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", JSON, 400, "invalid_json"),
        (b"", JSON, 400, "invalid_json"),
        (b"[]", JSON, 400, "invalid_json"),
        (b"\xff\xfe{}", JSON, 400, "invalid_json"),
        (b"[" * 200_000, JSON, 400, "invalid_json"),
        (b"{}", JSON, 400, "missing_required_parameter"),
        (b'{"prompt": "x", "guidance_scale": NaN}', JSON, 400, "invalid_value"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b'{"prompt": "x"}', {}, 415, "unsupported_media_type"),
        (b" " * (2**18 + 1), JSON, 413, "request_too_large"),
    ],
)
def test_a_body_that_is_none_is_refused(service, body, headers, status, code):
    refusal(service.client.post(GENERATIONS, content=body, headers=headers), status, code)


def test_a_body_that_does_not_say_how_large_it_is_is_counted(service):
    def endless():
        while True:
            yield b" " * 65536

    with contextlib.suppress(httpx.WriteError):  # the connection is closed before all is sent
        refusal(service.client.post(GENERATIONS, content=endless(), headers=JSON), 413, "request_too_large")


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ({}, {"prompt": "x"}, "image"),
        ({"image": b"no picture"}, {"prompt": "x"}, "image"),
        ({"image": png()[:60]}, {"prompt": "x"}, "image"),
        ({"image": png((5000, 5000), 0, "L")}, {"prompt": "x", "size": "32x32"}, "image"),
        ({"image": png((512, 512))}, {"prompt": "x"}, "image"),
        ({"image": png(), "mask": b"none"}, {"prompt": "x"}, "mask"),
        ({"image": png(), "mask": png((16, 16))}, {"prompt": "x"}, "mask"),
        ({"image": png(), "prompt": b"x"}, {}, "prompt"),
        ({"image": png()}, {"prompt": "x", "mask": "text"}, "mask"),
        ({"image": png()}, {"prompt": ["x", "y"]}, "prompt"),
        ({"image": png()}, {"prompt": "x", "n": "two"}, "n"),
        ({"image": png()}, {"prompt": "x", "extra_params": "{"}, "extra_params"),
    ],
)
def test_an_edit_that_cannot_be_is_refused(service, files, fields, param):
    sent = {name: ("f.png", data, "image/png") for name, data in files.items()} or {"other": ("f", b"", "image/png")}
    answer = service.client.post(EDITS, data=fields, files=sent)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in (param, "other")
    assert "ernie-service" not in answer.text and ".image" not in answer.text
    wait_until(lambda: service.files() == [])


def test_a_form_that_is_none_is_refused(service):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert service.client.post(EDITS, content=b"--y\r\n", headers=headers).status_code == 400
    refusal(service.client.post(EDITS, json={"prompt": "x"}), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", GENERATIONS, 405), ("GET", "/v1/../etc/passwd", 404), ("POST", f"{GENERATIONS}/", 404)],
)
def test_other_routes_are_refused_in_the_same_form(service, method, path, status):
    answer = service.client.request(method, path)
    refusal(answer, status)
    assert answer.headers.get("allow") == ("POST" if status == 405 else None)


def test_another_model_is_not_there(service):
    assert service.draw(model="gpt-image-1").json()["error"]["code"] == "model_not_found"
    (model,) = service.client.get("/v1/models").json()["data"]
    assert service.draw(model=model["id"]).status_code == 200


def test_what_fails_inside_is_in_the_log_and_not_in_the_answer(service, caplog):
    answer = service.draw("fail")
    error = refusal(answer, 500)
    assert error["type"] == "server_error"
    number = re.search("log has it as ([0-9a-f]{12})", error["message"])[1]
    assert f"picture {number} failed: OSError: cannot read {SECRET}" in caplog.text
    assert SECRET not in answer.text


def test_a_mistake_of_the_service_itself_leaks_nothing(service, caplog, monkeypatch):
    monkeypatch.setattr(service.studio, "submit", lambda *_: Path(SECRET).read_bytes())
    answer = service.draw()
    assert refusal(answer, 500)["message"].startswith("Internal error")
    assert SECRET not in answer.text and "Traceback" not in answer.text
    assert SECRET in caplog.text


# ---- waiting --------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again_and_takes_all_of_a_request_or_nothing():
    with Served(max_queue=2) as service, service.busy():
        thread, answers = service.in_background(lambda: service.draw("second"))
        wait_until(lambda: service.studio.waiting == 1)
        refused = service.draw("two more", n=2)
        error = refusal(refused, 429, "queue_full")
        assert error["type"] == "rate_limit_error"
        assert error["message"] == "1 picture waits already, and 2 may; try again later."
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert service.studio.waiting == 1
        assert service.client.get("/health").json()["waiting"] == 1
        service.engine.hold.set()
        thread.join(20)
        assert answers[0].status_code == 200
        assert "two more" not in service.engine.prompts()


def test_more_pictures_than_may_wait_are_a_mistake_and_none_is_begun():
    with Served(max_queue=2) as service:
        error = refusal(service.draw("three", n=3), 400, "above_max_value")
        assert (error["param"], error["message"]) == ("n", "'n' is 3; this service takes 2 at most.")
        assert service.draw("two", n=2).status_code == 200
        assert service.engine.prompts() == ["two", "two"]


def test_a_picture_that_takes_too_long_is_a_timeout_and_is_not_made_if_it_waits():
    with Served(timeout_s=0.3) as service:
        service.engine.hold.clear()
        answers = [service.draw("at work"), service.draw("waits"), service.draw("streams", stream=True)]
        for answer in answers[:2]:
            assert refusal(answer, 504, "timeout")["message"] == "The picture was not made within 0.3 s."
        assert '"code": "timeout"' in answers[2].text
        service.engine.hold.set()
        service.settle()
        assert service.engine.prompts() == ["at work"]
        wait_until(lambda: service.files() == [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_drawn_for(service, stream):
    body = json.dumps({"prompt": f"left {stream}", "size": "32x32", "stream": stream}).encode()
    with service.busy():
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: service.studio.waiting == 1)
        wait_until(lambda: service.studio.waiting == 0)
    service.settle()
    assert f"left {stream}" not in service.engine.prompts()


def test_a_slow_client_is_ended_and_holds_up_nobody():
    with Served(body_s=0.3) as service:
        with socket.create_connection(("127.0.0.1", service.port)) as slow:
            slow.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{{".encode())
            assert service.draw().status_code == 200
            slow.settimeout(10)
            answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
        with service.client.stream("POST", GENERATIONS, json={"prompt": "x", "size": "256x256"}) as unread:
            assert service.draw().status_code == 200
            assert unread.status_code == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/images/generations HTT", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
@pytest.mark.parametrize("again", [False, True])
def test_a_connection_without_a_whole_head_is_cut_off(sent, again):
    with Served(body_s=0.3) as service, socket.create_connection(("127.0.0.1", service.port)) as held:
        held.settimeout(10)
        if again and sent:  # as the second request on it; a connection that only waits then is uvicorn's own affair
            held.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert held.recv(4096).startswith(b"HTTP/1.1 200 ")
        held.sendall(sent)
        try:
            while held.recv(4096):
                pass
        except ConnectionResetError:
            pass
        assert service.draw().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_never_reads_is_cut_off(stream):
    """More is sent than the kernel keeps for it."""
    with Served(body_s=0.5, max_pixels=2048 * 2048, max_n=4, timeout_s=3) as service:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", service.port))
            body = json.dumps({"prompt": "x", "size": "1024x1024", "n": 4, "stream": stream}).encode()
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: len(service.server.server_state.connections) == 1)
            wait_until(lambda: service.server.server_state.connections == set())
        service.settle()
        wait_until(lambda: service.files() == [])


def test_a_key_is_asked_for_where_there_is_one():
    with Served(api_key="s3cret") as service:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            answer = service.client.post(GENERATIONS, json={"prompt": "x"}, headers=headers)
            assert refusal(answer, 401, "invalid_api_key")["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        for scheme in ("Bearer", "bearer", "BEARER "):  # RFC 9110: a scheme is one in any case
            service.client.headers["authorization"] = f"{scheme} s3cret"
            assert service.draw().status_code == 200
    assert "s3cret" not in repr(service.settings)


def test_a_lost_pipe_is_unhealthy_and_says_so():
    with Served() as service:
        assert service.client.get("/health").status_code == 200
        answer = service.draw("lost")
        assert answer.status_code in (500, 503) and SECRET not in answer.text
        wait_until(lambda: service.studio.lost)
        refusal(service.draw(), 503, "lost")
        health = service.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "lost")


def test_metrics_count_answers_by_route_and_pictures(service):
    service.draw()
    service.client.get("/nowhere")
    page = service.client.get("/metrics")
    assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in values
            values[key] = sample.value
    assert values["service_requests_total", ("route", GENERATIONS), ("status", "200")] >= 1
    assert values["service_requests_total", ("route", "other"), ("status", "404")] >= 1
    assert values["ernie_accel_pictures_done_total",] >= 1
    assert values["service_pictures_waiting",] == 0


# ---- the process ----------------------------------------------------------------------------------------------------

SERVE = """
import sys
from examples.service.__main__ import serve
from examples.service.app import create_app
from examples.service.settings import Settings
from tests.stub_engine import StubEngine
def before(requests, call):
    print("rendering", flush=True)
    sys.stdin.readline()
settings = Settings(port=int(sys.argv[1]), batch_size=1, timeout_s=20)
sys.exit(serve(create_app(settings, lambda settings: StubEngine(before)), settings))
"""


def test_sigterm_finishes_what_is_under_way_refuses_what_is_new_and_exits_with_0():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], env=environment, **pipes)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:

            def healthy():
                with contextlib.suppress(httpx.TransportError):
                    return client.get("/health").status_code == 200

            wait_until(healthy, 60)
            answers = []
            body = {"prompt": "x", "size": "32x32", "n": 2}
            thread = threading.Thread(
                target=lambda: answers.append(httpx.post(client.base_url.join(GENERATIONS), json=body, timeout=30))
            )
            thread.start()
            assert process.stdout.readline() == "rendering\n"
            process.send_signal(signal.SIGTERM)

            def refuses():
                try:
                    return client.post(GENERATIONS, json=body).status_code == 503
                except httpx.TransportError:
                    return True

            wait_until(refuses)
            process.stdin.write("\n\n")
            process.stdin.flush()
            thread.join(20)
        assert len(answers[0].json()["data"]) == 2
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart", "prometheus_client"])
def test_without_its_extra_it_says_in_one_line_what_to_install(package):
    run = (
        f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module('examples.service', run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", run], env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr == f"error: {package} is not installed: pip install 'ernie-accel[service]'\n"


def test_settings_come_from_the_environment_and_mistakes_are_named_together():
    settings = Settings.of(
        {"SERVICE_MAX_QUEUE": "9", "SERVICE_MODEL": "/srv/models/mine", "SERVICE_ENHANCER": "0", "HOME": "/"}
    )
    assert (settings.max_queue, settings.name, settings.enhancer) == (9, "mine", False)
    wrong = {"SERVICE_PORT": "70000", "SERVICE_QUEUE": "9", "SERVICE_API_KEY": "s3cret", "SERVICE_TIMEOUT_S": "soon"}
    with pytest.raises(ErnieAccelError) as caught:
        Settings.of(wrong)
    message = str(caught.value)
    assert "SERVICE_QUEUE: there is no such setting" in message
    assert "SERVICE_PORT: '70000': Input should be less than or equal to 65535" in message
    assert "SERVICE_TIMEOUT_S: 'soon'" in message
    assert "SERVICE_MAX_QUEUE" in message
    assert "s3cret" not in message


@pytest.mark.parametrize("name", ["SERVICE_API_KEY", "SERVICE_MODEL", "SERVICE_SERVED_NAME"])
def test_an_empty_setting_is_a_mistake_and_no_open_door(name):
    with pytest.raises(ErnieAccelError, match=f"{name}: .*at least 1 (character|item)"):
        Settings.of({name: ""})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"SERVICE_MODEL": "/nowhere/at/all"}, "there is no folder '/nowhere/at/all'"),
        ({"SERVICE_PRESET": "nonsense"}, "Unknown preset 'nonsense'"),
        ({"SERVICE_MEMORY": "much"}, "memory='much' is "),
    ],
)
def test_what_cannot_be_loaded_is_one_message_and_exit_status_2(monkeypatch, capsys, given, reason):
    from examples.service.__main__ import main

    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main() == 2
    error = capsys.readouterr().err
    assert f"error: {reason}" in error
    assert "Traceback" not in error


def test_openais_own_client_draws_edits_and_streams(service):
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    address = f"http://127.0.0.1:{service.port}/v1"
    client = openai.OpenAI(base_url=address, api_key="none", http_client=service.client, max_retries=0)
    made = client.images.generate(prompt="a cup", size="64x64", n=2, extra_body={"num_inference_steps": 4, "seed": 1})
    assert [picture({"b64_json": each.b64_json}).size for each in made.data] == [(64, 64)] * 2
    events = list(client.images.generate(prompt="a cup", size="64x64", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_generation.progress", "image_generation.completed"]
    assert picture({"b64_json": events[-1].b64_json}).size == (64, 64)
    edited = client.images.edit(image=("a.png", png()), prompt="a cup", extra_body={"strength": 0.5})
    assert picture({"b64_json": edited.data[0].b64_json}).size == (32, 32)
    with pytest.raises(openai.BadRequestError, match="'n' is 9; this service takes 4 at most"):
        client.images.generate(prompt="a cup", n=9)
