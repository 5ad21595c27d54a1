"""Define what the production line asks of whatever renders: one small interface, and the ways it can fail."""

from __future__ import annotations

import hashlib
import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from ernie_accel.batch.errors import Problem
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.editing.files import PictureError, read_picture

Outcome: TypeAlias = Image.Image | Exception
"""What became of one request of a batch: its picture, or why there is none."""

Begun: TypeAlias = Outcome | Callable[[], Image.Image]
"""The same while the device is at work: a call, from any thread, waits for it and returns the picture, or raises."""

PREPARE_BATCH = 16
"""Prompts in one call of the prompt enhancer or the text encoder, and under one timeout."""

ROUND = 4096
"""Rows prepared at once where the encoders leave the device: at 128 tokens some 3 GB of embeddings in host memory."""


OnStep: TypeAlias = Callable[[int, int | None], None]
"""Called from any thread as steps of a batch are done: with how many are, and of how many (None: not known)."""

ON_STEP: ContextVar[OnStep | None] = ContextVar("ernie_accel_on_step", default=None)
"""What an engine's `render` and `begin` call, if they can tell and it is not None: the same for a whole batch.

Of the calling thread, and no attribute of the engine, which others may be using at the same time.
"""


ENHANCED_PROMPT = "enhanced_prompt"
"""Where a picture's `info` holds the prompt it was made from, if an engine knows it and it is not the request's own."""


@dataclass(frozen=True)
class PictureFile:
    """A picture in a file that a row names, as it was when the row was checked.

    Attributes:
        name: As the row has it.
        path: Where it is.
        digest: SHA-256 of the file, hexadecimal.
        width: In pixels, turned as its camera says.
        height: In pixels.
    """

    name: str
    path: str
    digest: str
    width: int
    height: int

    def read(self) -> Image.Image:
        """Return the picture.

        Raises:
            PictureError: It is damaged, or not there any more, or is another one by now.
        """
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise PictureError(f"{self.name} cannot be read any more ({error.strerror or error})") from error
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise PictureError(f"{self.name} was changed after the table was checked; run again")
        return read_picture(io.BytesIO(data), self.name)


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA in a safetensors file that a row names, as it was when the row was checked.

    Attributes:
        name: As the row has it.
        path: Where it is.
        digest: SHA-256 of the file, hexadecimal.
    """

    name: str
    path: str
    digest: str

    def read(self) -> bytes:
        """Return what the file holds.

        Raises:
            ValueError: It is not there any more, or holds something else by now.
        """
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise ValueError(f"it cannot be read any more ({error.strerror or error})") from error
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise ValueError("it was changed after the table was checked; run again")
        return data


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture, as an engine is asked for it. What is None is left to the model's own defaults.

    Attributes:
        prompt: What to draw.
        seed: Of this picture's own random numbers, prompt enhancer included; 0 to 2**64 - 1.
        negative_prompt: What to keep away from.
        width: In pixels.
        height: In pixels.
        steps: Denoising steps.
        guidance_scale: Weight of the prompt against the negative prompt.
        image: What to begin at; None: noise alone.
        mask: What of it is drawn anew; None: all of it.
        strength: How far to go from it, 0 to 1.
        lora: The adapter to draw with; None: none.
        lora_scale: How strongly; None: 1.
        enhance: Whether the pipeline's prompt enhancer may write the prompt anew; False where one has.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    image: PictureFile | None = None
    mask: PictureFile | None = None
    strength: float | None = None
    lora: AdapterFile | None = None
    lora_scale: float | None = None
    enhance: bool = True

    def arguments(self) -> dict[str, object]:
        """Return what is given, prompt included, by the names that diffusers pipelines use."""
        named = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }
        return {name: value for name, value in named.items() if value is not None}

    def shape(self) -> Hashable:
        """Return what must be equal for two requests to go through a pipeline in one call."""
        drawn: tuple[object, ...] = (
            self.width,
            self.height,
            self.steps,
            self.guidance_scale,
            self.negative_prompt is None,
        )
        if self.lora is not None:
            drawn = (*drawn, self.lora.digest, self.lora_scale)
        if self.image is None:
            return drawn
        # Pictures go together if they have one size, before and after they are resized.
        return (*drawn, self.image.width, self.image.height, self.mask is None, self.strength)


class Engine(ABC):
    """Renders batches of requests; the production line decides which rows go together, and when.

    `render` and `begin` are called from at most `slots` threads at once, `prepare` and `close` from one.

    Attributes:
        slots: How many batches can be under way at once.
        max_batch: The largest batch worth trying; 1: no batches.
        ahead: How many rows `prepare` is handed at once, before they are rendered.
        in_rounds: Whether what was prepared is all rendered before more is, because preparing takes turns with it.
        prepares_aside: Whether `prepare` returns at once and `bucket` waits for what it began, so that the next rows
            are best handed to it before those at hand are rendered.
        edits: Whether it draws from pictures; rows that name one are refused otherwise.
        adapts: Whether it draws with LoRAs; rows that name one are refused otherwise.
        default_size: Width and height in pixels for rows that leave theirs open; None: what renders has its own.
    """

    slots: int = 1
    max_batch: int = 1
    ahead: int = 64
    in_rounds: bool = False
    prepares_aside: bool = False
    edits: bool = False
    adapts: bool = False
    default_size: tuple[int | None, int | None] = (None, None)

    @abstractmethod
    def render(self, requests: Sequence[Request], timeout_s: float | None = None) -> Sequence[Outcome]:
        """Return one outcome per request, in their order; the requests are alike in `bucket`.

        Args:
            requests: At least one.
            timeout_s: Seconds after which the batch is given up; None: wait forever.

        Raises:
            BatchTimeoutError: The batch was given up; the engine can go on.
            WorkerLostError: What rendered died; the engine can go on, with another.
            EngineLostError: The engine cannot render anything any more.
            Exception: Anything else that failed the batch as a whole, such as too little memory.
        """

    def begin(self, requests: Sequence[Request], timeout_s: float | None = None) -> Sequence[Begun]:
        """Begin to render, and return as soon as the next batch can be begun; otherwise as `render`.

        An engine that hands its device work ahead overrides this: the device then goes from one batch to the next
        without waiting for the host to fetch pictures and to draw noise. The production line renders batches with a
        timeout, and only begins the others: nobody could end what is at work after the call.
        """
        return self.render(requests, timeout_s)

    def prepare(self, requests: Sequence[Request], timeout_s: float | None = None) -> None:
        """Do ahead, for many requests at once, what rendering them will need.

        Whatever it raises, the requests are rendered all the same, and what is wrong with one shows there; but for
        `EngineLostError`, after which nothing is.

        Args:
            requests: At least one; not alike.
            timeout_s: Seconds for a batch of them; None: wait forever.
        """
        return

    def bucket(self, request: Request) -> Hashable:
        """Return a key; only requests with the same key go together. Called after `prepare`."""
        return request.shape()

    def problems(self, requests: Sequence[tuple[int, Request]]) -> list[Problem]:
        """Return why the requests, each with its input line, cannot be rendered, without rendering any.

        Called from any thread, while others render.
        """
        return []

    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Return the facts about this engine that change pictures; a job is not resumed with others."""

    def close(self) -> None:
        """Give back what the engine itself holds: processes, connections, threads."""
        return


