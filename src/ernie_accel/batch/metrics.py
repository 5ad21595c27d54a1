"""Serve a job's state over HTTP, for a Prometheus that scrapes instead of reading files."""

from __future__ import annotations

import errno
import os
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from types import TracebackType

from ernie_accel.batch.errors import MetricsServerError
from ernie_accel.batch.telemetry import Snapshot, prometheus_text

#: Of the text format; https://prometheus.io/docs/instrumenting/exposition_formats
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_CLIENT_S = 10.0  # seconds a client may be silent before its thread is given up


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
            MetricsServerError: The port is in use, or cannot be listened at.
        """
        if not 0 <= port <= 65535:
            raise MetricsServerError(host, port, "a port is within 0 to 65535; choose another")
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
        return b"" if state is None else prometheus_text(state()).encode()


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
    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs share a port

    def __init__(self, family: int, address: object, page: Callable[[], bytes]) -> None:
        self.address_family = family
        self.page = page
        super().__init__(address, _Answer)  # type: ignore[arg-type]  # as getaddrinfo returns it, IPv6 too


class _Answer(BaseHTTPRequestHandler):
    server: _Server
    timeout = _CLIENT_S
    server_version = "ernie-accel"

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/metrics":
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
