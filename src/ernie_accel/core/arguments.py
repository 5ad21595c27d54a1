"""Check the arguments of a transform against its annotations: Python itself lets a bare string pass for a tuple.

Pydantic is not used here: its strict mode refuses lists and NumPy's numbers, and its lax mode takes "2" for 2.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class _WrongTypeError(Exception):
    """A value is of none of the types that are declared."""


def arguments_of(instance: DataclassInstance) -> dict[str, object]:
    """Return the fields of a dataclass as plain data of the types they declare.

    Lists become tuples and NumPy's numbers Python's. A field whose metadata has ``machine_local`` also takes a path,
    which becomes text, and one whose metadata has ``also_takes`` (a class) an instance of that, as it stands. A
    transform must check fields of other types itself.

    Raises:
        ValueError: Some are of another type: a bare string for a tuple, a set, NaN, 2.5 or True for an int.
    """
    hints = _hints(type(instance))
    values, wrong = {}, []
    for f in fields(instance):
        value = getattr(instance, f.name)
        if f.name not in hints or isinstance(value, f.metadata.get("also_takes", ())):
            continue
        if f.metadata.get("machine_local") and isinstance(value, os.PathLike):
            value = os.fspath(value)
        try:
            values[f.name] = _plain(value, hints[f.name])
        except _WrongTypeError:
            wrong.append(f"{f.name} takes {_in_words(hints[f.name])}, got {value!r}{_advice(f, value, hints[f.name])}")
    if wrong:
        raise ValueError(f"{type(instance).__name__}: {'; '.join(wrong)}")
    return values


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Refuse anything that is not a regular expression.

    Raises:
        ValueError: One of `patterns`, the argument called `name`, is not one.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} takes regular expressions, and {pattern!r} is not one: {error}") from error


def _hints(cls: type) -> dict[str, object]:
    try:
        return get_type_hints(cls)
    except NameError:  # of a class written inside a function, say: nothing is known
        return {}


def _plain(value: object, kind: object) -> object:
    """Return `value` as plain data of type `kind`.

    Raises:
        _WrongTypeError: It is of another type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _plain_of_one(value, inner)
    if origin is Literal:
        if not any(value == each and type(value) is type(each) for each in inner):
            raise _WrongTypeError
        return value
    if origin is tuple:
        return tuple(_plain_items(value, inner))
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _WrongTypeError
        return value if isinstance(value, (int, float)) else float(value)
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind in (int, float) or (isinstance(kind, type) and not isinstance(value, kind)):
        raise _WrongTypeError
    return value


def _plain_of_one(value: object, kinds: tuple[object, ...]) -> object:
    for kind in kinds:
        try:
            return _plain(value, kind)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _plain_items(value: object, kinds: tuple[object, ...]) -> Iterator[object]:
    if not isinstance(value, (tuple, list)):
        raise _WrongTypeError
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise _WrongTypeError
    yield from map(_plain, value, kinds)


def _in_words(kind: object) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, inner))
    if origin is tuple and inner[1:] == (Ellipsis,):
        return f"a tuple of {_in_words(inner[0])}"
    if origin is tuple:
        return f"({', '.join(map(_in_words, inner))})"
    if kind is float:
        return "a finite float"
    return "None" if kind is NoneType else str(getattr(kind, "__name__", kind))


def _advice(f: Field[object], value: object, kind: object) -> str:
    takes_tuple = any(get_origin(each) is tuple for each in (kind, *get_args(kind)))
    return f": write {f.name}=({value!r},)" if takes_tuple and isinstance(value, str) else ""
