"""Render with a pipeline in this process: in batches where the pipe can, every row with random numbers of its own."""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar, cast

from PIL import Image

from ernie_accel.batch.engines.adapters import AdapterError, Adapters, adapter_problem
from ernie_accel.batch.engines.base import (
    ENHANCED_PROMPT,
    ON_STEP,
    ROUND,
    BatchTimeoutError,
    Begun,
    Engine,
    EngineLostError,
    Expired,
    NotFiniteError,
    OnStep,
    Outcome,
    Request,
    finished,
    in_batches,
    stop_if,
)
from ernie_accel.batch.errors import Problem
from ernie_accel.editing.files import PictureError
from ernie_accel.embedded import SIZE_PX, is_embedded

if TYPE_CHECKING:
    from torch import Tensor

    from ernie_accel.batch.engines.prompts import Packed, PromptStage
    from ernie_accel.core.components import CallablePipeline, Loadable, Tokenizer
    from ernie_accel.core.outputs import HasImages

_T = TypeVar("_T")

_LOOK_S = 0.5  # seconds of waiting for a turn after which it is looked whether the pipe hangs

if TYPE_CHECKING:
    Pipe: TypeAlias = Callable[..., object] | Loadable
else:
    Pipe = Callable[..., object]  # as annotations are read at run time, without torch
"""A diffusers pipeline: called with a prompt and keyword settings, it returns an object with `.images`."""

MAX_BATCH = 32
"""The largest batch that is tried with a diffusers pipeline; beyond it no measured device gained."""


@dataclass(frozen=True)
class CallSignature:
    """What a pipe's call takes; engines whose pipe is elsewhere keep one, to be asked from any thread.

    Attributes:
        name: The pipe's class.
        parameters: The names of the call's arguments.
        takes_any: Whether it takes any keyword.
        edit_problem: Why it cannot draw from pictures; None if it can.
        lora_problem: Why it cannot draw with LoRAs; None if it can.
    """

    name: str
    parameters: tuple[str, ...]
    takes_any: bool
    edit_problem: str | None = None
    lora_problem: str | None = None

    @classmethod
    def of(cls, pipe: Pipe) -> CallSignature:
        """Return the signature of a pipe."""
        parameters = inspect.signature(cast("Callable[..., object]", pipe)).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        name = type(pipe).__name__
        problem: str | None = f"{name} is no diffusers pipeline"
        lora_problem = problem
        if isinstance(getattr(pipe, "components", None), Mapping):
            from ernie_accel.editing.edit import refusal  # here, because it loads torch

            problem, lora_problem = refusal(cast("Loadable", pipe)), adapter_problem(cast("CallablePipeline", pipe))
        return cls(name, tuple(parameters), takes_any, problem, lora_problem)

    def problems(self, requests: Sequence[tuple[int, Request]]) -> list[Problem]:
        """Return what the requests, each with its input line, ask for that the call has no argument for."""
        unable: list[Problem] = []
        for line, request in requests:
            if self.edit_problem is not None and request.image is not None:
                unable.append((line, f"names a picture to begin at, and {self.edit_problem}"))
            if self.lora_problem is not None and request.lora is not None:
                unable.append((line, f"names a LoRA, and {self.lora_problem}"))
        if unable:
            return unable
        if self.takes_any:
            return []
        takes = f"it takes: {', '.join(self.parameters)}"
        problems: list[Problem] = [
            (None, f"{self.name} takes no {argument}, without which no row can be made; {takes}")
            for argument in ("prompt", "generator")
            if argument not in self.parameters
        ]
        for line, request in requests:
            for argument in request.arguments():
                if argument not in self.parameters and argument != "prompt":
                    problems.append((line, f"asks for {argument}, which {self.name} does not take; {takes}"))
        return problems


