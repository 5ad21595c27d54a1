"""Image servers fail in every way networks know; each row is still made exactly once, or refused with the reason."""

from __future__ import annotations

import base64
import email.utils
import socket
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
from PIL import Image

from ernie_accel.batch import BatchInputError, produce
from ernie_accel.batch.engines import Request
from ernie_accel.batch.engines.address import parse_address
from ernie_accel.batch.engines.answers import retry_after_s
from ernie_accel.batch.engines.http import HttpEngine
from ernie_accel.batch.input.job import plan_job
from ernie_accel.cli.batch import run_job
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError
from tests.image_server import ImageServer
from tests.stub_engine import make_rows, picture_of


def engine_for(*servers: ImageServer, **options) -> HttpEngine:
    usual = {"server": servers[0].kind, "backoff_s": 0.01, "retries": 3, "request_timeout_s": 10}
    return HttpEngine([server.address for server in servers], **(usual | options))


def run(engine, rows, out, **options):
    results = sorted(produce(engine, rows, out, progress=False, **options), key=lambda result: result.row.index)
    engine.close()
    return results


def sized_rows(count, **settings):
    return make_rows(count, width=64, height=48, **settings)


def check_pictures(results):
    for result in results:
        with Image.open(result.path) as picture:
            expected = picture_of(Request(prompt="", seed=result.seed, width=64, height=48))
            assert picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["sglang", "vllm-omni"])
def test_requests_are_what_the_server_takes(tmp_path, kind):
    rows = sized_rows(2, negative_prompt="blurry")
    rows[1] = replace(rows[1], steps=20, guidance_scale=4.0, seed=2**40)
    with ImageServer(kind) as server:
        results = run(engine_for(server, model="ernie"), rows, tmp_path)
    assert [result.error for result in results] == [None, None]
    check_pictures(results)
    first, second = sorted(server.requests, key=lambda body: body["seed"])
    off = {"use_pe": False, "output_format": "png"} if kind == "sglang" else {"extra_params": {"apply_pe": False}}
    assert first == {
        "prompt": "cup 0",
        "n": 1,
        "response_format": "b64_json",
        "seed": 0,
        "model": "ernie",
        "size": "64x48",
        "num_inference_steps": 8,
        "guidance_scale": 1.0,
        "negative_prompt": "blurry",
        **off,
    }
    assert (second["seed"], second["num_inference_steps"], second["guidance_scale"]) == (2**40, 20, 4.0)


@pytest.mark.parametrize("deed", ["429", "500", "reset", "truncate", "no json", "half picture", "empty"])
def test_what_may_pass_is_tried_again(tmp_path, deed):
    with ImageServer(misbehave={"cup 1": [deed, deed]}) as server:
        results = run(engine_for(server), sized_rows(3), tmp_path)
    assert [result.error for result in results] == [None] * 3
    check_pictures(results)
    assert len(server.requests) == 5


def test_a_timeout_is_tried_again(tmp_path):
    with ImageServer(misbehave={"cup 0": ["slow"]}) as server:
        results = run(engine_for(server, request_timeout_s=0.4), sized_rows(1), tmp_path)
    assert results[0].error is None


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        ("refuse", "refused (400): prompt was refused by the safety checker"),
        ("wrong size", "refused: it made a picture of 32x48 px where 64x48 were asked for"),
    ],
)
def test_what_will_not_pass_fails_its_row_at_once(tmp_path, deed, error):
    with ImageServer(misbehave={"cup 1": [deed] * 9}) as server:
        results = run(engine_for(server), sized_rows(3), tmp_path)
        assert [result.error for result in results] == [None, f"{server.address} {error}", None]
    assert len(server.requests) == 3


def test_attempts_end(tmp_path):
    with ImageServer(misbehave={"cup 0": ["500"] * 9}) as server:
        (result,) = run(engine_for(server, retries=2), sized_rows(1), tmp_path)
    assert result.error.endswith("answered 500: busy; given up after 3 attempts")
    assert len(server.requests) == 3


def test_the_batch_timeout_holds_over_all_attempts(tmp_path):
    with ImageServer(misbehave={"cup 0": ["500"] * 99}) as server:
        (result,) = run(engine_for(server, retries=99, backoff_s=0.05), sized_rows(1), tmp_path, timeout_s=0.5)
    assert result.error == "not finished after 0.5 s (--timeout) and given up"


def test_requests_are_spread_and_bounded(tmp_path):
    with ExitStack() as stack:
        servers = [stack.enter_context(ImageServer()) for _ in range(2)]
        results = run(engine_for(*servers, concurrency=3), sized_rows(40), tmp_path)
    assert [result.error for result in results] == [None] * 40
    check_pictures(results)
    assert sum(len(server.requests) for server in servers) == 40
    for server in servers:
        assert len(server.requests) >= 8
        assert server.most_at_once <= 3


