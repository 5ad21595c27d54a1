"""Image servers fail in every way networks know; each row is still made exactly once, or refused with the reason."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import replace

import pytest
from PIL import Image

from ernie_accel.batch import BatchInputError, produce
from ernie_accel.batch.engines import Request
from ernie_accel.batch.engines.http import HttpEngine
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


def test_a_job_on_servers_is_resumed(tmp_path):
    with ImageServer(misbehave={"cup 1": ["refuse"]}) as server:
        first = run(engine_for(server), sized_rows(3), tmp_path)
        second = run(engine_for(server), sized_rows(3), tmp_path)
    assert [result.error is None for result in first] == [True, False, True]
    assert [(result.row.index, result.error) for result in second] == [(1, None)]
    assert len(server.requests) == 4


def test_what_the_api_cannot_carry_is_told_before_anything_is_asked(tmp_path):
    with ImageServer("vllm-omni") as server:
        rows = [replace(row, height=None, steps=500) for row in sized_rows(1)]
        with pytest.raises(BatchInputError) as caught:
            run(engine_for(server), rows, tmp_path)
    assert caught.value.problems == (
        (2, "gives only one of width and height; image servers need both, or neither"),
        (2, "asks for 500 steps; vLLM-Omni takes 200 at most"),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"endpoints": []}, ErnieAccelError, "no endpoint is given"),
        ({"endpoints": ["localhost:30000"]}, ErnieAccelError, "is no HTTP address; expected one like http://"),
        ({"endpoints": ["http://a"], "server": "sglan"}, UnknownNameError, "Did you mean 'sglang'"),
    ],
)
def test_mistakes_in_the_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        HttpEngine(**arguments)
