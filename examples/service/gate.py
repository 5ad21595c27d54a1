"""What every request passes first: who asks, how much, and for how long; and what no answer may leak."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from examples.service.answers import ApiError, Gone
from examples.service.settings import Settings

_log = logging.getLogger(__name__)

ROUTES = ("/v1/images/generations", "/v1/images/edits", "/v1/models", "/health", "/metrics")


#: How many times the limit of a body is read before the connection is closed.
_READ = 4


class Metrics:
    """What a Prometheus reads of the service itself, beside what the producer says of pictures."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter(
            "service_requests", "Answered requests; 499: the client left.", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "service_request_seconds", "From the first byte to the last.", labels[:1], registry=self.registry
        )
        self.under_way = Gauge("service_requests_under_way", "Requests being answered.", registry=self.registry)
        Gauge("service_pictures_waiting", "Pictures that wait.", registry=self.registry).set_function(waiting)


class Gate:
    """ASGI middleware around the app."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, stopping: Callable[[], bool]) -> None:
        self._app, self._settings, self._metrics, self._stopping = app, settings, metrics, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens; other scopes pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"
        status = 499
        begun = time.perf_counter()

        async def note_and_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.under_way.inc()
        try:
            await self._answer(scope, receive, note_and_send, lambda: status != 499)
        finally:
            self._metrics.under_way.dec()
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begun)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, started: Callable[[], bool]) -> None:
        try:
            self._check(scope)
            await self._app(scope, _whole(await self._body(scope, receive), receive), send)
        except Gone:
            return
        except ApiError as error:
            if not started():
                await error.response()(scope, receive, send)
        # Broad on purpose: a traceback, and the paths in it, are for the log alone.
        except Exception:
            number = uuid.uuid4().hex[:12]
            _log.exception("request %s failed", number)
            if not started():
                await ApiError(500, f"Internal error; the service's log has it as {number}.").response()(
                    scope, receive, send
                )

    def _check(self, scope: Scope) -> None:
        if not scope["path"].startswith("/v1/"):
            return
        if self._stopping():
            raise ApiError(503, "The service is stopping; ask another.", None, "stopping", retry_after_s=5)
        key = self._settings.api_key
        if key is not None:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            is_right = secrets.compare_digest(given.strip(), key.get_secret_value().encode())
            if scheme.lower() != b"bearer" or not is_right:
                raise ApiError(401, "The API key is missing or wrong.", None, "invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the request's body: all of it, within its limits."""
        headers = dict(scope["headers"])
        form = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
        most = self._settings.max_upload_bytes if form else self._settings.max_json_bytes
        too_large = ApiError(
            413, f"The request is too large; this service takes {most:,} bytes.", None, "request_too_large"
        )
        # A client that is cut off while it sends may never see the answer, so a little too much is read and dropped.
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 15 or int(declared) > _READ * most:
            raise too_large

        async def read() -> bytes:
            body, size = bytearray(), 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                part = message.get("body", b"")
                size += len(part)
                if size <= most:
                    body += part
                is_whole = not message.get("more_body", False)
                if size > _READ * most or (is_whole and size > most):
                    raise too_large
                if is_whole:
                    return bytes(body)

        try:
            return await asyncio.wait_for(read(), self._settings.body_s)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"The request was not sent within {self._settings.body_s:g} s.", None, "timeout"
            ) from None


def _whole(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that hands out a body that has been read, and then whatever else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