def test_a_dead_server_costs_no_row(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with ImageServer() as server:
        engine = HttpEngine([dead, server.address], backoff_s=0.01, request_timeout_s=10)
        results = run(engine, sized_rows(12), tmp_path)
    assert [result.error for result in results] == [None] * 12
    assert len(server.requests) == 12


def test_prompts_are_enhanced_on_their_own_server_with_the_rows_seed(tmp_path):
    with ImageServer() as server, ImageServer() as enhancer:
        engine = engine_for(server, enhancer=enhancer.address + "/v1/")
        results = run(engine, sized_rows(2), tmp_path)
    assert [result.error for result in results] == [None, None]
    assert {body["prompt"] for body in server.requests} == {"cup 0, enhanced 0", "cup 1, enhanced 1"}
    assert {body["use_pe"] for body in server.requests} == {False}
    with Image.open(results[0].path) as picture:
        assert picture.text["enhanced by"] == "vllm"
        assert (picture.text["prompt"], picture.text["enhanced_prompt"]) == ("cup 0", "cup 0, enhanced 0")


@pytest.mark.parametrize("kind", ["sglang", "vllm-omni"])
@pytest.mark.parametrize("use_pe", [False, True])
def test_only_what_is_known_of_the_servers_own_enhancer_is_stated(tmp_path, kind, use_pe):
    with ImageServer(kind) as server:
        (result,) = run(engine_for(server, use_pe=use_pe), sized_rows(1), tmp_path)
    with Image.open(result.path) as picture:
        assert picture.text["enhanced by"] == "unknown"
        assert picture.text["image server's enhancer"] == f"asked to be {'on' if use_pe else 'off'}"
        assert "enhanced_prompt" not in picture.text


def test_a_prompt_that_the_server_changed_is_kept_and_pointed_out_once(tmp_path, caplog):
    with ImageServer() as server:
        server.revises = True
        results = run(engine_for(server), sized_rows(3), tmp_path)
    for result in results:
        with Image.open(result.path) as picture:
            assert picture.text["enhanced_prompt"] == f"{result.row.prompt}, revised"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{server.address} changes prompts, though it was asked not to; each picture says what it was made from"
    ]


def test_each_server_gets_its_own_key_and_no_other(tmp_path):
    with ImageServer() as server, ImageServer() as enhancer:
        engine = engine_for(server, enhancer=enhancer.address, api_key="image-key", enhancer_api_key="enhancer-key")
        run(engine, sized_rows(2), tmp_path)
    assert server.authorizations == {"Bearer image-key"}
    assert enhancer.authorizations == {"Bearer enhancer-key"}


def test_the_key_of_the_image_servers_does_not_go_to_an_enhancer_without_one(tmp_path):
    with ImageServer() as server, ImageServer() as enhancer:
        run(engine_for(server, enhancer=enhancer.address, api_key="image-key"), sized_rows(1), tmp_path)
    assert enhancer.authorizations == {None}


def test_user_and_password_of_an_address_become_its_own_header(tmp_path):
    with ImageServer() as server:
        address = server.address.replace("http://", "http://me:p%40ss@")
        (result,) = run(HttpEngine([address + "/v1"]), sized_rows(1), tmp_path)
    assert result.error is None
    assert server.authorizations == {"Basic " + base64.b64encode(b"me:p@ss").decode()}


