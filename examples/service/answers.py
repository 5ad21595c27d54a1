"""What is answered: pictures, events, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, TypeVar

from PIL import Image
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ernie_accel.batch import Result

_T = TypeVar("_T")

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_KEEP_ALIVE_S = 15.0  # proxies end connections on which nothing comes


class ApiError(Exception):
    """The error that a client receives; its text is from this program alone, and names no file.

    Attributes:
        status: The HTTP status.
        param: The field that is to blame; None: none is.
        code: For programs.
        retry_after_s: When to try again; None: not at all, or whenever.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        super().__init__(status, message, param, code)

    def body(self) -> dict[str, object]:
        """Return the error as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the error as an answer."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after_s))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the request is not read
            headers["Connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


class Gone(Exception):
    """The client has closed the connection: nobody reads an answer."""


async def until_gone(receive: Receive, work: asyncio.Future[_T], timeout_s: float) -> _T:
    """Return what `work` does; it ends with this call, whether it is done, its time is over or the client has left.

    Raises:
        Gone: The client was faster.
        ApiError: The time is over.
        Exception: What `work` raises.
    """
    gone: asyncio.Future[None] = asyncio.ensure_future(_disconnected(receive))
    both: set[asyncio.Future[Any]] = {work, gone}
    try:
        await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return await work
        if gone.done():
            raise Gone
        raise ApiError(504, f"The picture was not made within {timeout_s:g} s.", None, "timeout")
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, for as long as the client reads and the time for a request lasts."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Mapping[str, object], None], timeout_s: float, close: Callable[[], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._timeout_s, self._close = events, timeout_s, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes; an error on the way is an event of its own."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await until_gone(receive, asyncio.create_task(self._send_all(send)), self._timeout_s)
        except ApiError as error:
            self._close()  # first: a client that reads nothing holds up what is sent to it
            await _write(send, _event("error", error.body()))
        finally:
            self._close()
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        coming = asyncio.ensure_future(anext(self._events, None))
        try:
            while True:
                if not (await asyncio.wait({coming}, timeout=_KEEP_ALIVE_S))[0]:
                    await _write(send, b": still at it\n\n")
                elif (event := coming.result()) is None:
                    return
                else:
                    await _write(send, _event(str(event["type"]), event))
                    coming = asyncio.ensure_future(anext(self._events, None))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def _write(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _event(name: str, data: Mapping[str, object]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def picture_fields(png: bytes, result: Result, output_format: str, quality: int | None) -> dict[str, object]:
    """Return what an answer says of one picture."""
    with Image.open(io.BytesIO(png)) as picture:
        width, height = picture.size
        if output_format != "png":
            file = io.BytesIO()
            picture.convert("RGB").save(file, output_format, quality=95 if quality is None else quality)
            png = file.getvalue()
    return {"b64_json": base64.b64encode(png).decode(), "seed": result.seed, "size": f"{width}x{height}"}


def now() -> int:
    """Return the Unix time as OpenAI's answers have it."""
    return int(time.time())
