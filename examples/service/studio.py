"""The `Producer` behind the service: rows go in from the event loop, pictures come out, and no file stays."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import math
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from ernie_accel.batch import (
    BatchInputError,
    BatchOutputError,
    Producer,
    Progress,
    QueueFullError,
    Result,
    Row,
    WaitedTooLongError,
)
from ernie_accel.batch.engines import Engine, LocalEngine
from ernie_accel.batch.engines.base import PictureFile
from ernie_accel.batch.input.pictures import PictureFolder
from ernie_accel.batch.watch.snapshot import Snapshot
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.editing.files import PictureError, read_picture, size_in
from examples.service.answers import ApiError
from examples.service.settings import Settings

_log = logging.getLogger(__name__)


def load_engine(settings: Settings) -> Engine:
    """Load the model that the settings name, optimized for this machine."""
    import ernie_accel

    pipe: Any
    preset: str | None
    if settings.model is None:
        pipe = ernie_accel.demo.load(prompt_enhancer=settings.enhancer)
        preset = (
            None if settings.preset == "auto" else settings.preset
        )  # auto compiles, which takes longer than drawing
        ernie_accel.optimize(pipe, ernie_accel.CallDefaults("turbo"), preset=preset, memory=settings.memory)
    else:
        preset, memory = settings.preset, settings.memory
        pipe = ernie_accel.load(settings.model, preset=preset, memory=memory, prompt_enhancer=settings.enhancer)
        print(ernie_accel.report(pipe))
    pipe.set_progress_bar_config(disable=True)
    return LocalEngine(pipe, max_batch=settings.batch_size)


class Studio:
    """Makes pictures for requests; used from one event loop."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._folder = tempfile.TemporaryDirectory(prefix="ernie-service-")
        self._uploads = Path(self._folder.name, "uploads")
        self._uploads.mkdir()
        self._producer = Producer(
            engine, Path(self._folder.name, "pictures"), batch_size=settings.batch_size, max_queue=settings.max_queue
        )

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return self._producer.waiting

    @property
    def lost(self) -> bool:
        """Whether nothing can be made any more: the engine hangs, or the disk is full."""
        return self._producer.closed

    def snapshot(self) -> Snapshot:
        """Return counts, speed and latencies of the pictures."""
        return self._producer.snapshot()

    def submit(
        self,
        rows: Sequence[Row],
        on_progress: Callable[[int, Progress], None] | None,
        files: contextlib.ExitStack | None = None,
    ) -> list[Future[Result]]:
        """Queue the rows of a request, all of them or none; `files`, which they are made from, stay until all are done.

        Raises:
            ApiError: The queue is full, or the engine cannot make them.
        """
        futures: list[Future[Result]] = []
        # Asked before the first is queued, which might be begun at once. Only this thread queues any.
        if (waiting := self.waiting) + len(rows) > self._settings.max_queue:
            self._refuse(QueueFullError(waiting, self._settings.max_queue))
        try:
            for index, row in enumerate(rows):
                watch = None if on_progress is None else (lambda progress, index=index: on_progress(index, progress))
                futures.append(self._producer.submit(row, wait_s=self._settings.timeout_s, on_progress=watch))
        except ErnieAccelError as error:
            self.give_up(futures)
            self._refuse(error)
        if files is not None:
            kept = files.pop_all()  # a batch may still read them when the client has gone
            for future in futures:
                future.add_done_callback(lambda _: kept.close() if all(each.done() for each in futures) else None)
        return futures

    async def picture(self, future: Future[Result]) -> tuple[Result, bytes]:
        """Wait for a picture, and return it as PNG; its file is gone then.

        Raises:
            ApiError: It could not be made.
        """
        try:
            result = await asyncio.wrap_future(future)
        except ErnieAccelError as error:
            self._refuse(error)
        if result.path is None:
            number = uuid.uuid4().hex[:12]
            _log.error("picture %s failed: %s", number, result.error)
            if "does not fit even alone" in (result.error or ""):
                raise ApiError(400, "It does not fit into the device's memory; choose a smaller size.", "size")
            raise ApiError(500, f"The picture could not be made; the service's log has it as {number}.")
        return result, await asyncio.to_thread(_taken, result.path)

    def give_up(self, futures: Sequence[Future[Result]]) -> None:
        """Let nothing be made that is not begun, and keep no file of the rest."""
        for future in futures:
            if not future.cancel():
                future.add_done_callback(_discard)

    @contextlib.contextmanager
    def uploaded(self, image: bytes, mask: bytes | None) -> Iterator[tuple[PictureFile, PictureFile | None]]:
        """Keep the pictures of a request in files for as long as the block takes.

        Raises:
            ApiError: One is no picture, or the mask is of another size.
        """
        paths: list[Path] = []

        def keep(data: bytes, param: str) -> PictureFile:
            paths.append(path := self._uploads / f"{uuid.uuid4().hex}.{param}")
            path.write_bytes(data)
            found = PictureFolder(self._uploads).find(path.name)
            if isinstance(found, str):
                raise ApiError(400, f"Invalid {param}.", param, "invalid_image_file")
            return found

        try:
            self._decoded(image, "image")  # whole, before anybody waits for it
            first = keep(image, "image")
            second = None if mask is None else keep(_drawn_where_transparent(self._decoded(mask, "mask")), "mask")
            if second is not None and (first.width, first.height) != (second.width, second.height):
                message = (
                    f"The mask has {second.width}x{second.height} pixels, and the image {first.width}x{first.height}."
                )
                raise ApiError(400, message, "mask", "invalid_image_file")
            yield first, second
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Make what was submitted, then stop, and remove every file."""
        self._producer.close()
        self._engine.close()
        self._folder.cleanup()

    def _decoded(self, data: bytes, param: str) -> Image.Image:
        """Return the picture in a request.

        Raises:
            ApiError: It is none, damaged or too large.
        """
        name, most = f"the {param}", self._settings.max_upload_pixels
        try:
            width, height = size_in(io.BytesIO(data), name)
            if width * height > most:
                raise PictureError(f"{name} has {width} x {height} pixels; at most {most:,} are read")
            return read_picture(io.BytesIO(data), name)
        except PictureError as error:
            raise ApiError(400, f"Invalid {param}: {error}.", param, "invalid_image_file") from None

    def _refuse(self, error: ErnieAccelError) -> NoReturn:
        if isinstance(error, QueueFullError):
            per_min = self.snapshot().pictures_per_min
            wait_s = min(60.0, max(1.0, math.ceil(60 * error.waiting / per_min))) if per_min else 1.0
            raise ApiError(
                429,
                f"{_pictures(error.waiting)} already, and {error.max_queue} may; try again later.",
                None,
                "queue_full",
                retry_after_s=wait_s,
            )
        if isinstance(error, WaitedTooLongError):
            raise ApiError(504, f"The picture was not begun within {error.wait_s:g} s.", None, "timeout")
        if isinstance(error, BatchInputError):
            raise ApiError(400, f"This model cannot make it: {'; '.join(text for _, text in error.problems)}.")
        if isinstance(error, BatchOutputError):
            _log.error("pictures cannot be written: %s", error)
        else:
            _log.error("the pipe is lost: %s", error)
        raise ApiError(503, "The service cannot make pictures any more; ask another.", None, "lost")


def _drawn_where_transparent(mask: Image.Image) -> bytes:
    """Return a mask as the library has it, white where it draws: OpenAI's are transparent there."""
    if "A" in mask.getbands() or "transparency" in mask.info:
        mask = mask.convert("RGBA").getchannel("A").point(lambda alpha: 255 - alpha)
    # One without transparency is white there already, as SGLang and diffusers have it.
    file = io.BytesIO()
    mask.convert("L").save(file, "PNG")
    return file.getvalue()


def _pictures(count: int) -> str:
    return "1 picture waits" if count == 1 else f"{count} pictures wait"


def _taken(path: Path) -> bytes:
    data = path.read_bytes()
    path.unlink()
    return data


def _discard(future: Future[Result]) -> None:
    if not future.cancelled() and future.exception() is None and (path := future.result().path) is not None:
        path.unlink(missing_ok=True)