def test_the_command_takes_keys_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGE_KEY", "sk-image\n")
    monkeypatch.setenv("ENHANCER_KEY", "sk-enhancer")
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,width,height\na cup,64,48\n")
    with ImageServer() as server, ImageServer() as enhancer:
        options = {"output_dir": tmp_path / "out", "endpoint": [server.address], "enhancer": enhancer.address}
        options |= {"api_key_env": "IMAGE_KEY", "enhancer_api_key_env": "ENHANCER_KEY"}
        assert run_job(plan_job(table, options)) == 0
    assert (server.authorizations, enhancer.authorizations) == ({"Bearer sk-image"}, {"Bearer sk-enhancer"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": ["http://a"], "api_key_env": "NOT_SET"}, "the environment variable NOT_SET is not set"),
        ({"endpoint": ["http://a"], "api_key_env": "s3cret-key"}, "the environment variable is not set"),
        (
            {"endpoint": ["http://a"], "api_key_env": "BAD"},
            "the API key of the image servers (3 characters) has spaces",
        ),
        ({"api_key_env": "GOOD"}, "api_key_env has no effect without endpoint"),
        ({"endpoint": ["http://a"], "enhancer_api_key_env": "GOOD"}, "enhancer_api_key_env has no effect without enh"),
        ({"endpoint": ["me:s3cret@a"]}, "endpoint: endpoint '***@a' is not an HTTP address"),
        ({"endpoint": ["http://me:s3cret@a b"]}, "endpoint 'http://***@a b' has spaces"),
        ({"endpoint": ["http://me:s3cret@a"], "api_key_env": "GOOD"}, "one header cannot carry both"),
        ({"endpoint": ["http://a"], "enhancer": "http://b:s3cret"}, "endpoint 'http://b:***' is not an HTTP address"),
        ({"endpoint": {"http://me:s3cret@a": 1}}, "endpoint is ***; expected text"),
        ({"endpoint": ["http://a"], "enhancer": ["http://me:s3cret@a"]}, "enhancer is ***; expected text in quotes"),
        ({"endpoint": ["http://me:s3cret\0@a"]}, "endpoint is ***; one of them"),
        ({"endpoint": ["http://a"], "api_key": "s3cret"}, "key 'api_key' is unknown; did you mean 'api_key_env'?"),
    ],
)
def test_mistakes_with_keys_and_addresses_show_no_secret(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("GOOD", "sk-good")
    monkeypatch.setenv("BAD", "a b")
    table = tmp_path / "prompts.csv"
    table.write_text("prompt\na cup\n")
    with pytest.raises(BatchInputError) as caught:
        plan_job(table, {"output_dir": tmp_path / "out", "model": "some/model"} | options)
    assert message in str(caught.value)
    assert "s3cret" not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    ("address", "shown", "path", "query"),
    [
        ("http://host:30000/v1/", "http://host:30000", "", ""),
        ("HTTPS://Host/images/v1", "https://host/images", "/images", ""),
        ("http://[::1]:8000", "http://[::1]:8000", "", ""),
        ("http://me@host", "http://host", "", ""),
        ("http://me:pass@host/a b".replace(" ", "%20"), "http://host/a%20b", "/a%20b", ""),
        ("http://host?key=s3cret&b=1", "http://host", "", "?key=s3cret&b=1"),
    ],
)
def test_addresses_are_taken_apart(address, shown, path, query):
    found = parse_address(address)
    assert (found.shown, found.path, found.query) == (shown, path, query)
    assert "s3cret" not in repr(found) and "pass" not in repr(found)


@pytest.mark.parametrize(
    "address", ["http://", "http://:80", "http://a:b", "http://a:99999", "http://[1", "ftp://a", "a", ""]
)
def test_no_addresses_are_refused(address):
    with pytest.raises(ErnieAccelError, match="expected one like http://host:30000"):
        parse_address(address)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0.5", 0.5), ("120", 120.0), ("", None), ("-1", None), ("nan", None), ("inf", None), ("9" * 5000, None),
        ("1e9", None), ("0x10", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("Thu, 99 Foo", None), ("\u0663", None),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_a_date_or_nothing(value, seconds):
    assert retry_after_s({"retry-after": value}) == seconds


def test_retry_after_a_date_is_the_time_until_then():
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert retry_after_s({"retry-after": date}) == pytest.approx(100, abs=2)


def test_a_job_on_servers_is_resumed(tmp_path):
    with ImageServer(misbehave={"cup 1": ["refuse"]}) as server:
        first = run(engine_for(server), sized_rows(3), tmp_path)
        second = run(engine_for(server), sized_rows(3), tmp_path)
    assert [result.error is None for result in first] == [True, False, True]
    assert [(result.row.index, result.error) for result in second] == [(1, None)]
    assert len(server.requests) == 4


def test_what_the_api_cannot_carry_is_refused_before_anything_is_asked(tmp_path):
    with ImageServer("vllm-omni") as server:
        rows = [replace(row, height=None, steps=500, guidance_scale=20.5) for row in sized_rows(1)]
        with pytest.raises(BatchInputError) as caught:
            run(engine_for(server), rows, tmp_path)
    assert caught.value.problems == (
        (2, "gives only one of width and height; image servers need both, or neither"),
        (2, "asks for 500 steps; vLLM-Omni takes 200 at most"),
        (2, "asks for a guidance_scale of 20.5; vLLM-Omni takes 20 at most"),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"endpoints": []}, ErnieAccelError, "no endpoint is given"),
        ({"endpoints": ["localhost:30000"]}, ErnieAccelError, "is not an HTTP address; expected one like http://"),
        ({"endpoints": ["http://a"], "server": "sglan"}, UnknownNameError, "Did you mean 'sglang'"),
        ({"endpoints": ["http://a"], "concurrency": 0, "retries": -1}, ErnieAccelError, "is 0; .* retries is -1"),
        ({"endpoints": ["http://a"], "request_timeout_s": float("nan")}, ErnieAccelError, "request_timeout_s is nan"),
        ({"endpoints": ["http://a"], "api_key": "a\nb"}, ErnieAccelError, "API key of the image servers"),
        ({"endpoints": ["http://a"], "enhancer_api_key": "a"}, ErnieAccelError, "no enhancer; name it"),
        (
            {"endpoints": ["http://a"], "server": "vllm-omni", "steps": 201},
            ErnieAccelError,
            "the default for rows asks",
        ),
    ],
)
def test_mistakes_in_the_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        HttpEngine(**arguments)
