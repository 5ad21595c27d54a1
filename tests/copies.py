"""Copies of a pipeline, at a fifth of what building it anew takes, or ``copy.deepcopy``."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch

_Build = TypeVar("_Build", bound=Callable[..., Any])
_AS_THEY_ARE = (int, float, str, bool, type(None), type, FunctionType, torch.dtype, torch.device, torch.Size)


def built_once(build: _Build) -> _Build:
    """Have a function that begins with ``torch.manual_seed(0)`` build once in a process, and return copies of that.

    The random numbers go on as after building.
    """
    built: dict[Any, tuple[Any, torch.Tensor]] = {}

    @functools.wraps(build)
    def copied(**arguments: Any) -> Any:
        key = (*sorted(arguments.items()), torch.get_default_dtype(), torch.empty(0).device)
        if key not in built:
            with torch.inference_mode(False):
                built[key] = build(**arguments), torch.get_rng_state()
        pipe, state = built[key]
        torch.manual_seed(0)
        torch.set_rng_state(state)
        return copy_of(pipe)

    return copied  # type: ignore[return-value]


def copy_of(pipe: Any) -> Any:
    """Return what ``copy.deepcopy`` does, which takes most of its time for the empty dictionaries of modules."""
    return _Copier().object(pipe)


class _Copier:
    def __init__(self) -> None:
        self._made: dict[int, Any] = {}  # as `deepcopy` keeps them

    def object(self, given: Any) -> Any:
        made = object.__new__(type(given))
        self._made[id(given)] = made
        state = vars(made)
        for name, value in vars(given).items():
            state[name] = value if type(value) in _AS_THEY_ARE else self._value(value)
        return made

    def _value(self, value: Any) -> Any:
        found = self._made.get(id(value))
        if found is not None:
            return found
        kind = type(value)
        if kind in (dict, OrderedDict):
            made = self._made[id(value)] = kind()
            for key, each in value.items():
                made[key] = each if type(each) in _AS_THEY_ARE else self._value(each)
            return made
        if isinstance(value, torch.nn.Module):
            return self.object(value)
        if kind is torch.nn.Parameter:
            made = torch.nn.Parameter(value.detach().clone(), value.requires_grad)
            self._made[id(value)] = made
            return made
        return copy.deepcopy(value, self._made)
