"""Run the service: ``python -m examples.service``. SIGTERM and Ctrl-C finish what is under way, and exit with 0."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

from ernie_accel.core.errors import ErnieAccelError, MissingExtraError

try:
    import prometheus_client  # noqa: F401  # of the same extra, and imported by the app
    import python_multipart  # noqa: F401
    import uvicorn
    from fastapi import FastAPI
except ModuleNotFoundError as error:
    sys.exit(f"error: {MissingExtraError(error.name or 'fastapi', 'service')}")

from examples.service.app import Service, create_app
from examples.service.connection import connection
from examples.service.settings import Settings
from examples.service.studio import load_engine


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse what comes from now on, also on connections that are open; a second Ctrl-C waits for nothing."""
        self._service.stopping = True
        super().handle_exit(sig, frame)


def main() -> int:
    """Serve what the environment says until a signal comes, and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings.of(os.environ)
        engine = load_engine(
            settings
        )  # here and not in the app: what is wrong is one line, and a signal ends it at once
    except ErnieAccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return serve(create_app(settings, lambda _: engine), settings)


def serve(app: FastAPI, settings: Settings) -> int:
    """Serve until a signal comes, and return the exit status."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        limit_concurrency=settings.connections,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(settings.drain_s),
        server_header=False,
        log_config=None,
        access_log=False,
        http=connection(settings.body_s),
        h11_max_incomplete_event_size=32_768,
    )
    # uvicorn sends the signal again once it has stopped; it has been obeyed then.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    server = _Server(config, app.state.service)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
