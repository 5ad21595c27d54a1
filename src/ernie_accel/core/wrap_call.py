"""Do something around every call of one pipe. A call is looked up on the class, so the instance gets one of its own.

What is done around calls is a stack of layers. The pipe's class is made from them: a subclass, with the same name and
signature, of the one that diffusers knows (save_pretrained writes the name, from_pretrained looks it up). Layers are
objects of classes at module level, so that a pipe with layers can be copied and pickled.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, TypeAlias, TypeVar

from ernie_accel.core.components import Pipeline
from ernie_accel.core.undo import Undo

W = TypeVar("W")
#: Of a call, by name.
Arguments: TypeAlias = dict[str, Any]
#: The call underneath a layer: (pipe, *args, **kwargs) -> result.
Inner: TypeAlias = Callable[..., object]
#: Does what the pipe did before.
Call: TypeAlias = Callable[[Arguments], Any]
#: (call, all arguments, defaults included) -> result.
Around: TypeAlias = Callable[[Call, Arguments], object]

_PREFIX = "_ernie_accel_around_"
_LAYER = "_ernie_accel_layer"


class CallLayer(ABC):
    """One thing that is done around the calls of a pipe.

    Class-level facts:
        outermost: Goes around all other layers, including those that are added later.
    """

    outermost: ClassVar[bool] = False

    def signature(self, inner: inspect.Signature) -> inspect.Signature:
        """Return the signature of the call, given that of the call underneath."""
        return inner

    @abstractmethod
    def call(
        self, inner: Inner, signature: inspect.Signature, pipe: Pipeline, *args: object, **kwargs: object
    ) -> object:
        """Return what the pipe gives; ``inner(pipe, *args, **kwargs)``, of that signature, is the call underneath."""


def add_layer(pipe: Pipeline, layer: CallLayer, undo: Undo) -> None:
    """Let calls of `pipe` go through `layer`, around those that are there."""
    undo.push(partial(_remove_layer, pipe, layer))
    stock, layers = _taken_apart(type(pipe))
    _set_layers(pipe, stock, sorted((*layers, layer), key=lambda each: each.outermost))


def has_layer(pipe: Pipeline, kind: type[CallLayer]) -> bool:
    """Return whether calls of `pipe` go through a layer of class `kind`."""
    return any(isinstance(layer, kind) for layer in _taken_apart(type(pipe))[1])


def class_without(cls: type, kind: type[CallLayer]) -> tuple[type, tuple[CallLayer, ...]]:
    """Return what a pipe's class is made of: the class underneath, and all layers but those of class `kind`."""
    stock, layers = _taken_apart(cls)
    return stock, tuple(layer for layer in layers if not isinstance(layer, kind))


def remove_layers(pipe: Pipeline, kind: type[CallLayer]) -> None:
    """Remove all layers of class `kind`; a no-op if there are none."""
    for layer in _taken_apart(type(pipe))[1]:
        if isinstance(layer, kind):
            _remove_layer(pipe, layer)


def _remove_layer(pipe: Pipeline, layer: CallLayer) -> None:
    stock, layers = _taken_apart(type(pipe))
    if any(each is layer for each in layers):
        _set_layers(pipe, stock, [each for each in layers if each is not layer])


def _taken_apart(cls: type) -> tuple[type, tuple[CallLayer, ...]]:
    """Return the class underneath all layers, and the layers from the innermost on."""
    layers = []
    while _LAYER in vars(cls):
        layers.append(vars(cls)[_LAYER])
        (cls,) = cls.__bases__
    return cls, tuple(reversed(layers))


def _set_layers(pipe: Pipeline, stock: type, layers: list[CallLayer]) -> None:
    object.__setattr__(pipe, "__class__", _put_together(stock, layers))


def _put_together(cls: type, layers: Iterable[CallLayer]) -> type:
    for layer in layers:
        cls = _layered(cls, layer)
    return cls


