"""A connection that no client can hold for nothing: uvicorn has no time limit for a request's head, or for reading."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def connection(patience_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, ended where a client sends no whole head, or reads nothing, for `patience_s`."""

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._timers: dict[str, asyncio.TimerHandle] = {}

        def _expect(self, what: str) -> None:
            if what not in self._timers:
                self._timers[what] = self.loop.call_later(patience_s, self.transport.abort)

        def _came(self, what: str) -> None:
            if what in self._timers:
                self._timers.pop(what).cancel()

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._expect("head")

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            if before is None or before.response_complete:
                self._expect("head")
            super().data_received(data)
            if self.cycle is not before:
                self._came("head")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._expect("reading")

        def resume_writing(self) -> None:
            super().resume_writing()
            self._came("reading")

        def connection_lost(self, exc: Exception | None) -> None:
            self._came("head")
            self._came("reading")
            super().connection_lost(exc)

    return Connection
