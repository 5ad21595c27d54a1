"""Make a diffusers pipeline fast, lean and trustworthy.

>>> import ernie_accel
>>> pipe = ernie_accel.demo.load()
>>> pipe = ernie_accel.optimize(pipe, preset="exact")
>>> print(ernie_accel.report(pipe))  # doctest: +SKIP
>>> pipe = ernie_accel.restore(pipe)

Everything here is loaded when it is first used: importing the package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import Any

from ernie_accel.common.collecting import without_collecting
from ernie_accel.exports import HOME_OF, SUBPACKAGES, VERSION

__version__ = VERSION

__all__ = sorted((*HOME_OF, *SUBPACKAGES))


def __getattr__(name: str) -> Any:
    if name in HOME_OF:
        with without_collecting():  # torch may have left half a million objects, all in use
            value = getattr(importlib.import_module(HOME_OF[name]), name)
    elif name in SUBPACKAGES:
        value = importlib.import_module(f"ernie_accel.{name}")
    else:
        raise AttributeError(f"module 'ernie_accel' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
