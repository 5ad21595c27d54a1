"""Replace the forward or a method of one object. Nothing else in the library does this."""

from __future__ import annotations

import functools
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType, MethodType
from typing import Any, ClassVar, TypeVar

from torch import nn

from ernie_accel.core.undo import Undo, has_below_hooks, put_below_hooks

S = TypeVar("S", bound="StandInForward")
_F = TypeVar("_F")
_M = TypeVar("_M", bound="StandInMethod")


class StandInForward(ABC):
    """A replacement for the forward of one module, kept in its attribute ``forward``.

    Its class is at module level, so that a deep copy or a pickle of the module gets a stand-in of its own. What was
    captured or remembered (`captured`) is left out of it, because it reads the weights of the original.

    Class-level facts:
        captured: Attributes that are left out of copies and pickles; `forget` makes new ones.
    """

    captured: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        """Stand in for the forward that `module` has now; `install` puts it there."""
        self.module: Any = module
        #: The forward underneath, if it is not the class's own method: another stand-in, a hook of accelerate.
        self.inner: Callable[..., Any] | None = but_for_own(module, vars(module).get("forward"))
        self.forget()

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module gives."""

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments: those of the forward underneath."""
        return inspect.signature(self.inner or MethodType(type(self.module).forward, self.module))

    def named(self, args: tuple[_F, ...], kwargs: dict[str, _F]) -> dict[str, _F]:
        """Return all arguments of a call by the names that the module's own forward has for them.

        Raises:
            TypeError: There are more by place than it takes, or one is given by place and by name.
        """
        if not args:
            return kwargs
        names = _names_by_place(type(self.module).forward)
        twice = [name for name in names[: len(args)] if name in kwargs]
        if len(args) > len(names) or twice:
            raise TypeError(
                f"{type(self.module).__name__}.forward got {len(args)} arguments by place"
                f"{', and by name, too: ' if twice else ''}{', '.join(twice)}; expected ({', '.join(names)})"
            )
        return dict(zip(names, args, strict=False)) | kwargs

    def inner_forward(self, *args: object, **kwargs: object) -> Any:
        """Return what the forward underneath gives."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def forget(self) -> None:  # noqa: B027  most keep nothing
        """Free the memory that is kept between calls; the next call allocates it again."""

    def install(self, undo: Undo) -> None:
        """Replace the module's forward by this."""
        undo.push(self.remove)
        undo.watch(self.is_installed)
        self.module.forward = self

    def is_installed(self) -> bool:
        """Return whether the module's forward goes through this."""
        top = vars(self.module).get("forward")
        return any(found is self for found in _chain(top)) or has_below_hooks(self.module, "forward", self)

    def remove(self) -> None:
        """Remove this, even from beneath others that were put on top of it since; a no-op if it is not in place."""
        top = vars(self.module).get("forward")
        if top is self:
            if self.inner is None:
                del self.module.forward
            else:
                self.module.forward = self.inner
        for above in _chain(top):
            if above.inner is self:
                above.inner = self.inner
        if self.inner is None:
            put_below_hooks(self.module, "forward", self)
        else:
            put_below_hooks(self.module, "forward", self, self.inner)

    def on(self: S, module: nn.Module) -> S:
        """Return a stand-in like this one for another module, which has the same weights (see `shadow`)."""
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        made.module, made.inner = module, rebound(self.inner, self.module, module)
        made.forget()
        return made

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in self.captured}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.forget()


@functools.lru_cache(maxsize=64)
def _names_by_place(forward: Callable[..., object]) -> tuple[str, ...]:
    """Return the names of a forward's arguments that can be given by place, without the first, ``self``."""
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, each in inspect.signature(forward).parameters.items() if each.kind in by_place)[1:]


class StandInMethod(ABC):
    """A replacement for a method of one object, under its name. Copies and pickles of the object have their own."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name
        inner = vars(owner).get(name)
        is_own = isinstance(inner, MethodType) and inner.__self__ is owner and inner.__name__ == name
        self.inner: Callable[..., object] | None = None if is_own else inner

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> object:
        """Return what the method gives."""

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments: those of the method underneath."""
        return inspect.signature(self._inner())

    def call_inner(self, *args: object, **kwargs: object) -> Any:
        """Return what the method underneath gives."""
        return self._inner()(*args, **kwargs)

    def _inner(self) -> Callable[..., object]:
        if self.inner is not None:
            return self.inner
        cls = type(self.owner)
        found: Callable[..., object] = inspect.getattr_static(cls, self.name).__get__(self.owner, cls)
        return found