def _layered(cls: type, layer: CallLayer) -> type:
    """Return a subclass of `cls`, of the same name, whose calls go through `layer`."""
    inner = cls.__call__
    signature = inspect.signature(inner)

    @wraps(inner)
    def __call__(self: Pipeline, *args: object, **kwargs: object) -> object:
        return layer.call(inner, signature, self, *args, **kwargs)

    __call__.__signature__ = layer.signature(signature)  # type: ignore[attr-defined]

    def __new__(cls: type, *args: object, **kwargs: object) -> object:
        # a script that says type(pipe)(**pipe.components) makes a pipe of its own, to which nothing was applied
        return _taken_apart(cls)[0](*args, **kwargs) if _LAYER in vars(cls) else object.__new__(cls)

    def __reduce_ex__(self: Pipeline, protocol: object) -> object:
        return _new, _taken_apart(type(self)), vars(self)  # pickle finds no class of this name that is this one

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, _LAYER: layer}
    metaclass: Any = type(cls)
    made: type = metaclass(
        cls.__name__, (cls,), {"__new__": __new__, "__call__": __call__, "__reduce_ex__": __reduce_ex__, **names}
    )
    return made


def _new(stock: type, layers: tuple[CallLayer, ...]) -> object:
    """Return an empty pipe of a class with layers, to be filled by pickle or copy."""
    cls = _put_together(stock, layers)
    return object.__new__(cls)


@dataclass(frozen=True, eq=False)
class Defaults(CallLayer):
    """Other default values of a call's arguments."""

    values: dict[str, object]

    def signature(self, inner: inspect.Signature) -> inspect.Signature:
        """Return the same parameters with these defaults."""
        parameters = [
            parameter.replace(default=self.values[name]) if name in self.values else parameter
            for name, parameter in inner.parameters.items()
        ]
        return inner.replace(parameters=parameters)

    def call(
        self, inner: Inner, signature: inspect.Signature, pipe: Pipeline, *args: object, **kwargs: object
    ) -> object:
        given = signature.bind_partial(pipe, *args, **kwargs).arguments
        return inner(pipe, *args, **{name: v for name, v in self.values.items() if name not in given}, **kwargs)


def new_defaults(pipe: Pipeline, wanted: dict[str, object]) -> tuple[str, ...]:
    """Return what `Defaults` would change, as "name old -> new"; arguments have to be those of the call."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return tuple(
        f"{name} {parameters[name].default} -> {value}"
        for name, value in wanted.items()
        if parameters[name].default != value
    )


@dataclass(frozen=True, eq=False)
class _Around(CallLayer):
    """What `wrap_call` adds: it finds what goes around the call on the pipe, so that a copy has its own."""

    attribute: str

    def call(
        self, inner: Inner, signature: inspect.Signature, pipe: Pipeline, *args: object, **kwargs: object
    ) -> object:
        bound = signature.bind(pipe, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name)
        del arguments[next(iter(signature.parameters))]  # self
        return getattr(pipe, self.attribute)(lambda given: inner(pipe, **given), arguments)


def wrap_call(pipe: Pipeline, name: str, around: Around, undo: Undo) -> None:
    """Let calls of `pipe` go through `around`, in place; `wrapper` finds it by `name`.

    It is kept in an attribute of the pipe, so that a deep copy of the pipe calls its own copy.
    """
    attribute = f"{_PREFIX}{name}"
    undo.setattr(pipe, attribute, around)
    add_layer(pipe, _Around(attribute), undo)


def around_of(pipe: Pipeline, name: str) -> Around | None:
    """Return what was given to `wrap_call` under `name`; None if nothing was."""
    found: Around | None = vars(pipe).get(f"{_PREFIX}{name}")
    return found


def wrapper(pipe: Pipeline, name: str, kind: type[W]) -> W | None:
    """Return the object of class `kind` whose method was given to `wrap_call` under `name`; None if none was."""
    found = getattr(around_of(pipe, name), "__self__", None)
    return found if isinstance(found, kind) else None


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
