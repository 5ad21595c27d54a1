"""Say what was going on when a call runs out of device memory, and what would fit."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import nn

from ernie_accel.core.components import PROMPT_COMPONENTS, Pipeline, denoisers_of, device_of, modules_of
from ernie_accel.core.context import Context
from ernie_accel.core.hardware import GIB
from ernie_accel.core.out_of_memory import DeviceOutOfMemoryError
from ernie_accel.core.stand_in import Bound
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import Arguments, Call, wrap_call

_ASKED = re.compile(r"Tried to allocate ([\d.]+ [KMG]iB)")
_CHANGES = ("errors of calls that run out of memory",)


@dataclass(frozen=True, repr=False)
class ExplainOutOfMemory(Transform):
    """Turn an out-of-memory error of a call into one that says in which stage, and what would fit.

    It names the stage, what was asked for, what this process and others hold, and what was predicted. It frees what the
    failed call has left, so that the next call finds the memory. Code that catches ``torch.OutOfMemoryError`` goes on
    to work.

    Pays:
        Always; it costs nothing while there is enough memory. The memory planner adds it.

    Attributes:
        predicted: Bytes that were predicted for a call; None: nothing was.
    """

    phase: ClassVar[Phase] = Phase.CALL
    slot: ClassVar[str] = "out-of-memory"
    effect: ClassVar[Effect] = Effect.EXACT

    predicted: int | None = field(default=None, kw_only=True, metadata=MACHINE_LOCAL)

    def __post_init__(self) -> None:
        if self.predicted is not None and self.predicted < 1:
            raise ValueError(f"predicted must be at least 1 byte, got {self.predicted}")

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return Preview(_CHANGES)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        with Undo() as undo:
            wrap_call(pipe, "out_of_memory", Bound(partial(_explaining, predicted=self.predicted), pipe), undo)
        return Applied(_CHANGES, undo=undo)


def _explaining(pipe: Pipeline, call: Call, arguments: Arguments, *, predicted: int | None) -> object:
    try:
        return call(arguments)
    except DeviceOutOfMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        text = "\n".join(_lines(pipe, arguments, error, predicted))
        traceback.clear_frames(error.__traceback__)  # they hold what the call had computed so far
    if device_of(pipe).type == "cuda":
        torch.cuda.empty_cache()
    raise DeviceOutOfMemoryError(text)


def _lines(pipe: Pipeline, arguments: Arguments, error: torch.OutOfMemoryError, predicted: int | None) -> Iterator[str]:
    asked = _ASKED.search(str(error))
    where = _stage(pipe, error.__traceback__)
    yield f"out of memory{where}: {f'{asked.group(1)} more were asked for' if asked else str(error)}."
    device, others = device_of(pipe), 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        others = max(0, total - free - held)
        yield (
            f"  On the card, {_gib(total)}: this process has {_gib(used)} in use and {_gib(held - used)} cached; other "
            f"processes, the driver and the desktop {_gib(others)}; {_gib(free)} are free."
        )
        if predicted is not None:
            yield f"  The plan predicted that {_gib(predicted)} would be needed; {_gib(total - others)} can be had."
            room = int((total - others) / GIB * 10) / 10
            if predicted > total - others:
                yield f"  What would fit: load it with memory='{room}GiB', or end what else runs on the card."
    elif predicted is not None:
        yield f"  The plan predicted that {_gib(predicted)} would be needed."
    yield f"  What needs less: {', '.join(_smaller(arguments))}."


def _smaller(arguments: Arguments) -> Iterator[str]:
    pictures = arguments.get("num_images_per_prompt") or 1
    prompts = arguments.get("prompt")
    if pictures > 1 or (isinstance(prompts, list) and len(prompts) > 1):
        yield "fewer pictures at once"
    width, height = arguments.get("width") or 1024, arguments.get("height") or 1024
    yield f"smaller pictures than {width}x{height}"
    yield "TileVae() where decoding fails"
    yield "a smaller memory= when the pipe is loaded, which keeps fewer weights on the device"


def _stage(pipe: Pipeline, trace: TracebackType | None) -> str:
    """Say in which stage an error was raised: the innermost component that was at work."""
    modules = modules_of(pipe)
    owner = {id(part): name for name, module in modules.items() for part in module.modules()}
    found = ""
    for frame, _ in traceback.walk_tb(trace):
        here: Any = frame.f_locals.get("self")
        here = here if isinstance(here, nn.Module) else getattr(here, "module", None)
        found = owner.get(id(here), found)
    if not found:
        return ""
    if found in PROMPT_COMPONENTS:
        return f" while {found} {'enhanced prompts' if found == 'pe' else 'encoded prompts'}"
    return f" while {found} {'denoised' if found in denoisers_of(pipe) else 'decoded'}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"
