"""A call that is wrapped: all its arguments by name, one inside the other, on one pipe only, and back again."""

from __future__ import annotations

import contextlib
import copy
import inspect

import pytest

from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import leaving_no_trace, wrap_call, wrapper


class Pipe:
    """As pipelines are called: with positions, names, defaults and whatever else is given."""

    def __call__(self, prompt, steps=50, *, size=(64, 64), **more):
        """Draw."""
        return [prompt, steps, size, more]


class Counting:
    """Notes the arguments of each call, and halves the steps."""

    def __init__(self):
        self.seen = []
        self.tracing = True

    def around(self, call, arguments):
        if self.tracing:
            self.seen.append(arguments)
        return ["seen", *call({**arguments, "steps": arguments["steps"] // 2})]

    @contextlib.contextmanager
    def leaving_no_trace(self):
        self.tracing = False
        yield
        self.tracing = True


@pytest.fixture
def wrapped():
    pipe, counting, undo = Pipe(), Counting(), Undo()
    wrap_call(pipe, "counting", counting.around, undo)
    return pipe, counting, undo


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe("a", 50, size=(64, 64), extra=1),
        lambda pipe: pipe(prompt="a", extra=1),
        lambda pipe: pipe("a", extra=1, steps=50),
    ],
)
def test_arguments_come_by_name_with_their_defaults_however_they_are_given(wrapped, call):
    pipe, counting, _ = wrapped
    assert call(pipe) == ["seen", "a", 25, (64, 64), {"extra": 1}]
    assert counting.seen == [{"prompt": "a", "steps": 50, "size": (64, 64), "extra": 1}]


def test_a_call_that_the_pipe_refuses_is_refused_before_anything_is_done(wrapped):
    pipe, counting, _ = wrapped
    with pytest.raises(TypeError, match="missing a required argument: 'prompt'"):
        pipe(steps=3)
    with pytest.raises(TypeError, match="multiple values for argument 'steps'"):
        pipe("a", 3, steps=3)
    assert counting.seen == []


def test_the_later_wrapper_is_the_outer_one(wrapped):
    pipe, counting, undo = wrapped
    outer = Undo()
    wrap_call(pipe, "more", lambda call, given: call({**given, "steps": 8}), outer)
    assert pipe("a")[2] == 4
    assert counting.seen[-1]["steps"] == 8
    outer()
    assert pipe("a")[2] == 25
    undo()
    assert pipe("a")[1] == 50


def test_another_pipe_of_the_class_is_left_alone(wrapped):
    assert Pipe()("a") == ["a", 50, (64, 64), {}]
    assert type(Pipe()) is Pipe


def test_it_looks_like_the_class_it_was(wrapped):
    cls = type(wrapped[0])
    assert cls is not Pipe
    assert issubclass(cls, Pipe)
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        Pipe.__name__, Pipe.__qualname__, Pipe.__module__, Pipe.__doc__,
    )  # fmt: skip
    assert inspect.signature(cls.__call__) == inspect.signature(Pipe.__call__)
    assert cls.__call__.__doc__ == "Draw."


def test_the_undo_gives_class_and_attributes_back(wrapped):
    pipe, counting, undo = wrapped
    undo()
    assert type(pipe) is Pipe
    assert vars(pipe) == {}
    assert pipe("a") == ["a", 50, (64, 64), {}]
    assert counting.seen == []


def test_a_deep_copy_calls_its_own_wrapper(wrapped):
    pipe, counting, undo = wrapped
    twin = copy.deepcopy(pipe)
    undo()
    assert twin("a")[0] == "seen"
    assert (len(counting.seen), len(wrapper(twin, "counting", Counting).seen)) == (0, 1)


def test_a_wrapper_is_found_by_its_name(wrapped):
    pipe, counting, undo = wrapped
    assert wrapper(pipe, "counting", Counting) is counting
    assert wrapper(pipe, "other", Counting) is None
    wrap_call(pipe, "function", lambda call, given: call(given), undo)
    assert wrapper(pipe, "function", Counting) is None  # nobody's method
    undo()
    assert wrapper(pipe, "counting", Counting) is None


def test_what_a_call_leaves_in_a_wrapper_can_be_kept_out(wrapped):
    pipe, counting, undo = wrapped
    wrap_call(pipe, "function", lambda call, given: call(given), undo)  # has nothing to be asked
    pipe.other = Counting().around  # no wrapper, by its name
    with leaving_no_trace(pipe):
        assert not counting.tracing
        assert pipe.other.__self__.tracing
        pipe("a")
    assert counting.tracing
    assert counting.seen == []
