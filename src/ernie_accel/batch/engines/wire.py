"""Send one HTTP request within limits of time and bytes that hold whatever the server does."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from ernie_accel.batch.engines.address import Address
from ernie_accel.core.errors import MissingExtraError

_FRAMING = 256 * 1024  # bytes of headers and chunk sizes, beside twice the body
_PIECE = 4096  # bytes sent between two looks at the clock
_CODINGS = ("gzip", "deflate", "br", "zstd", "compress")
_KEEP_S = 4.0  # seconds a connection is kept for the next request: less than servers keep it (uvicorn: 5)


class WireError(Exception):
    """There is no answer, or none within the limits; the next attempt may have one."""


@dataclass(frozen=True)
class Answer:
    """A server's answer.

    Attributes:
        status: The HTTP status.
        headers: By their names in lower case.
        content: The body; of a status other than 200 at most its beginning.
    """

    status: int
    headers: Mapping[str, str]
    content: bytearray


class _Stream(Protocol):
    """A connection, by httpcore's interface ``NetworkStream``."""

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes: ...

    def write(self, buffer: bytes, timeout: float | None = None) -> None: ...

    def close(self) -> None: ...

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Stream: ...

    def get_extra_info(self, info: str) -> object: ...


class _Response(Protocol):
    """An answer as httpcore has it."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]

    def iter_stream(self) -> Iterator[bytes]: ...


class Wire:
    """Connections to servers, kept between requests; may be used from several threads.

    The timeouts of HTTP clients are for each read, so that a byte every second keeps a request alive forever, and so
    does an endless row of interim answers (1xx). Here every read and write of a request is given what is left of its
    time, and its bytes are counted from the first one. Redirects are not followed, compressed answers not unpacked.
    """

    def __init__(self, kept: int) -> None:
        """Connect to nothing yet.

        Args:
            kept: Idle connections to keep.

        Raises:
            MissingExtraError: httpcore is not installed.
        """
        try:
            import httpcore
        except ImportError as error:
            raise MissingExtraError("httpcore", "http") from error
        self._httpcore: ModuleType = httpcore
        self._budget = _Budget()
        # No proxy from the environment: one for the outside must not take the requests to servers in the same rack.
        self._pool = httpcore.ConnectionPool(
            max_connections=None,
            max_keepalive_connections=kept,
            keepalive_expiry=_KEEP_S,
            network_backend=_TimedBackend(httpcore, self._budget),
        )

    def send(
        self, to: Address, path: str, body: bytes | None, *, ends: float, limit: int, limit_refusal: int
    ) -> Answer:
        """Return what the server answers to a POST of JSON, or to a GET where there is no body.

        Args:
            to: The server.
            path: Below its base address.
            body: JSON.
            ends: The `time.monotonic()` by which the answer must be complete.
            limit: Bytes that a good answer's body may have.
            limit_refusal: Bytes of any other answer that are read; the rest is left.

        Raises:
            WireError: No connection, no time left, no HTTP, too large, or compressed.
        """
        errors = self._httpcore
        headers = {"Host": to.netloc, "Accept": "application/json", "Accept-Encoding": "identity"}
        headers |= {"User-Agent": "ernie-accel"} | ({} if body is None else {"Content-Type": "application/json"})
        headers |= to.headers
        url = errors.URL(
            scheme=to.scheme.encode(),
            host=to.host.encode(),
            port=to.port,
            target=f"{to.path}{path}{to.query}".encode(),
        )
        self._budget.ends, self._budget.bytes = ends, 2 * limit + _FRAMING
        method = "GET" if body is None else "POST"
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), max(0.001, ends - time.monotonic()))
        try:
            with self._pool.stream(
                method, url, headers=headers, content=body, extensions={"timeout": timeout}
            ) as stream:
                return self._read(stream, limit, limit_refusal)
        except (errors.TimeoutException, errors.NetworkError, errors.ProtocolError) as error:
            # from None: what the server sent may be in the cause, as it was sent
            raise WireError(f"{type(error).__name__}: {error}".removesuffix(": ")) from None

    def close(self) -> None:
        """Drop the connections; requests under way fail."""
        self._pool.close()

    def _read(self, stream: _Response, limit: int, limit_refusal: int) -> Answer:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in stream.headers}
        coding = headers.get("content-encoding", "identity").strip().lower()
        content = bytearray()
        if stream.status == 200 and coding not in ("", "identity"):
            shown = coding if coding in _CODINGS else "in an unknown way"
            raise WireError(f"its answer is compressed ({shown}), though it was asked not to be; switch that off")
        if stream.status == 200 and headers.get("content-length", "0").isdigit():
            # The length of the digits first: reading thousands of them as a number takes long.
            length = headers.get("content-length", "0").lstrip("0")
            if len(length) > 15 or int(length or "0") > limit:
                raise WireError(f"its answer has {length[:20]} bytes; expected {limit} at most")
        if stream.status != 200 and coding not in ("", "identity"):
            return Answer(stream.status, headers, content)
        for chunk in stream.iter_stream():
            content += chunk
            if stream.status != 200 and len(content) >= limit_refusal:
                del content[limit_refusal:]
                break
            if len(content) > limit:
                raise WireError(f"its answer goes on after {limit} bytes; expected that many at most")
        return Answer(stream.status, headers, content)


class _Budget(threading.local):
    """What is left to the request of this thread: a request is sent and read by the thread that makes it."""

    ends: float = 0.0
    bytes: int = 0

    def left_s(self) -> float:
        return self.ends - time.monotonic()


class _TimedBackend:
    """Makes httpcore's connections, by its interface `NetworkBackend`, of streams that keep to the budget."""

    def __init__(self, httpcore: ModuleType, budget: _Budget) -> None:
        self._httpcore, self._budget = httpcore, budget
        self._backend = httpcore.SyncBackend()

    def connect_tcp(self, host: str, port: int, **options: object) -> _TimedStream:
        left_s = self._budget.left_s()
        if left_s <= 0:
            raise self._httpcore.ConnectTimeout("out of time")
        stream = self._backend.connect_tcp(host, port, **(options | {"timeout": left_s}))
        return _TimedStream(stream, self._httpcore, self._budget)


class _TimedStream:
    """One connection, by httpcore's interface `NetworkStream`."""

    def __init__(self, stream: _Stream, httpcore: ModuleType, budget: _Budget) -> None:
        self._stream, self._httpcore, self._budget = stream, httpcore, budget

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left_s = self._budget.left_s()
        if left_s <= 0:
            raise self._httpcore.ReadTimeout("timed out: the answer was not complete in time")
        data = self._stream.read(max_bytes, left_s)
        self._budget.bytes -= len(data)
        if self._budget.bytes < 0:
            raise self._httpcore.RemoteProtocolError("more bytes than an answer can need")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        for start in range(0, len(view), _PIECE):
            left_s = self._budget.left_s()
            if left_s <= 0:
                raise self._httpcore.WriteTimeout("the request was not taken in time")
            self._stream.write(bytes(view[start : start + _PIECE]), left_s)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> _TimedStream:
        left_s = max(0.001, self._budget.left_s())
        secured = self._stream.start_tls(ssl_context, server_hostname, left_s)
        return _TimedStream(secured, self._httpcore, self._budget)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)
