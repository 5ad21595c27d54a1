"""Render on image servers that run already: SGLang and vLLM-Omni, by the OpenAI images API.

A request is one picture; the servers make batches of their own. Whatever is wrong for a moment (429, 5xx, a timeout, an
answer cut off) is tried again, on another server where there is one; whatever is wrong with the request is not.

address  where a server is, and the credentials that go nowhere else
wire     one request and its answer, within bounds of time and bytes
answers  what an answer holds, and whether another attempt may help
"""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from PIL import Image

from ernie_accel.batch.engines import answers
from ernie_accel.batch.engines.address import Address, check_key, parse_address
from ernie_accel.batch.engines.answers import PassingError, RefusalError
from ernie_accel.batch.engines.base import ENHANCED_PROMPT, BatchTimeoutError, Engine, Outcome, Request
from ernie_accel.batch.engines.wire import Wire, WireError
from ernie_accel.batch.errors import Problem
from ernie_accel.common.text import one_line
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

SERVERS = ("sglang", "vllm-omni")
VLLM_OMNI_MAX_STEPS = 200
VLLM_OMNI_MAX_GUIDANCE = 20.0

_MAX_WAIT_S = 60.0
_REST_S = 10.0  # how long an endpoint that failed is skipped while another is free


class ServerRefusedError(ErnieAccelError):
    """A server will not make this picture, however often it is asked.

    Attributes:
        endpoint: The server, without credentials.
        status: The HTTP status; None if it answered well-formed and wrongly.
    """

    def __init__(self, endpoint: str, status: int | None, reason: str) -> None:
        self.endpoint, self.status, self.reason = endpoint, status, reason
        super().__init__(endpoint, status, reason)

    def __str__(self) -> str:
        """Return who refused, and why."""
        return f"{self.endpoint} refused{'' if self.status is None else f' ({self.status})'}: {self.reason}"


class ServersFailedError(ErnieAccelError):
    """Every attempt at a picture failed in a way that might have passed; the text names the last one."""


