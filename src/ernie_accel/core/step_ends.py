"""Tell when a step of a call ends, for pipelines that take no callback: their scheduler has made a step then."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol, TypeAlias, cast

from torch import Tensor

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import StandInMethod

#: Given the number of the step, from 0, and the latents after it, of any shape.
OnStepEnd: TypeAlias = Callable[[int, Tensor], None]

_guard = threading.Lock()
#: A scheduler, and what is done with the latents that its steps return.
_Watch: TypeAlias = tuple[object, Callable[[Tensor], None]]
#: Those of this thread, the innermost last; calls in other threads have their own.
_watches: ContextVar[tuple[_Watch, ...]] = ContextVar("ernie_accel_watched_steps", default=())


class _Steps(Protocol):
    """A scheduler."""

    step: Callable[..., object]


class _HasScheduler(Protocol):
    scheduler: _Steps


def has_steps(pipe: object) -> bool:
    """Return whether `pipe` has a scheduler that makes steps."""
    return callable(getattr(getattr(pipe, "scheduler", None), "step", None))


@contextlib.contextmanager
def watching_steps(pipe: object, on_step_end: OnStepEnd) -> Iterator[None]:
    """Call `on_step_end` after each step that the scheduler of `pipe` makes in this thread, within the block.

    The scheduler's ``step`` is replaced on the instance while calls are watched, and is what it was once the last of
    them has ended. Each call watches the scheduler that the pipe has when it begins; without one this is a no-op.
    Blocks may be nested: each sees every step.

    Raises:
        ErnieAccelError: By a step that returns something without latents in it.
    """
    if not has_steps(pipe):
        yield
        return
    scheduler = cast(_HasScheduler, pipe).scheduler
    call, numbers = object(), itertools.count()
    watch = (scheduler, lambda latents: on_step_end(next(numbers), latents))
    before = _watches.set((*_watches.get(), watch))
    try:
        with _guard:
            _watch(scheduler, call)
        yield
    finally:
        with _guard:
            _forget(scheduler, call)
        _watches.reset(before)


class _WatchedStep(StandInMethod):
    """A scheduler's ``step``, whatever its arguments are, that shows the call of its thread what it returns."""

    def __init__(self, scheduler: object) -> None:
        super().__init__(scheduler, "step")
        self.calls: set[object] = set()
        self.before = {name: value for name, value in vars(scheduler).items() if name == self.name}

    def __call__(self, *args: object, **kwargs: object) -> object:
        watches = _watches.get()
        token = _watches.set(())  # one step is shown once, even if it calls another that is watched
        try:
            result = self.call_inner(*args, **kwargs)
        finally:
            _watches.reset(token)
        for scheduler, on_latents in reversed(watches):
            if scheduler is self.owner:
                on_latents(_latents(scheduler, result))
        return result


def _watch(scheduler: _Steps, call: object) -> None:
    top = vars(scheduler).get("step")
    watched = top if isinstance(top, _WatchedStep) else _WatchedStep(scheduler)
    watched.calls.add(call)
    scheduler.step = watched


def _forget(scheduler: _Steps, call: object) -> None:
    """Put back what was there once no call needs the watch; a no-op where an interrupt came before it was there."""
    top = vars(scheduler).get("step")
    if not isinstance(top, _WatchedStep):
        return  # somebody has replaced it during the call, and it stays theirs
    top.calls.discard(call)
    if top.calls:
        return
    if top.before:  # in one operation: a thread that is not watched may be about to step
        vars(scheduler).update(top.before)
    else:
        del scheduler.step


def _latents(scheduler: object, result: object) -> Tensor:
    """Return the latents in what a step returns: itself, or first in a tuple or one of diffusers' outputs."""
    if isinstance(result, Tensor):
        return result
    found = getattr(result, "prev_sample", None)
    if found is None and isinstance(result, tuple | list) and result:
        found = result[0]
    if not isinstance(found, Tensor):
        raise ErnieAccelError(
            f"{type(scheduler).__name__}.step returned a {type(result).__name__} without latents; expected a tensor, "
            "an output with prev_sample, or a tuple that begins with them"
        )
    return found
