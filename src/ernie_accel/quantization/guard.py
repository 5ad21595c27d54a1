"""Keep a quantized pipe from being cast, which would silently separate values from their scales."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch

from ernie_accel.core.components import Pipeline, modules_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import Bound, caller_of_bound
from ernie_accel.core.undo import Undo

#: Methods of a module that cast it, and the dtype they cast to.
_CASTS = {
    "half": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
    "bfloat16": torch.bfloat16,
    "type": None,
}


def refuse_casts(pipe: Pipeline, components: Iterable[str], undo: Undo) -> None:
    """Make ``.to(dtype)``, ``.half()`` ... of the pipe and of these components raise; moving them stays as it was.

    A cast to the dtype that a component has already casts nothing, and is allowed. Another pipeline over the same
    components (`from_pipe` makes one, and casts it) is stock, and casts one component after the other. So the other
    components refuse what would end in a refusal, before the first of them is cast.

    On the instances only. A bound method, unlike a closure, follows its owner through ``copy.deepcopy``.
    """
    if callable(getattr(pipe, "to", None)):
        undo.setattr(pipe, "to", Bound(_to, pipe))
    quantized = modules_of(pipe, components)
    for module in quantized.values():
        undo.setattr(module, "to", Bound(_to, module))
        for name in _CASTS:
            undo.setattr(module, name, Bound(functools.partial(_refuse_cast, name), module))
    for name, module in modules_of(pipe).items():
        if name not in quantized and "to" not in vars(module):
            undo.setattr(module, "to", Bound(_to_beside, module))


def _to(self: Any, *args: object, **kwargs: object) -> object:
    """Move a quantized pipe or module; refuse a dtype.

    Raises:
        ErnieAccelError: A dtype was given, and not the one that the quantized weights stand for.
    """
    dtype = _dtype_of(args, kwargs)
    if dtype is None:
        return type(self).to(self, *args, **kwargs)
    if _problem(self, dtype):
        raise _refusal(self, f"to({dtype})")
    if isinstance(self, torch.nn.Module):  # is of that dtype
        args = tuple(a.device if isinstance(a, torch.Tensor) else a for a in args if not isinstance(a, torch.dtype))
        kwargs = {key: value for key, value in kwargs.items() if not isinstance(value, torch.dtype)}
        if not args and not kwargs:
            return self
    return type(self).to(self, *args, **kwargs)


def _to_beside(self: Any, *args: object, **kwargs: object) -> object:
    """Move or cast a component beside a quantized one, but for a pipeline that would be refused half-way.

    Raises:
        ErnieAccelError: A pipeline casts all its components, one of them quantized and of another dtype.
    """
    dtype, caller = _dtype_of(args, kwargs), caller_of_bound()
    pipe = caller.f_locals.get("self") if caller is not None and caller.f_code.co_name == "to" else None
    if dtype is not None and isinstance(getattr(pipe, "components", None), dict) and _problem(pipe, dtype):
        raise _refusal(pipe, f"to({dtype})")
    return type(self).to(self, *args, **kwargs)


def _dtype_of(args: tuple[object, ...], kwargs: dict[str, object]) -> torch.dtype | None:
    given = [a.dtype if isinstance(a, torch.Tensor) else a for a in (*args, *kwargs.values())]
    return next((a for a in given if isinstance(a, torch.dtype)), None)


def _problem(owner: object, dtype: torch.dtype) -> bool:
    """Return whether a cast of a quantized module, or of a pipe that has one, to `dtype` would change it."""
    if isinstance(owner, torch.nn.Module):
        return any(p.is_floating_point() and p.dtype != dtype for p in owner.parameters())
    return any(
        _problem(module, dtype)
        for module in modules_of(cast(Pipeline, owner)).values()
        if getattr(vars(module).get("to"), "function", None) is _to
    )


def _refuse_cast(name: str, self: object, *args: object, **kwargs: object) -> object:
    dtype = _CASTS[name]
    if dtype is not None and not _problem(self, dtype):
        return self
    raise _refusal(self, f"{name}()")


def _refusal(owner: object, call: str) -> ErnieAccelError:
    return ErnieAccelError(
        f"{type(owner).__name__}.{call}: its weights are quantized, and a cast would separate them from their scales. "
        "Move it with .to(device) alone; for another dtype restore(pipe) first, then "
        "optimize(pipe, CastDtype(...), Quantize(...))"
    )