def method_standing_in(owner: object, name: str, kind: type[_M]) -> _M | None:
    """Return the stand-in of class `kind` that `owner` has for a method, on top or beneath others; None if none."""
    return next((found for found in _methods(owner, name) if isinstance(found, kind)), None)


def remove_method(owner: object, name: str, kind: type[StandInMethod]) -> None:
    """Remove the stand-ins of class `kind` for a method of `owner`, even from beneath others; a no-op without any."""
    for found in _methods(owner, name):
        if not isinstance(found, kind):
            continue
        for above in _methods(owner, name):
            if above.inner is found:
                above.inner = found.inner
        if vars(owner).get(name) is not found:
            continue
        if found.inner is None:
            delattr(owner, name)
        else:
            setattr(owner, name, found.inner)


def _methods(owner: object, name: str) -> list[StandInMethod]:
    """Return the stand-ins for a method, the top one first."""
    made, found = vars(owner).get(name), []
    while isinstance(made, StandInMethod):
        found.append(made)
        made = made.inner
    return found


@dataclass(frozen=True)
class Bound:
    """A function with its first argument, as a bound method is, but pickled by the function's own name.

    A bound method is pickled by the name that it has in its owner, where a function that was put there under another
    name, or over the class's own, is not found.
    """

    function: Callable[..., object]
    owner: object

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.function(self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(self.function, self.owner))


def caller_of_bound() -> FrameType | None:
    """Return the frame that called the `Bound` whose function asks this: the function's own caller is the `Bound`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not Bound.__call__.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_back


def standing_in(module: nn.Module, kind: type[S]) -> S | None:
    """Return the stand-in of class `kind` that `module` has, on top or beneath others; None if it has none."""
    return next((found for found in _chain(vars(module).get("forward")) if isinstance(found, kind)), None)


def shadow(module: nn.Module) -> Any:
    """Return a module with the weights, hooks and children of `module`, but the forward of its class.

    Its children, and those of its lists, can be replaced. Replacing a child of the module itself, even for one forward,
    would affect every thread that runs it.

    Raises:
        LookupError: Its forward before a hook of accelerate cannot be bound to another module (see `rebound`).
    """
    made: Any = object.__new__(type(module))
    vars(made).update(vars(module))
    lists = {name: nn.ModuleList(child) for name, child in module._modules.items() if type(child) is nn.ModuleList}
    vars(made)["_modules"] = {**module._modules, **lists}
    vars(made).pop("forward", None)
    if "_old_forward" in vars(module):
        vars(made)["_old_forward"] = rebound(vars(module)["_old_forward"], module, made)
    return made


def rebound(forward: object, owner: nn.Module, other: nn.Module) -> Any:
    """Return `forward`, which calls `owner`, so that it calls `other`.

    Raises:
        LookupError: It is none of the known kinds: a stand-in, a bound method, a hook of accelerate.
    """
    if forward is None:
        return None
    if isinstance(forward, StandInForward):
        return forward.on(other)
    if isinstance(forward, MethodType) and forward.__self__ is owner:
        return MethodType(forward.__func__, other)
    if isinstance(forward, functools.partial) and forward.args[:1] == (owner,):  # accelerate's `add_hook_to_module`
        return functools.partial(forward.func, other, *forward.args[1:], **forward.keywords)
    raise LookupError(f"the forward of {type(owner).__name__} is a {type(forward).__name__}, which cannot be rebound")


def _chain(forward: object) -> Iterator[StandInForward]:
    """Yield the stand-ins of a forward, the top one first, looking through hooks of accelerate."""
    while forward is not None:
        if isinstance(forward, StandInForward):
            yield forward
            forward = forward.inner
        elif isinstance(forward, functools.partial) and forward.args and isinstance(forward.args[0], nn.Module):
            forward = vars(forward.args[0]).get("_old_forward")
        else:
            return


def but_for_own(module: nn.Module, forward: _F) -> _F | None:
    """Return `forward`, or None if it is the class's own method, which accelerate leaves behind where it was removed.

    A bound method could not be pickled: pickle would look it up by its name and find the stand-in.
    """
    if isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward:
        return None
    return forward