class LocalEngine(Engine):
    """A diffusers pipeline, or any callable like one.

    A diffusers pipeline gets batches; anything else one row at a time unless `max_batch` says that it takes lists.
    Each row has a generator of its own on the CPU, so that its noise depends neither on its neighbours nor on the
    device. For ERNIE-Image, prompts are enhanced and encoded ahead, in batches (see `PromptStage`). Engines with
    the same pipe take turns, a call each: a pipe's scheduler holds the state of one.
    """

    edits = adapts = True

    def __init__(
        self, pipe: Pipe, *, max_batch: int | None = None, free_encoders: bool = False, grace_s: float = 10.0
    ) -> None:
        """Wrap a pipe; nothing is changed in it.

        Args:
            pipe: The pipeline, on its device.
            max_batch: The largest batch to try; None: 32 for a diffusers pipeline, else 1.
            free_encoders: Take text encoder and prompt enhancer off the device once the prompts handed to `prepare`
                are encoded, until the next ones come, or `close`.
            grace_s: Seconds that a batch which is out of time has to reach the end of its step.
        """
        self._pipe = cast("Callable[..., object]", pipe)
        self._grace_s = grace_s
        self.signature = CallSignature.of(pipe)
        self._turn = _Turn.of(pipe)
        self._adapters = Adapters(cast("CallablePipeline", pipe))
        is_pipeline = isinstance(getattr(pipe, "components", None), Mapping)
        if is_pipeline:
            from ernie_accel.core.outputs import require_pictures

            require_pictures(type(pipe))
        self.max_batch = (MAX_BATCH if is_pipeline else 1) if max_batch is None else max_batch
        if is_embedded(pipe):
            self.default_size = SIZE_PX
        self._as_tensors = is_pipeline and "output_type" in self.signature.parameters
        self._prompts = _prompt_stage(pipe, free_encoders) if is_pipeline else None
        if free_encoders:
            self.ahead, self.in_rounds = ROUND, True

    def render(self, requests: Sequence[Request], timeout_s: float | None = None) -> Sequence[Outcome]:
        """Call the pipe once for all requests; see `Engine.render`."""
        what, on_step = "a batch was not finished", ON_STEP.get()
        return self._within(timeout_s, what, lambda expired: finished(self._begin(requests, expired, on_step)))

    def begin(self, requests: Sequence[Request], timeout_s: float | None = None) -> Sequence[Begun]:
        """Call the pipe and leave CUDA at work; under a timeout wait for it, or nothing would notice that it hangs."""
        if timeout_s is not None:
            return self.render(requests, timeout_s)
        on_step = ON_STEP.get()
        return self._within(None, "a batch was not begun", lambda expired: self._begin(requests, expired, on_step))

    def prepare(self, requests: Sequence[Request], timeout_s: float | None = None) -> None:
        """Enhance and encode the prompts, in batches, each within the timeout; see `Engine.prepare`."""
        for some in in_batches(requests):
            self.encode(some, timeout_s)
        self.free()

    def encode(self, requests: Sequence[Request], timeout_s: float | None = None) -> list[Hashable]:
        """Enhance and encode a batch of prompts, and return the buckets of their requests."""
        if self._prompts is not None:
            work = functools.partial(self._prompts.prepare, requests)
            self._within(timeout_s, "prompts were not encoded", work)
        return [self.bucket(request) for request in requests]

    def pack(self, request: Request) -> Packed | None:
        """Return what `encode` made for a request, for `unpack` in another process; None if it makes nothing."""
        return None if self._prompts is None else self._prompts.pack(request)

    def unpack(self, packed: Packed | None) -> None:
        """Take in what another engine with the same pipe has packed."""
        if self._prompts is not None and packed is not None:
            self._prompts.unpack(packed)

    def free(self) -> None:
        """Take the encoders off the device, if that was asked for; the next `encode` puts them back."""
        if self._prompts is not None:
            with self._turn:
                self._prompts.free()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that says how long a prompt is; None where prompts are not encoded ahead."""
        return None if self._prompts is None else self._prompts.tokenizer

    def bucket(self, request: Request) -> Hashable:
        """Return the request's shape and, where prompts are encoded ahead, the class of its length."""
        length = self._prompts.length_class(request) if self._prompts is not None else 0
        return (request.shape(), length)

    def problems(self, requests: Sequence[tuple[int, Request]]) -> list[Problem]:
        """Return what the pipe's ``__call__`` has no argument for, and which prompts are too long for the enhancer."""
        too_long = [] if self._prompts is None else self._prompts.problems(requests)
        return self.signature.problems(requests) + too_long

    def identity(self) -> Mapping[str, str]:
        """Return the pipeline's class."""
        return {"pipeline": type(self._pipe).__name__}

    def close(self) -> None:
        """Put text encoder and prompt enhancer back where they were, and remove the rows' LoRAs."""
        with nullcontext() if self._turn.lost else self._turn:  # after a hang nobody else can use the pipe, either
            self._adapters.close()
            if self._prompts is not None:
                self._prompts.close()

    def _within(self, timeout_s: float | None, what: str, work: Callable[[threading.Event | None], _T]) -> _T:
        """Do something with the pipe; `work` is given an event that says when its time is up."""
        if timeout_s is None:
            with self._turn:
                return work(None)
        self._turn.take()  # before the clock starts: another engine's batch is not this one's fault
        expired = threading.Event()
        future: Future[_T] = Future()
        # A daemon, so that a step which never ends does not keep the program from ending.
        arguments = (future, work, expired, self._turn)
        thread = threading.Thread(target=_fulfil, args=arguments, daemon=True)
        try:
            thread.start()  # it waits until the thread runs, and Ctrl-C may come then
            return future.result(timeout_s)
        except FutureTimeoutError:
            if future.done():  # the pipe itself raised a TimeoutError
                raise
        except KeyboardInterrupt:  # the pipe is still at it
            self._await_end(future, expired)
            raise
        expired.set()  # a slow pipe stops at the end of its step; one that hangs does not
        try:
            return future.result(self._grace_s)
        except Expired:
            raise BatchTimeoutError(timeout_s) from None
        except FutureTimeoutError:
            if future.done():
                raise
            self._turn.lost = True
            raise EngineLostError(
                f"{what} after {timeout_s:g} s: the pipe hangs inside a step, which nothing can end within a process; "
                "the other rows stay pending. Run again, or use ProcessEngine, which replaces its process"
            ) from None

    def _await_end(self, future: Future[_T], expired: threading.Event) -> None:
        """Have a call end at its next step, so that nobody else calls the pipe meanwhile."""
        expired.set()
        self._turn.lost = True  # until it has ended; another Ctrl-C may come first
        concurrent.futures.wait([future], self._grace_s)
        self._turn.lost = not future.done()

    def _begin(
        self, requests: Sequence[Request], expired: threading.Event | None, on_step: OnStep | None
    ) -> Sequence[Begun]:
        import torch  # here, so that checking a table does not wait for it

        from ernie_accel.batch.engines.noise import latents_for
        from ernie_accel.core.outputs import images_of
        from ernie_accel.core.step_ends import has_steps, watching_steps

        arguments = self._arguments(requests, expired)
        watched: AbstractContextManager[None] = nullcontext()
        if expired is not None or on_step is not None:
            if "callback_on_step_end" not in self.signature.parameters and has_steps(self._pipe):
                watched = watching_steps(self._pipe, _at_each_step(self._pipe, expired, on_step))
            elif self._takes("callback_on_step_end"):
                arguments["callback_on_step_end"] = _after_each_step(expired, on_step)
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        generator = generators[0] if len(requests) == 1 else generators
        try:
            self._adapters.use(requests[0].lora, requests[0].lora_scale)
        except AdapterError as error:
            return [error for _ in requests]
        if requests[0].image is not None:
            with watched:
                return self._noted(requests, self._edit(requests, arguments | {"generator": generator}))
        if (latents := latents_for(cast("CallablePipeline", self._pipe), requests)) is not None:
            arguments["latents"] = latents
        with watched:
            output = self._pipe(**arguments, generator=generator)
        images = images_of(output) if self._as_tensors else cast("HasImages", output).images
        return self._noted(requests, _pictures(images, len(requests)))

    def _noted(self, requests: Sequence[Request], begun: Sequence[Begun]) -> Sequence[Begun]:
        """Return the pictures, each with what its prompt was enhanced to in its `info`."""
        if self._prompts is None:
            return begun
        texts = [self._prompts.enhanced(request) for request in requests]
        return [one if text is None else _with_text(one, text) for one, text in zip(begun, texts, strict=True)]

    def _edit(self, requests: Sequence[Request], arguments: dict[str, object]) -> Sequence[Begun]:
        """Draw from pictures; one that cannot be read fails its own row, and the others are drawn."""
        from ernie_accel.core.outputs import images_of
        from ernie_accel.editing.edit import image_to_image, inpaint

        images, masks = [], []
        for request in requests:
            try:
                images += [] if request.image is None else [request.image.read()]
                masks += [] if request.mask is None else [request.mask.read()]
            except PictureError as error:
                if len(requests) == 1:
                    return [error]
                raise  # each is tried alone then
        if requests[0].strength is not None:
            arguments["strength"] = requests[0].strength
        pipe = cast("Loadable", self._pipe)
        prompt: Any = arguments.pop("prompt", None)
        if requests[0].mask is None:
            output = image_to_image(pipe, images, prompt, **cast("dict[str, Any]", arguments))
        else:
            output = inpaint(pipe, images, masks, prompt, **cast("dict[str, Any]", arguments))
        return _pictures(images_of(output), len(requests))

    def _takes(self, argument: str) -> bool:
        return self.signature.takes_any or argument in self.signature.parameters

    def _arguments(self, requests: Sequence[Request], expired: threading.Event | None) -> dict[str, object]:
        """Return the call's arguments; the requests are alike in all but prompt, negative prompt and seed."""
        arguments = requests[0].arguments()
        if self._as_tensors:
            arguments["output_type"] = "pt"
        if self._prompts is not None:
            del arguments["prompt"]
            arguments.pop("negative_prompt", None)
            return arguments | self._prompts.arguments(requests, expired)
        if len(requests) > 1:
            arguments["prompt"] = [request.prompt for request in requests]
            if requests[0].negative_prompt is not None:
                arguments["negative_prompt"] = [request.negative_prompt for request in requests]
        return arguments


