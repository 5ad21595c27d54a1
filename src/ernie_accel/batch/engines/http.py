"""Render on image servers that run already: SGLang and vLLM-Omni, by the OpenAI images API.

A request is one picture; the servers make batches of their own. Whatever is wrong for a moment (429, 5xx, a timeout, an
answer cut off) is tried again, on another server where there is one; whatever is wrong with the request is not.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from ernie_accel.batch.engines.base import BatchTimeoutError, Engine, Outcome, Request
from ernie_accel.batch.errors import Problem
from ernie_accel.core.errors import ErnieAccelError, MissingExtraError, UnknownNameError

if TYPE_CHECKING:
    import httpx

SERVERS = ("sglang", "vllm-omni")
VLLM_OMNI_MAX_STEPS = 200

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_WAIT_S = 60.0
_REST_S = 10.0  # how long an endpoint that failed is passed over while another is free
_MAX_MESSAGE = 300  # characters of a server's refusal


class ServerRefusedError(ErnieAccelError):
    """A server will not make this picture, however often it is asked.

    Attributes:
        endpoint: The server.
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


class _PassingError(Exception):
    """Something that may be better at the next attempt."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        self.wait_s = wait_s
        super().__init__(reason)


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
    ) -> None:
        """Connect to nothing yet; servers may still be starting.

        Args:
            endpoints: Base addresses such as "http://10.0.0.7:30000"; a trailing "/v1" is understood.
            server: "sglang" or "vllm-omni": they name some settings differently.
            concurrency: Requests at once to each endpoint.
            retries: Further attempts for a request that failed for a passing reason.
            request_timeout_s: Seconds for one attempt.
            backoff_s: Seconds before the first further attempt; doubled each time, times 0.5 to 1.5 at random.
            steps: For rows that give none. The default is ERNIE-Image-Turbo's: SGLang's own would be 50.
            guidance_scale: For rows that give none; likewise, SGLang's own would be 5.0. None: the server's.
            use_pe: Let the image server enhance prompts; its words are not covered by the row's seed.
            enhancer: Base address of a vLLM server that runs the prompt enhancer; it is asked with the row's seed,
                and the image server gets what it answers.
            model: The model's name, if the servers serve several.
            api_key: Sent as a bearer token.

        Raises:
            MissingExtraError: httpx is not installed.
            UnknownNameError: There is no such kind of server.
            ErnieAccelError: No endpoint is given, or one is no HTTP address.
        """
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "http") from error
        if server not in SERVERS:
            raise UnknownNameError("image server", server, SERVERS)
        for address in (*endpoints, *([enhancer] if enhancer else [])):
            if not address.startswith(("http://", "https://")):
                raise ErnieAccelError(f"endpoint {address!r} is no HTTP address; expected one like http://host:30000")
        if not endpoints:
            raise ErnieAccelError("no endpoint is given; name at least one, like http://host:30000")
        self._endpoints = [_Endpoint(_base(address)) for address in endpoints]
        self._server, self._model, self._use_pe = server, model, use_pe
        self._steps, self._guidance_scale = steps, guidance_scale
        self._retries, self._backoff_s, self._request_timeout_s = retries, backoff_s, request_timeout_s
        self._enhancer = _Endpoint(_base(enhancer)) if enhancer else None
        self._enhancer_model: str | None = None
        self.slots = concurrency * len(endpoints)
        self._lock = threading.Lock()
        self._jitter = random.Random()
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.slots)
        # trust_env off: a proxy for the outside must not take the requests to servers in the same rack
        self._client = httpx.Client(headers=headers, limits=limits, trust_env=False)

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
            if self._server == "vllm-omni" and (request.steps or 0) > VLLM_OMNI_MAX_STEPS:
                problems.append(
                    (line, f"asks for {request.steps} steps; vLLM-Omni takes {VLLM_OMNI_MAX_STEPS} at most")
                )
        return problems

    def identity(self) -> Mapping[str, str]:
        """Return the kind of server and the settings that rows leave to this engine."""
        settings = {"steps": self._steps, "guidance_scale": self._guidance_scale}
        given = {f"default {name}": f"{value:g}" for name, value in settings.items() if value is not None}
        enhanced = "vllm" if self._enhancer else "image server" if self._use_pe else "no"
        return {"pipeline": f"{self._server} image server", "enhanced by": enhanced} | given

    def close(self) -> None:
        """Drop the connections; requests under way fail."""
        self._client.close()

    def _picture(self, request: Request, deadline: float | None) -> Image.Image:
        prompt = request.prompt
        if self._enhancer is not None:
            prompt = self._attempts([self._enhancer], lambda at: self._enhance(at, request, deadline), deadline)
        body = self._body(request, prompt)

        def ask(at: _Endpoint) -> Image.Image:
            answer = self._post(at, "/v1/images/generations", body, deadline)
            return _picture_in(answer, at.address, request)

        picture: Image.Image = self._attempts(self._endpoints, ask, deadline)
        return picture

    def _body(self, request: Request, prompt: str) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": prompt, "n": 1, "response_format": "b64_json", "seed": request.seed}
        optional = {
            "model": self._model,
            "size": None if request.width is None else f"{request.width}x{request.height}",
            "num_inference_steps": self._steps if request.steps is None else request.steps,
            "guidance_scale": self._guidance_scale if request.guidance_scale is None else request.guidance_scale,
            "negative_prompt": request.negative_prompt,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        use_pe = self._use_pe and self._enhancer is None
        return body | ({"use_pe": use_pe} if self._server == "sglang" else {"extra_params": {"apply_pe": use_pe}})

    def _enhance(self, at: _Endpoint, request: Request, deadline: float | None) -> str:
        with self._lock:
            if self._enhancer_model is None:
                self._enhancer_model = self._only_model(at, deadline)
        content = {"prompt": request.prompt, "width": request.width or 1024, "height": request.height or 1024}
        body = {
            "model": self._enhancer_model,
            "messages": [{"role": "user", "content": json.dumps(content, ensure_ascii=False)}],
            "temperature": 0.6,
            "top_p": 0.95,
            "max_tokens": 2048,
            "seed": request.seed & (2**63 - 1),  # vLLM takes signed 64 bits
        }
        answer = self._post(at, "/v1/chat/completions", body, deadline)
        try:
            text = str(answer["choices"][0]["message"]["content"]).strip()
        except (KeyError, IndexError, TypeError):
            raise _PassingError(f"{at.address} answered without choices[0].message.content") from None
        return text or request.prompt

    def _only_model(self, at: _Endpoint, deadline: float | None) -> str:
        answer = self._post(at, "/v1/models", None, deadline)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise _PassingError(f"{at.address} names no model") from None

    def _attempts(self, endpoints: Sequence[_Endpoint], ask: Any, deadline: float | None) -> Any:
        """Return the first good answer; wait longer after each that failed, and prefer another server."""
        for attempt in range(self._retries + 1):
            at = self._choose(endpoints)
            try:
                return ask(at)
            except _PassingError as error:
                with self._lock:
                    at.rests_until = time.monotonic() + _REST_S
                if attempt == self._retries:
                    raise ServersFailedError(f"{error}; given up after {attempt + 1} attempts") from error
                wait_s = error.wait_s or self._backoff_s * 2**attempt * self._jitter.uniform(0.5, 1.5)
                _sleep(min(wait_s, _MAX_WAIT_S), deadline)
            finally:
                with self._lock:
                    at.busy -= 1
        raise ValueError(f"retries is {self._retries}; expected 0 or more")

    def _choose(self, endpoints: Sequence[_Endpoint]) -> _Endpoint:
        """Return the endpoint with the fewest requests under way, of those that have not just failed if there are."""
        now = time.monotonic()
        with self._lock:
            chosen = min(endpoints, key=lambda at: (at.rests_until > now, at.busy))
            chosen.busy += 1
        return chosen

    def _post(self, at: _Endpoint, path: str, body: Mapping[str, Any] | None, deadline: float | None) -> Any:
        """Return the JSON that a server answers."""
        import httpx

        limit = time.monotonic() + self._request_timeout_s
        ends = limit if deadline is None else min(limit, deadline)
        left = ends - time.monotonic()
        if left <= 0:
            raise _DeadlineError
        content = bytearray()
        method = "GET" if body is None else "POST"
        try:
            with self._client.stream(method, at.address + path, json=body, timeout=left) as answer:
                for chunk in answer.iter_bytes():
                    content += chunk
                    if time.monotonic() > ends:  # httpx' own timeout is for each chunk, and a trickle has many
                        raise httpx.ReadTimeout("the answer trickled in too slowly")
        except httpx.TransportError as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise _DeadlineError from error
            raise _PassingError(f"{at.address}: {type(error).__name__}: {error}") from error
        return _parsed(at.address, answer, bytes(content))


class _DeadlineError(Exception):
    """The batch's time is up."""


