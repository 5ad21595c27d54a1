"""Keep a quantized pipe from being cast, which would silently separate values from their scales."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch

from ernie_accel.core.components import Pipeline, modules_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.undo import Undo

_CASTS = ("half", "float", "double", "bfloat16", "type")


def refuse_casts(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make ``.to(dtype)``, ``.half()`` ... of the pipe and of these components raise; moving them still works.

    On the instances only. A bound method, unlike a closure, follows its owner through ``copy.deepcopy``.
    """
    if callable(getattr(pipe, "to", None)):
        undo.setattr(pipe, "to", MethodType(_to, pipe))
    for module in modules_of(pipe, components).values():
        undo.setattr(module, "to", MethodType(_to, module))
        for name in _CASTS:
            undo.setattr(module, name, MethodType(_refusing(name), module))


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Move a quantized pipe or module; refuse a dtype.

    Raises:
        ErnieAccelError: A dtype was given.
    """
    given = [a.dtype if isinstance(a, torch.Tensor) else a for a in (*args, *kwargs.values())]
    dtype = next((a for a in given if isinstance(a, torch.dtype)), None)
    if dtype is not None:
        raise _refusal(self, f"to({dtype})")
    return type(self).to(self, *args, **kwargs)


@functools.cache
def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise _refusal(self, f"{name}()")

    return refuse


def _refusal(owner: Any, call: str) -> ErnieAccelError:
    return ErnieAccelError(
        f"{type(owner).__name__}.{call}: its weights are quantized, and a cast would separate them from their scales. "
        "Move it with .to(device) alone; for another dtype restore(pipe) first, then "
        "optimize(pipe, CastDtype(...), Quantize(...))"
    )
