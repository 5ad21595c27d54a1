"""Ctrl-C at any line of the library: the pipe is as before, or its report is true and restore undoes all of it."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ernie_accel
from ernie_accel import (
    CallDefaults,
    CaptureGraphs,
    CastDtype,
    Context,
    FreeAfterUse,
    FuseKernels,
    Quantize,
    Residency,
    RewriteBlocks,
    SetAttention,
    SwapScheduler,
)
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.transforms.weights.residency import least_weights
from tests.attack import SEED, rounds
from tests.examples import differences, make_awkward, snapshot
from tests.pipelines import tiny_ernie
from tests.test_residency import movers  # noqa: F401  a fixture

PACKAGE = str(Path(ernie_accel.__file__).parent)
Place = tuple[str, int]


@contextmanager
def traced(at_line: Callable[[Place], None]) -> Iterator[None]:
    """Call `at_line` before every line of the library that runs."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def lines_of(do: Callable[[], Any]) -> Counter[Place]:
    """Return how often each line of the library runs in ``do()``."""
    hits: Counter[Place] = Counter()
    with traced(lambda place: hits.update((place,))):
        do()
    return hits


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_at(place: Place, hit: int, do: Callable[[], Any], stop: Callable[[], None] = interrupt) -> bool:
    """Call `stop` when `place` is reached for the `hit`-th time (1 is the first); return whether it interrupted."""
    left = hit

    def at_line(here: Place) -> None:
        nonlocal left
        if here == place:
            left -= 1
            if left == 0:
                stop()

    try:
        with traced(at_line):
            do()
    except KeyboardInterrupt:
        return True
    return False


def first_request(pipe: Any) -> None:
    ernie_accel.optimize(pipe, Quantize("int8-weight-only"), FreeAfterUse(), preset="turbo-bf16")


def on_kernels(pipe: Any) -> None:
    """What only a Hopper card runs, but any machine can install."""
    ernie_accel.optimize(
        pipe,
        FuseKernels("fp8"),
        CaptureGraphs(),
        SetAttention("math"),
        preset="turbo-fp8",
        on_unsupported="skip",
        context=Context.named("h200"),
    )


def another_request(pipe: Any) -> None:
    """On a pipe that was optimized: some of it stays, some is undone, some is new."""
    ernie_accel.optimize(pipe, CastDtype("bf16"), SwapScheduler("unipc"), CallDefaults("turbo"))


def earlier_request(pipe: Any) -> None:
    ernie_accel.optimize(pipe, CastDtype("bf16"), Quantize("int8-weight-only"), SwapScheduler("lcm"))


def with_weights_kept(pipe: Any) -> None:
    """As on an accelerator that is too small: some weights take turns."""
    low = least_weights(pipe, PlannedPipe.of(pipe))
    ernie_accel.optimize(pipe, RewriteBlocks(), Residency(low + 10_000))


def nothing_before(pipe: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("before", "do"),
    [
        (nothing_before, first_request),
        (nothing_before, on_kernels),
        (earlier_request, another_request),
        (on_kernels, ernie_accel.restore),
        (nothing_before, with_weights_kept),
        (with_weights_kept, ernie_accel.restore),
    ],
    ids=lambda function: function.__name__,
)
def test_an_interrupt_at_any_line_leaves_a_whole_pipe_or_a_true_report(before, do, movers):  # noqa: F811
    chance = random.Random(SEED)
    pipe = tiny_ernie()
    make_awkward(pipe)
    original = snapshot(pipe)

    def start() -> None:
        ernie_accel.restore(pipe)
        before(pipe)

    for _ in range(2):  # the first time imports modules and fills caches
        start()
        hits = lines_of(lambda: do(pipe))
    # Every line, the first time it runs, the last time or one between: another seed stops at others of its runs.
    places = [(place, chance.choice((1, count, chance.randint(1, count)))) for place, count in hits.items()]
    if len(places) > (most := rounds(short=10, full=100_000)):
        places = chance.sample(places, most)
    missed = 0
    start()
    earlier, entries = snapshot(pipe), ernie_accel.report(pipe).entries
    for place, hit in places:
        missed += not interrupted_at(place, hit, lambda: do(pipe))
        if ernie_accel.report(pipe).entries == entries and not differences(earlier, snapshot(pipe)):
            continue
        ernie_accel.restore(pipe)
        where = f"interrupted at {place[0]}:{place[1]}, hit {hit}"
        assert differences(original, snapshot(pipe)) == [], where
        assert ernie_accel.report(pipe).entries == (), where
        start()
        earlier, entries = snapshot(pipe), ernie_accel.report(pipe).entries
    assert missed <= len(places) // 50  # a line may run more seldom the next time: weak references, caches