def finished(begun: Sequence[Begun]) -> list[Outcome]:
    """Wait for the device, and return what became of each request."""
    return [_finished(one) if callable(one) else one for one in begun]


def _finished(one: Callable[[], Image.Image]) -> Outcome:
    try:
        return one()
    # Broad on purpose: whatever the device raises is that picture's outcome.
    except Exception as error:
        return error


def in_batches(requests: Sequence[Request], size: int = PREPARE_BATCH) -> Iterator[Sequence[Request]]:
    """Yield the requests as they are best prepared: few at a time, and prompts alike in length together."""
    ordered = sorted(requests, key=lambda request: len(request.prompt))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


class BatchTimeoutError(ErnieAccelError):
    """A batch took longer than allowed and was given up.

    Attributes:
        timeout_s: The seconds it had.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        super().__init__(timeout_s)

    def __str__(self) -> str:
        """Return what was exceeded."""
        return f"not finished after {self.timeout_s:g} s (--timeout) and given up"


class Expired(Exception):
    """Raised between two steps of a pipe or its encoders, to end a call that is out of time."""


def stop_if(expired: threading.Event | None) -> None:
    """Raise `Expired` if the time is up."""
    if expired is not None and expired.is_set():
        raise Expired


class WorkerLostError(ErnieAccelError):
    """What rendered a batch died (a crash, a kill, a lost machine); the engine goes on with another."""


class EngineLostError(ErnieAccelError):
    """The engine cannot render anything any more; rows that are not finished stay pending."""


class NotFiniteError(ErnieAccelError, ValueError):
    """A picture has NaN or infinite values: the model's arithmetic overflowed."""

    def __init__(self, count: int, total: int) -> None:
        self.count, self.total = count, total
        super().__init__(count, total)

    def __str__(self) -> str:
        """Return how much of the picture is broken."""
        return f"{self.count} of the picture's {self.total} values are NaN or infinite; try bfloat16 instead of float16"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device, whatever class it has."""
    # CUDA raises torch.OutOfMemoryError, the CPU allocator a RuntimeError, Ascend a RuntimeError of its own.
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
