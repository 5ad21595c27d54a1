"""Turn rendered pictures into files in threads of their own, so that the engine does not wait for PNG."""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ernie_accel.batch.engines.base import ENHANCED_PROMPT, PictureFile, Request
from ernie_accel.batch.input.naming import OLDER_FOLDER, REJECTED_FOLDER, REROLL_FOLDER
from ernie_accel.batch.input.sift import Finding
from ernie_accel.batch.input.task import Task
from ernie_accel.batch.output.folder import OutputFolder

if TYPE_CHECKING:
    from ernie_accel.batch.output.sieve import Sieve


GRID_SCORE, GRID_SCORE_BEFORE = "grid_score", "grid_score_before"
"""Where a PNG holds its `fidelity.grid_score`, and the one before its second pass."""

REFINER = "refiner "
"""How the names of facts begin that are about what draws second passes: other pictures do not carry them."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of one rendered picture.

    Attributes:
        task: The row it was made for.
        batch_size: Pictures that were rendered with it.
        seconds: From the start of its batch to the finished file.
        rendered_s: From the start of its batch to the picture, where that was waited for.
        bytes: Of the file.
        finding: What looking at the picture found; None if that itself failed.
        gridded: The file of a picture that was rejected for a grid.
        enhanced: What its prompt was enhanced to, if the engine says so.
        error: Why there is no file: an `OSError` is the folder's fault, anything else the row's.
        unrendered: Why there is no picture: it was still being rendered when it was submitted, and that failed.
    """

    task: Task
    batch_size: int
    seconds: float
    rendered_s: float
    bytes: int | None = None
    finding: Finding | None = None
    gridded: PictureFile | None = None
    enhanced: str | None = None
    error: Exception | None = None
    unrendered: Exception | None = None


class Writer:
    """Encodes and writes pictures in threads, a bounded number of them ahead."""

    def __init__(
        self,
        folder: OutputFolder,
        facts: Mapping[str, str],
        *,
        threads: int = 2,
        ahead: int = 8,
        sieve: Sieve | None = None,
    ) -> None:
        """Start the threads.

        Args:
            folder: The output folder; sub-folders are created as they are needed.
            facts: Text chunks that every PNG carries beside those of its row: model, preset, version.
            threads: Encoder threads; zlib and file writes release Python's lock.
            ahead: Pictures that may wait for a thread; `submit` blocks beyond it, which bounds memory.
            sieve: Looks at every picture; one that it rejects is written into the folder of the rejected.
        """
        self._folder = folder
        self._facts = dict(facts)
        self._ahead = ahead
        self._sieve = sieve
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ernie-accel-writer")
        self._pending: list[Future[Written]] = []
        self._held: set[Task] = set()

    @property
    def pending(self) -> list[Future[Written]]:
        """The pictures that are being written, as futures to wait on."""
        return self._pending

    def holds(self, task: Task) -> bool:
        """Return whether a picture of a row was handed over and not collected yet: its file may appear any moment."""
        return task in self._held

    def submit(
        self, task: Task, picture: Image.Image | Callable[[], Image.Image], *, batch_size: int, start: float
    ) -> None:
        """Have a picture written.

        Args:
            task: The row it was made for.
            picture: The picture, or what waits for the device and returns it.
            batch_size: Pictures that were rendered with it.
            start: The `time.perf_counter()` at which its batch began.
        """
        # One list for counting and waiting: between two looks every picture may have been finished.
        while len(under_way := [future for future in self._pending if not future.done()]) >= self._ahead:
            concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
        self._held.add(task)  # before the thread has it: an interrupt may come in between
        self._pending.append(self._pool.submit(self._write, task, picture, batch_size, start))

    def collect(self) -> list[Written]:
        """Return what has been finished since the last call."""
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        written = [future.result() for future in done]
        self._held.difference_update(picture.task for picture in written)
        return written

    def set_aside(self, path: str) -> None:
        """Move what lies in the place of a row that failed out of it, where it would be mistaken for the row's picture.

        Args:
            path: The row's, relative to the output folder.

        Raises:
            OSError: It could not be moved.
        """
        if self._folder.status(path) is not None:
            self._folder.move(path, older_path(path))

    def close(self) -> None:
        """Finish what was begun and stop the threads."""
        self._pool.shutdown()

    def _write(
        self, task: Task, begun: Image.Image | Callable[[], Image.Image], batch_size: int, start: float
    ) -> Written:
        try:
            picture = begun() if callable(begun) else begun
        # Broad on purpose: whatever the device raises is for the line to judge, as if rendering itself had raised it.
        except Exception as failure:
            seconds = time.perf_counter() - start
            return Written(task=task, batch_size=batch_size, seconds=seconds, rendered_s=seconds, unrendered=failure)
        rendered_s = time.perf_counter() - start
        finding: Finding | None = None
        size: int | None = None
        gridded: PictureFile | None = None
        error: Exception | None = None
        try:
            finding = self._sieve.look(picture, task.row.path) if self._sieve else Finding()
            png = encode_png(picture, self._texts(task, picture) | _scores(task, finding))
        # Broad on purpose: whatever a picture does to the encoder is that row's failure and no other's.
        except Exception as failure:
            error = RuntimeError(f"{type(failure).__name__}: {failure}")
        else:
            try:
                self._place(task, png, rejected=finding.reason is not None)
                size = len(png)
                if finding.gridded:
                    path = rejected_path(task)
                    digest, place = hashlib.sha256(png).hexdigest(), str(self._folder.absolute(path))
                    gridded = PictureFile(path, place, digest, picture.width, picture.height)
            except OSError as failure:
                error = failure
        return Written(
            task=task,
            batch_size=batch_size,
            seconds=time.perf_counter() - start,
            rendered_s=rendered_s,
            bytes=size,
            finding=finding,
            gridded=gridded,
            enhanced=picture.info.get(ENHANCED_PROMPT),
            error=error,
        )

    def _texts(self, task: Task, picture: Image.Image) -> dict[str, str]:
        """Return what a picture says of itself; of what refines, only if it was refined."""
        again, request = task.second_pass, task.current()
        facts = {k: v for k, v in self._facts.items() if again is not None or not k.startswith(REFINER)}
        if again is None or again.enhanced is None:
            return texts_of(request, picture, facts)
        picture.info[ENHANCED_PROMPT] = again.enhanced
        return texts_of(replace(request, prompt=task.request.prompt), picture, facts)

    def _place(self, task: Task, png: bytes, *, rejected: bool) -> None:
        self._folder.write(rejected_path(task) if rejected else task.row.path, png)
        if rejected:
            # What an earlier run with other settings made would be mistaken for this row's picture.
            self._folder.remove(task.row.path)