class HttpEngine(Engine):
    """One or several image servers of the same kind, serving the same model."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        server: str = "sglang",
        concurrency: int = 4,
        retries: int = 5,
        request_timeout_s: float = 600.0,
        backoff_s: float = 0.5,
        steps: int | None = 8,
        guidance_scale: float | None = 1.0,
        use_pe: bool = False,
        enhancer: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        enhancer_api_key: str | None = None,
    ) -> None:
        """Connect to nothing yet; servers may still be starting.

        Credentials in an address (`http://user:password@host`, `?token=...`) go to that server alone, and are shown
        nowhere.

        Args:
            endpoints: Base addresses such as "http://10.0.0.7:30000"; a trailing "/v1" is understood.
            server: "sglang" or "vllm-omni": they name some settings differently.
            concurrency: Requests at once to each endpoint.
            retries: Further attempts for a request that failed for a passing reason.
            request_timeout_s: Seconds for one attempt, from connecting to the last byte.
            backoff_s: Seconds before the first further attempt; doubled each time, times 0.5 to 1.5 at random.
            steps: For rows that give none. The default is ERNIE-Image-Turbo's: SGLang's own would be 50.
            guidance_scale: For rows that give none; likewise, SGLang's own would be 5.0. None: the server's.
            use_pe: Ask the image server to enhance prompts; its words are not covered by the row's seed. Servers may
                ignore this, on or off, and their answers do not show it: see `identity`.
            enhancer: Base address of a vLLM server that runs the prompt enhancer; it is asked with the row's seed,
                and the image server gets what it answers.
            model: The model's name, if the servers serve several.
            api_key: Sent to the image servers as a bearer token, and not to the enhancer.
            enhancer_api_key: Sent to the enhancer as a bearer token, and not to the image servers.

        Raises:
            MissingExtraError: httpcore is not installed.
            UnknownNameError: There is no such kind of server.
            ErnieAccelError: No endpoint is given, one is not an HTTP address, or a number is out of range.
        """
        if server not in SERVERS:
            raise UnknownNameError("image server", server, SERVERS)
        if not endpoints:
            raise ErnieAccelError("no endpoint is given; name at least one, like http://host:30000")
        if enhancer is None and enhancer_api_key is not None:
            raise ErnieAccelError("there is an API key for the enhancer and no enhancer; name it, or leave the key out")
        check_key(api_key, "the image servers")
        check_key(enhancer_api_key, "the enhancer")
        self._check_numbers(concurrency, retries, request_timeout_s, backoff_s)
        self._endpoints = [_Endpoint(parse_address(each, key=api_key)) for each in endpoints]
        self._enhancer = _Endpoint(parse_address(enhancer, key=enhancer_api_key)) if enhancer else None
        self._server, self._model, self._use_pe = server, model, use_pe
        self._steps, self._guidance_scale = steps, guidance_scale
        self._retries, self._backoff_s, self._request_timeout_s = retries, backoff_s, request_timeout_s
        if problems := self._beyond(steps, guidance_scale):
            raise ErnieAccelError(f"the default for rows {' and '.join(problems)}")
        self._enhancer_model: str | None = None
        self.slots = concurrency * len(endpoints)
        self._lock = threading.Lock()
        self._jitter = random.Random()
        self._warned = False
        self._wire = Wire(kept=self.slots)

    def render(self, requests: Sequence[Request], timeout_s: float | None = None) -> Sequence[Outcome]:
        """Ask a server for each picture; see `Engine.render`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            return [self._picture(request, deadline) for request in requests]
        except _DeadlineError:
            raise BatchTimeoutError(timeout_s or 0.0) from None

    def problems(self, requests: Sequence[tuple[int, Request]]) -> list[Problem]:
        """Return what these servers' API has no room for."""
        problems: list[Problem] = []
        for line, request in requests:
            if (request.width is None) != (request.height is None):
                problems.append((line, "gives only one of width and height; image servers need both, or neither"))
            problems += [(line, problem) for problem in self._beyond(request.steps, request.guidance_scale)]
        return problems

    def identity(self) -> Mapping[str, str]:
        """Return the kind of server and the settings that rows leave to this engine.

        What enhanced the prompts is only stated where it is known. Image servers are asked to, or not to; but some
        releases ignore that, and no answer shows it reliably.
        """
        settings = {"steps": self._steps, "guidance_scale": self._guidance_scale}
        given = {f"default {name}": f"{value:g}" for name, value in settings.items() if value is not None}
        asked = "asked to be on" if self._asks_for_enhancing else "asked to be off"
        known = {"enhanced by": "vllm" if self._enhancer else "unknown", "image server's enhancer": asked}
        return {"pipeline": f"{self._server} image server"} | known | given

    def close(self) -> None:
        """Drop the connections; requests under way fail."""
        self._wire.close()

    @property
    def _asks_for_enhancing(self) -> bool:
        return self._use_pe and self._enhancer is None

    @staticmethod
    def _check_numbers(concurrency: int, retries: int, request_timeout_s: float, backoff_s: float) -> None:
        wrong = []
        if concurrency < 1:
            wrong.append(f"concurrency is {concurrency}; expected 1 or more")
        if retries < 0:
            wrong.append(f"retries is {retries}; expected 0 or more")
        if not 0 < request_timeout_s < math.inf:
            wrong.append(f"request_timeout_s is {request_timeout_s}; expected seconds, more than 0")
        if not 0 <= backoff_s < math.inf:
            wrong.append(f"backoff_s is {backoff_s}; expected seconds, 0 or more")
        if wrong:
            raise ErnieAccelError("; ".join(wrong))

    def _beyond(self, steps: int | None, guidance_scale: float | None) -> list[str]:
        """Return what this kind of server would refuse."""
        if self._server != "vllm-omni":
            return []
        problems = []
        if (steps or 0) > VLLM_OMNI_MAX_STEPS:
            problems.append(f"asks for {steps} steps; vLLM-Omni takes {VLLM_OMNI_MAX_STEPS} at most")
        if (guidance_scale or 0) > VLLM_OMNI_MAX_GUIDANCE:
            found = f"asks for a guidance_scale of {guidance_scale:g}"
            problems.append(f"{found}; vLLM-Omni takes {VLLM_OMNI_MAX_GUIDANCE:g} at most")
        return problems

    def _picture(self, request: Request, deadline: float | None) -> Image.Image:
        prompt = request.prompt
        if self._enhancer is not None:
            prompt = self._attempts([self._enhancer], lambda at: self._enhance(at, request, deadline), deadline)
        body = self._body(request, prompt)
        size = None if request.width is None or request.height is None else (request.width, request.height)

        def ask(at: _Endpoint) -> Image.Image:
            answer = self._post(at, "/v1/images/generations", body, deadline, answers.picture_limit(size))
            picture = answers.picture_in(answer, size)
            used = prompt
            if revised := answers.revised_prompt_in(answer, prompt):
                used = at.address.without_secrets(revised)
                self._warn_of_revision(at)
            picture.info = {} if used == request.prompt else {ENHANCED_PROMPT: used}
            return picture

        return self._attempts(self._endpoints, ask, deadline)

    def _warn_of_revision(self, at: _Endpoint) -> None:
        if not (self._asks_for_enhancing or self._warned):
            self._warned = True
            _log.warning(
                "%s changes prompts, though it was asked not to; each picture says what it was made from",
                at.address.shown,
            )

    def _body(self, request: Request, prompt: str) -> dict[str, object]:
        body: dict[str, object] = {"prompt": prompt, "n": 1, "response_format": "b64_json", "seed": request.seed}
        optional = {
            "model": self._model,
            "size": None if request.width is None else f"{request.width}x{request.height}",
            "num_inference_steps": self._steps if request.steps is None else request.steps,
            "guidance_scale": self._guidance_scale if request.guidance_scale is None else request.guidance_scale,
            "negative_prompt": request.negative_prompt,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        if self._server == "sglang":
            # SGLang's default is JPEG of quality 75; vLLM-Omni makes PNG. Some releases drop an undeclared `use_pe`.
            return body | {"output_format": "png", "use_pe": self._asks_for_enhancing}
        return body | {"extra_params": {"apply_pe": self._asks_for_enhancing}}

    def _enhance(self, at: _Endpoint, request: Request, deadline: float | None) -> str:
        if self._enhancer_model is None:  # two threads may both ask; neither waits for the other
            self._enhancer_model = answers.model_in(self._post(at, "/v1/models", None, deadline))
        content = {"prompt": request.prompt, "width": request.width or 1024, "height": request.height or 1024}
        body = {
            "model": self._enhancer_model,
            "messages": [{"role": "user", "content": json.dumps(content, ensure_ascii=False)}],
            "temperature": 0.6,
            "top_p": 0.95,
            "max_tokens": 2048,
            "seed": request.seed & (2**63 - 1),  # vLLM takes signed 64 bits
        }
        text = answers.enhanced_prompt_in(self._post(at, "/v1/chat/completions", body, deadline))
        return at.address.without_secrets(text) or request.prompt

    def _attempts(self, endpoints: Sequence[_Endpoint], ask: Callable[[_Endpoint], _T], deadline: float | None) -> _T:
        """Return the first good answer; wait longer after each that failed, and prefer another server."""
        attempt = 0
        while True:
            at = self._choose(endpoints)
            attempt += 1
            try:
                return ask(at)
            except RefusalError as error:
                raise ServerRefusedError(at.address.shown, error.status, str(error)) from None
            except PassingError as error:
                with self._lock:
                    at.rests_until = time.monotonic() + _REST_S
                if attempt > self._retries:
                    failed = f"{at.address.shown} {error}; given up after {attempt} attempts"
                    raise ServersFailedError(failed) from None
                wait_s = error.wait_s or self._backoff_s * 2 ** min(attempt - 1, 30) * self._jitter.uniform(0.5, 1.5)
            finally:
                with self._lock:
                    at.busy -= 1
            _sleep(min(wait_s, _MAX_WAIT_S), deadline)

    def _choose(self, endpoints: Sequence[_Endpoint]) -> _Endpoint:
        """Return the endpoint with the fewest requests under way, of those that have not just failed if there are."""
        now = time.monotonic()
        with self._lock:
            chosen = min(endpoints, key=lambda at: (at.rests_until > now, at.busy))
            chosen.busy += 1
        return chosen

    def _post(
        self,
        at: _Endpoint,
        path: str,
        body: Mapping[str, object] | None,
        deadline: float | None,
        limit: int = answers.MAX_WORDS_BYTES,
    ) -> object:
        """Return the JSON that a server answers."""
        now = time.monotonic()
        ends = now + self._request_timeout_s
        if deadline is not None:
            ends = min(ends, deadline)
        if ends <= now:
            raise _DeadlineError
        content = None if body is None else json.dumps(body).encode()
        try:
            answer = self._wire.send(
                at.address, path, content, ends=ends, limit=limit, limit_refusal=answers.MAX_REFUSAL_BYTES
            )
        except WireError as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise _DeadlineError from None
            raise PassingError(f"failed: {one_line(at.address.without_secrets(str(error)), 300)}") from None
        return answers.parse_answer(answer, at.address.without_secrets)


class _DeadlineError(Exception):
    """The batch's time is up."""


class _Endpoint:
    """One server, the requests it has under way, and until when it is skipped."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.busy = 0
        self.rests_until = 0.0


def _sleep(seconds: float, deadline: float | None) -> None:
    if deadline is not None and time.monotonic() + seconds >= deadline:
        raise _DeadlineError
    time.sleep(seconds)
