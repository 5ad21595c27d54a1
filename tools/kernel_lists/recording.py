"""What this process launches of the package's Triton kernels, and the list of a family in a file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, TypedDict

from ernie_accel.kernels import ahead
from ernie_accel.kernels.ahead import Launched

PACKAGE = "ernie_accel.kernels"
#: Its modules that define Triton kernels.
MODULES = ("decode", "gpu", "group_norm")


class _Kernel(Protocol):
    """A kernel before it is compiled."""

    arg_names: list[str]


class _Function(Protocol):
    """What Triton tells its hooks of a kernel."""

    module: str
    name: str
    jit_function: _Kernel


class _Specialization(TypedDict):
    """What Triton tells its hooks of a launch; keys of constants and attributes are paths, of a parameter (number,)."""

    signature: Mapping[str, object]
    constants: Mapping[tuple[int, ...], object]
    configs: list[Mapping[tuple[int, ...], object]]
    num_warps: int
    num_stages: int


class Recorder:
    """Records which kernels of this package are launched while it is open, whether compiled before or not.

    Attributes:
        found: Each launch that Triton had no binary for in memory, in order; the same kernel may come again.
    """

    def __init__(self) -> None:
        self.found: list[Launched] = []

    def __enter__(self) -> Recorder:
        from triton import JITFunction, knobs

        for name in MODULES:
            module = importlib.import_module(f"{PACKAGE}.{name}")
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()  # Triton calls the hook for what it does not find there
        self._before = knobs.runtime.jit_post_compile_hook
        knobs.runtime.jit_post_compile_hook = self._record
        return self

    def __exit__(self, *_: object) -> None:
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = self._before

    def _record(self, *, fn: _Function, compile: _Specialization, **others: object) -> None:
        package, _, module = fn.module.rpartition(".")
        if package == PACKAGE:
            self.found.append(_launched(module, fn, compile))


def _launched(module: str, fn: _Function, compile: _Specialization) -> Launched:
    names = fn.jit_function.arg_names
    (attributes,) = compile["configs"]
    return Launched(
        module,
        fn.name,
        {name: str(kind) for name, kind in compile["signature"].items()},
        {names[path[0]]: _plain(value) for path, value in compile["constants"].items()},
        {names[path[0]]: bool(value) for path, value in attributes.items()},
        compile["num_warps"],
        compile["num_stages"],
    )


def _plain(value: object) -> float | bool | str | None:
    value = getattr(value, "value", value)  # a tl.constexpr
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def set_of(launched: Iterable[Launched]) -> list[Launched]:
    """Return each kernel once, in order; they hold dictionaries, so they have no hash."""
    return list({json.dumps(asdict(each), sort_keys=True): each for each in launched}.values())


def write_list(family: str, found: Mapping[str, Iterable[Launched]]) -> Path:
    """Write the list of a family, by precision and sorted, each kernel once and on a line of its own; return the file.

    Parameters stay in their order, which is part of what Triton looks for a kernel by.

    Raises:
        OSError: It cannot be written.
    """
    lines = []
    for precision, launched in sorted(found.items()):
        kernels = sorted(json.dumps(asdict(each)) for each in set_of(launched))
        lines.append(f"{json.dumps(precision)}: [\n" + ",\n".join(kernels) + "\n]")
    ahead.LISTS.mkdir(exist_ok=True)
    path = ahead.LISTS / f"{family}.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path