def _scores(task: Task, finding: Finding) -> dict[str, str]:
    """Return what a PNG says of its grid, and of the one that it had before a second pass."""
    before = None if task.second_pass is None else task.second_pass.grid_score
    scores = {GRID_SCORE: finding.grid_score, GRID_SCORE_BEFORE: before}
    return {name: f"{score:.2f}" for name, score in scores.items() if score is not None}


def rejected_path(task: Task) -> str:
    """Return where a sifted-out picture goes, relative to the output folder; each row and reroll has its own place."""
    # Folders, not longer names: those could be another row's, or more than a file system takes.
    reroll = f"{REROLL_FOLDER.format(task.rerolls)}/" if task.rerolls else ""
    return f"{REJECTED_FOLDER}/{reroll}{task.row.path}"


def older_path(path: str) -> str:
    """Return where the picture at `path` goes, both relative to the output folder, when its row could not be made."""
    return f"{REJECTED_FOLDER}/{OLDER_FOLDER}/{path}"


def texts_of(request: Request, picture: Image.Image, facts: Mapping[str, str]) -> dict[str, str]:
    """Return what a PNG says of itself; nothing in it changes from run to run."""
    settings = {k: v for k, v in request.arguments().items() if k not in ("prompt", "negative_prompt")}
    if request.image is not None:
        files = {"image": request.image, "mask": request.mask}
        settings |= {f"{name}_sha256": file.digest for name, file in files.items() if file is not None}
        settings |= {} if request.strength is None else {"strength": request.strength}
    if request.lora is not None:
        scale = 1.0 if request.lora_scale is None else request.lora_scale
        settings |= {"lora_sha256": request.lora.digest, "lora_scale": scale}
    settings |= {"width": picture.width, "height": picture.height}
    texts = {"prompt": request.prompt, "seed": str(request.seed), "settings": json.dumps(settings, sort_keys=True)}
    if request.negative_prompt is not None:
        texts["negative_prompt"] = request.negative_prompt
    if isinstance(enhanced := picture.info.get(ENHANCED_PROMPT), str):
        texts[ENHANCED_PROMPT] = enhanced
    return texts | dict(facts)


def encode_png(picture: Image.Image, texts: Mapping[str, str]) -> bytes:
    """Return a PNG that carries `texts`."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)  # iTXt, not tEXt: UTF-8
    file = io.BytesIO()  # in memory, so that what breaks from here on is the folder's fault, not the row's
    picture.save(file, format="PNG", pnginfo=info)
    return file.getvalue()