def _prompt_stage(pipe: Pipe, free: bool) -> PromptStage | None:
    from ernie_accel.batch.engines.prompts import PromptStage  # here, because it loads torch

    return PromptStage.of(cast("CallablePipeline", pipe), free=free)


class _Turn:
    """Whose turn it is to call a pipe: one thread's at a time, whichever engines it is in.

    Attributes:
        lost: Whether a call hangs: then it is nobody's turn any more.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[object, _Turn]] = weakref.WeakKeyDictionary()
    _finding: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self.lost = False
        self._lock = threading.Lock()  # no RLock: it is released by the thread that made the call, see `_fulfil`

    @classmethod
    def of(cls, pipe: Pipe) -> _Turn:
        """Return the turn of a pipe, the same for every engine with it."""
        with cls._finding:
            try:
                return cls._of.setdefault(pipe, cls())
            except TypeError:  # neither hashable nor weakly referable: a callable of its own kind
                return cls()

    def take(self) -> None:
        """Wait for the turn.

        Raises:
            EngineLostError: The pipe hangs.
        """
        while not self.lost:
            if self._lock.acquire(timeout=_LOOK_S):
                return
        raise EngineLostError("the pipe is still inside a step that hung")

    def give_back(self) -> None:
        """End the turn, from any thread."""
        self._lock.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give_back()


def _fulfil(future: Future[_T], work: Callable[[threading.Event], _T], expired: threading.Event, turn: _Turn) -> None:
    try:
        result = work(expired)
    except BaseException as error:  # all of them: this thread has nobody else to tell
        turn.give_back()
        future.set_exception(error)
    else:
        turn.give_back()
        future.set_result(result)


def _at_each_step(
    pipe: object, expired: threading.Event | None, on_step: OnStep | None
) -> Callable[[int, object], None]:
    """Return what is done when a step of a call ends, given its number from 0 and its latents, which nobody reads."""

    def step_ended(step: int, latents: object) -> None:
        stop_if(expired)
        if on_step is not None:
            # of the scheduler, whose solver may take more steps than were asked for
            timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
            on_step(step + 1, None if timesteps is None else len(timesteps))

    return step_ended


def _after_each_step(
    expired: threading.Event | None, on_step: OnStep | None
) -> Callable[[object, int, object, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the same as a callback of diffusers."""

    def callback(pipe: object, step: int, timestep: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        _at_each_step(pipe, expired, on_step)(step, None)
        return tensors

    return callback


def _pictures(images: object, count: int) -> Sequence[Begun]:
    """Return the pictures of a call: a tensor [B, 3, H, W] in 0 to 1, or a list of PIL pictures."""
    if hasattr(images, "detach"):
        return _from_tensor(cast("Tensor", images))
    if not (isinstance(images, Sequence) and len(images) == count and all(isinstance(i, Image.Image) for i in images)):
        expected = "one PIL picture" if count == 1 else f"{count} PIL pictures"
        raise TypeError(f"the pipe returned {_shown(images)} in .images; expected a list of {expected}")
    return list(images)


def _with_text(begun: Begun, enhanced: str) -> Begun:
    if isinstance(begun, Exception):
        return begun
    if isinstance(begun, Image.Image):
        begun.info[ENHANCED_PROMPT] = enhanced
        return begun
    return functools.partial(_waited_with_text, begun, enhanced)


def _waited_with_text(wait: Callable[[], Image.Image], enhanced: str) -> Image.Image:
    picture = wait()
    picture.info[ENHANCED_PROMPT] = enhanced
    return picture


def _from_tensor(images_bchw: Tensor) -> Sequence[Begun]:
    import torch

    # Rounded and laid out where they are, all at once: a quarter of the bytes crosses the bus, the host has nothing to
    # compute, and the device waits for one copy. The same arithmetic as diffusers' own.
    bad_b = (~torch.isfinite(images_bchw)).flatten(1).sum(1)
    bytes_bchw = (images_bchw.float() * 255).round().clamp(0, 255).nan_to_num().to(torch.uint8)
    pixels_bhwc = bytes_bchw.permute(0, 2, 3, 1).contiguous()
    total = images_bchw[0].numel()
    if images_bchw.device.type != "cuda":
        return [_picture(*pair, total) for pair in zip(pixels_bhwc.cpu(), bad_b.tolist(), strict=True)]
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in (pixels_bhwc, bad_b)]
    for copy, tensor in zip(copies, (pixels_bhwc, bad_b), strict=True):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a thread that waits for it sleeps
    copied.record(torch.cuda.current_stream(images_bchw.device))  # not of the current device, which may be another

    def picture(index: int) -> Image.Image:
        copied.synchronize()
        outcome = _picture(copies[0][index], int(copies[1][index]), total)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return [functools.partial(picture, index) for index in range(len(images_bchw))]


def _picture(pixels_hwc: Tensor, bad: int, total: int) -> Outcome:
    return NotFiniteError(bad, total) if bad else Image.fromarray(pixels_hwc.numpy())


def _shown(images: object) -> str:
    kind = type(images).__name__
    return f"{kind} of {len(images)}" if isinstance(images, Sequence) else kind