class _Endpoint:
    """One server, the requests it has under way, and until when it is passed over."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.busy = 0
        self.rests_until = 0.0


def _base(address: str) -> str:
    return address.rstrip("/").removesuffix("/v1")


def _sleep(seconds: float, deadline: float | None) -> None:
    if deadline is not None and time.monotonic() + seconds >= deadline:
        raise _DeadlineError
    time.sleep(seconds)


def _parsed(address: str, answer: httpx.Response, content: bytes) -> Any:
    status = answer.status_code
    if status in _RETRIED_STATUS:
        raise _PassingError(f"{address} answered {status}: {_message(content)}", _retry_after(answer))
    if status != 200:
        raise ServerRefusedError(address, status, _message(content))
    try:
        return json.loads(content)
    except ValueError as error:
        raise _PassingError(f"{address} sent {len(content)} bytes that are no JSON; its answer was cut off") from error


def _picture_in(answer: Any, address: str, request: Request) -> Image.Image:
    """Return the picture of an answer, decoded in full, so that one cut off shows here and not in the file."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not (isinstance(data, list) and len(data) == 1 and isinstance(data[0], dict) and data[0].get("b64_json")):
        raise _PassingError(f"{address} answered without data[0].b64_json")
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(data[0]["b64_json"], validate=True)))
        picture.load()
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError) as error:
        raise _PassingError(f"{address} sent a picture that cannot be decoded ({error})") from error
    if request.width is not None and picture.size != (request.width, request.height):
        found, wanted = f"{picture.width}x{picture.height}", f"{request.width}x{request.height}"
        raise ServerRefusedError(address, None, f"it made a picture of {found} px where {wanted} were asked for")
    return picture.convert("RGB")


def _retry_after(answer: httpx.Response) -> float | None:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):  # absent, or a date
        return None


def _message(content: bytes) -> str:
    """Return what a server says went wrong: OpenAI's error object, FastAPI's detail, or the text itself."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        error = found.get("error", found.get("detail", text))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:_MAX_MESSAGE] or "no reason given"
