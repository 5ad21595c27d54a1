"""Engines without a model: pictures that only depend on the request, and failures on demand."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from PIL import Image

from ernie_accel.batch import Row
from ernie_accel.batch.engines import Engine, Outcome, Request


def picture_of(request: Request) -> Image.Image:
    size = (request.width or 32, request.height or 32)
    return Image.frombytes("RGB", size, random.Random(request.seed).randbytes(3 * size[0] * size[1]))


class StubEngine(Engine):
    """Draws noise from each request's seed; `before` may raise, wait, or note the batch."""

    def __init__(
        self,
        before: Callable[[Sequence[Request], int], None] | None = None,
        *,
        max_batch: int = 4,
        seconds: float = 0.0,
    ) -> None:
        self.max_batch = max_batch
        self.batches: list[tuple[Request, ...]] = []
        self._before = before
        self._seconds = seconds

    def render(self, requests: Sequence[Request], timeout_s: float | None = None) -> list[Outcome]:
        self.batches.append(tuple(requests))
        if self._before is not None:
            self._before(requests, len(self.batches))
        time.sleep(self._seconds)
        return [picture_of(request) for request in requests]

    def identity(self) -> dict[str, str]:
        return {"pipeline": "StubEngine"}


def make_rows(count: int, **settings: object) -> list[Row]:
    return [Row(line=i + 2, index=i, prompt=f"cup {i}", file_name=f"{i:03d}.png", **settings) for i in range(count)]
