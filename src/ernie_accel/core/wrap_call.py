"""Do something around every call of one pipe. A call is looked up on the class, so the instance gets one of its own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeAlias

from ernie_accel.core.components import Pipeline
from ernie_accel.core.undo import Undo

#: Of a call, by name.
Arguments: TypeAlias = dict[str, Any]
#: Does what the pipe did before.
Call: TypeAlias = Callable[[Arguments], Any]
#: (call, all arguments, defaults included) -> result.
Around: TypeAlias = Callable[[Call, Arguments], object]


_PREFIX = "_around_"


def wrap_call(pipe: Pipeline, name: str, around: Around, undo: Undo) -> None:
    """Let calls of `pipe` go through `around`, in place; `wrapper` finds it by `name`.

    It is kept in an attribute of the pipe, so that a deep copy of the pipe calls its own copy. The pipe's new class is
    a subclass of the same name and signature: save_pretrained writes the name, and from_pretrained looks it up.
    """
    attribute = f"{_PREFIX}{name}"
    undo.setattr(pipe, attribute, around)
    cls = type(pipe)
    stock = cls.__call__
    signature = inspect.signature(stock)

    @wraps(stock)
    def __call__(self: Pipeline, *args: object, **kwargs: object) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name)
        del arguments[next(iter(signature.parameters))]  # self
        return getattr(self, attribute)(lambda given: stock(self, **given), arguments)

    __call__.__signature__ = signature  # type: ignore[attr-defined]
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    undo.push(lambda: object.__setattr__(pipe, "__class__", cls))
    object.__setattr__(pipe, "__class__", metaclass(cls.__name__, (cls,), {"__call__": __call__, **names}))


def wrapper(pipe: Pipeline, name: str) -> object | None:
    """Return the object whose method was given to `wrap_call` under `name`; None if none was."""
    return getattr(vars(pipe).get(f"{_PREFIX}{name}"), "__self__", None)


@contextlib.contextmanager
def leaving_no_trace(pipe: Pipeline) -> Iterator[None]:
    """Call the pipe, within the block, so that nothing that wraps its calls remembers anything of it.

    A wrapper that keeps something between calls has a method ``leaving_no_trace`` of its own, a context manager.
    """
    with contextlib.ExitStack() as stack:
        for name, around in vars(pipe).items():
            own = getattr(getattr(around, "__self__", None), "leaving_no_trace", None)
            if name.startswith(_PREFIX) and own is not None:
                stack.enter_context(own())
        yield
