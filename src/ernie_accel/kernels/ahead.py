"""Compile the Triton kernels of a known family while everything else that its first picture needs goes on.

Triton compiles a kernel when it is first launched, one after the other: 6 s of a first picture on an H200. What a
family launches is known: ``launched/FAMILY.json`` lists it, as ``python -m tools.kernel_lists`` recorded it. `start`
hands that list to a process of its own, which needs neither a GPU nor the weights, and compiles several kernels at once
into Triton's cache on disk. A launch finds its kernel there; one that is missing is compiled then, as ever.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from ernie_accel.common.cores import cores

#: The environment variable that, if it is "0", turns compiling ahead off.
VARIABLE = "ERNIE_ACCEL_COMPILE_AHEAD"
#: On fewer cores, importing and compiling would slow each other down. A quarter of the cores compile.
FEWEST_CORES = 4
#: Where the lists are, FAMILY.json each; `tools.kernel_lists` writes them.
LISTS = Path(__file__).parent / "launched"
_PACKAGE = "ernie_accel.kernels"
#: What this process has begun to compile: a second load finds it, whichever thread it is in.
_begun: set[tuple[str, str, tuple[int, int], str | None]] = set()
_beginning = threading.Lock()
#: How Triton writes that a pointer or a number is a multiple of 16.
_MULTIPLE = [["tt.divisibility", 16]]


class _Compiled(Protocol):
    """What Triton makes of a kernel."""

    src: object
    metadata: object


@dataclass(frozen=True)
class Launched:
    """A kernel as it was launched, apart from its tensors: what Triton compiles one binary for.

    Attributes:
        module: The module of this package that defines it.
        kernel: Its name there.
        signature: Each parameter's type, as Triton spells it: "*bf16", "i32", "fp32", "constexpr".
        constants: The values of those that are "constexpr": numbers, booleans, None, or the name of a dtype ("bf16").
        multiples: For parameters whose value or address Triton looks at: whether it is a multiple of 16.
        warps: Warps per program (Triton's ``num_warps``).
        stages: Iterations of a loop that overlap (Triton's ``num_stages``).
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, float | bool | str | None]
    multiples: dict[str, bool]
    warps: int
    stages: int


def listed(family: str) -> dict[str, tuple[Launched, ...]]:
    """Return what a family launches, by precision ("bf16" or "fp8"); nothing for a family without a list."""
    path = LISTS / f"{family}.json"
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {precision: tuple(Launched(**each) for each in of) for precision, of in data.items()}


def start(family: str, precision: str, capability: tuple[int, int]) -> subprocess.Popen[bytes] | None:
    """Begin to compile what a family launches, in a process beside this one.

    Args:
        family: Its name.
        precision: "bf16" or "fp8": of its transformer's products.
        capability: Of the CUDA device, as (9, 0).

    Returns:
        The process, which nobody needs to wait for; None where there is nothing to compile, or nothing to do it with:
        an unknown family, no Triton, no interpreter of its own (as in a frozen program), fewer than four cores, or
        `ERNIE_ACCEL_COMPILE_AHEAD` set to "0"; and where this process has begun it before.
    """
    if os.environ.get(VARIABLE) == "0" or cores() < FEWEST_CORES:
        return None
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    launched = listed(family).get(precision, ())
    if importlib.util.find_spec("triton") is None or not launched:
        return None
    work_of = (family, precision, capability, os.environ.get("TRITON_CACHE_DIR"))
    with _beginning:
        if work_of in _begun:
            return None
        _begun.add(work_of)
    # It looks for modules where this process does, and not in the folder it runs in, which may be anybody's.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {_PACKAGE} import ahead; ahead.main()"
    work = json.dumps({"capability": capability, "launched": [asdict(each) for each in launched]})
    # Whatever program that turns out to be, it does not begin another.
    environment, nowhere = {**os.environ, "CUDA_VISIBLE_DEVICES": "", VARIABLE: "0"}, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere
        )
    except OSError:  # no more processes allowed, say: kernels are compiled when they are launched
        with _beginning:
            _begun.discard(work_of)  # a later load may be allowed one
        return None
    # The thread ends with the process; the process outlives this one by seconds at most.
    threading.Thread(target=process.communicate, args=(work.encode(),), name=f"{__name__}.start", daemon=True).start()
    return process


def compile_all(launched: Iterable[Launched], capability: tuple[int, int], workers: int = 1) -> int:
    """Compile kernels into Triton's cache, several at once; return how many compiled.

    One that does not compile for this device, or with this version of Triton, is left out: it may never be launched.
    If a worker dies, as for want of memory, those that are not compiled by then are left out.

    Args:
        launched: The kernels.
        capability: Of the CUDA device, as (9, 0).
        workers: Processes to compile in; below 2, or where processes cannot be forked, this one does it.
    """
    launched = list(launched)
    for name in {each.module for each in launched}:
        _module(name)  # before the fork, so that workers share it
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    workers = min(workers, len(launched))
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return sum(_compiled(each, capability) for each in launched)
    # multiprocessing's own pool would wait for ever for what a dead worker was given.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        under_way = [pool.submit(_compiled, each, capability) for each in launched]
        return sum(each.exception() is None and each.result() for each in under_way)


def _compiled(launched: Launched, capability: tuple[int, int]) -> bool:
    """Return whether a kernel compiled, into Triton's cache."""
    try:
        compiled = compile_one(launched, capability)
    except Exception:
        return False
    with contextlib.suppress(Exception):
        _build_launcher(compiled)
    return True


def _build_launcher(compiled: _Compiled) -> None:
    """Have Triton build the C code that launches kernels, into the same cache: 3 s of a first picture on an H200.

    This may fail, without CUDA's driver or with another version of Triton; a launch then builds what it needs.
    """
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    CudaUtils()
    CudaLauncher(compiled.src, compiled.metadata)


def compile_one(launched: Launched, capability: tuple[int, int]) -> _Compiled:
    """Compile a kernel for a CUDA device, which need not be here, as launching it would; return Triton's result.

    Raises:
        Exception: Whatever Triton raises for a kernel or an option that it does not know, or cannot compile.
    """
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as compile_source

    kernel = getattr(_module(launched.module), launched.kernel)
    at = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    constants = {
        at[name]: getattr(tl, _DTYPES[value]) if isinstance(value, str) else value
        for name, value in launched.constants.items()
    }
    # In the order of the parameters, as Triton lists them: the text of this dictionary is part of its key.
    attributes = {at[name]: _MULTIPLE if multiple else [] for name, multiple in launched.multiples.items()}
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = make_backend(target).parse_options({"num_warps": launched.warps, "num_stages": launched.stages})
    source = ASTSource(kernel, launched.signature, constants, attributes)
    compiled: _Compiled = compile_source(source, target=target, options=options.__dict__)
    return compiled


#: Triton's names of dtypes as constants.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{_PACKAGE}.{name}")


def main() -> None:
    """Compile what standard input names, as JSON: the work of the process that `start` begins."""
    work = json.load(sys.stdin)
    major, minor = work["capability"]
    compile_all((Launched(**each) for each in work["launched"]), (major, minor), cores() // 4)
