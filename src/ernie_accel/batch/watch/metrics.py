"""Serve a job's state over HTTP, for a Prometheus that scrapes instead of reading files.

The server is our own, and not that of prometheus-client: that one has a thread for each connection, however many there
are, and reads requests of any length.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, BinaryIO

from ernie_accel.batch.errors import MetricsServerError
from ernie_accel.batch.watch.exposition import exposition, require_client
from ernie_accel.batch.watch.snapshot import Snapshot

#: Of the text format; https://prometheus.io/docs/instrumenting/exposition_formats
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_log = logging.getLogger(__name__)

_CLIENT_S = 10.0  # seconds that a client has for its request and the answer
_CONNECTIONS = 8  # at once, each with a thread
_EVICTION_S = 1.0  # seconds that a new one waits for an older one to end
_REQUEST_BYTES = 16_384


class MetricsServer:
    """Answers ``GET /metrics`` from a thread of its own; use it as a context manager, or call `close`.

        with MetricsServer(9400) as metrics:
            for result in produce(pipe, rows, "out", metrics=metrics):
                ...

    It listens from the start, so that a port in use is reported before a model is loaded. Until a job is shown the page
    has no metrics; after its end, those of its last moment.
    """

    def __init__(self, port: int, *, host: str = "127.0.0.1") -> None:
        """Listen and start the thread.

        Args:
            port: 0 to 65535; 0: any that is free, see `url`.
            host: Address to listen at. The default cannot be reached from other machines; "0.0.0.0" can, by anybody.

        Raises:
            MissingExtraError: prometheus-client is not installed.
            MetricsServerError: The port is in use, or cannot be listened at.
        """
        if not 0 <= port <= 65535:
            raise MetricsServerError(host, port, "a port is within 0 to 65535; choose another")
        require_client()
        self._state: Callable[[], Snapshot] | None = None
        try:
            (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self._server = _Server(family, address, self._page)
        except OSError as error:
            raise MetricsServerError(host, port, _reason(error)) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="ernie-accel-metrics", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self._server.server_address[:2]
        return page_url(str(host), port)

    def show(self, state: Callable[[], Snapshot]) -> None:
        """Show the state of a job from now on; `state` is called from other threads, at each scrape."""
        self._state = state

    def close(self) -> None:
        """Stop listening; the port is free afterwards."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _page(self) -> bytes:
        state = self._state
        return b"" if state is None else exposition(state())


def page_url(host: str, port: int) -> str:
    """Return where the page of a server at `host` is."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; end what listens there, or choose another (0: any that is free)"
    if error.errno == errno.EACCES:
        return "not allowed; choose a port above 1023"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"no address of this machine ({error.strerror}); use 127.0.0.1, or 0.0.0.0 for all"
    return f"{error.strerror or error}; choose another address"


# Not http.server's own class: it looks its name up in the DNS, which can take seconds, and knows IPv4 only.
class _Server(socketserver.ThreadingTCPServer):
    """Answers a few connections at once; a newer one goes before one that has been silent for longest."""

    daemon_threads = True
    request_queue_size = 128  # in the system, without a thread: a burst would make others wait for a second
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs share a port

    def __init__(self, family: int, address: object, page: Callable[[], bytes]) -> None:
        self.address_family = family
        self.page = page
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # and when each was accepted, the oldest first
        super().__init__(address, _Answer)  # type: ignore[arg-type]  # as getaddrinfo returns it, IPv6 too

    def process_request(self, request: Any, client_address: object) -> None:
        """Answer in a thread of its own. Where all are taken, end the connection that has been silent for longest."""
        if not self._free.acquire(blocking=False):
            self._end(most=1)
            if not self._free.acquire(timeout=_EVICTION_S):
                self.shutdown_request(request)
                return
        with self._lock:
            self._open[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._closed(request)
            raise

    def process_request_thread(self, request: Any, client_address: object) -> None:
        """Answer; the place is free afterwards."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._closed(request)

    def service_actions(self) -> None:
        """Several times a second: end connections that have had their time, however busily they trickle."""
        self._end(older_than=time.monotonic() - _CLIENT_S)

    def handle_error(self, request: object, client_address: object) -> None:
        """Write to the log alone: a client that goes away in the middle is nobody's error, and the bar stays whole."""
        _log.debug("a client at %s was not answered", client_address, exc_info=True)

    def _closed(self, request: socket.socket) -> None:
        with self._lock:
            known = self._open.pop(request, None)
        if known is not None:
            self._free.release()

    def _end(self, *, most: int | None = None, older_than: float = math.inf) -> None:
        """End the oldest connections; their threads see the end of the request, and give their places back."""
        with self._lock:
            old = [request for request, since in self._open.items() if since < older_than]
            for request in old[:most]:
                with suppress(OSError):  # the client was faster
                    request.shutdown(socket.SHUT_RDWR)


class _Answer(BaseHTTPRequestHandler):
    server: _Server
    timeout = _CLIENT_S
    server_version = "ernie-accel"

    def setup(self) -> None:
        """Read no more of a request than a scrape can have."""
        super().setup()
        self.rfile: Any = _Bounded(self.rfile, _REQUEST_BYTES)

    def do_GET(self) -> None:
        if self.rfile.left <= 0:
            self._send(431, b"the request is too large\n", "text/plain; charset=utf-8")
        elif self.path.partition("?")[0] == "/metrics":
            self._send(200, self.server.page(), CONTENT_TYPE)
        else:
            self._send(404, b"the metrics are at /metrics\n", "text/plain; charset=utf-8")

    do_HEAD = do_GET  # for health checks; the body is left out below

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: a line for each scrape would tear the progress bar."""

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Bounded:
    """Lines of a stream, until so many bytes have been read; after that it seems to have ended."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self._stream, self.left = stream, most

    def readline(self, size: int) -> bytes:
        line: bytes = self._stream.readline(min(size, self.left)) if self.left > 0 else b""
        self.left -= len(line)
        return line

    @property
    def closed(self) -> bool:
        return bool(self._stream.closed)

    def close(self) -> None:
        self._stream.close()
