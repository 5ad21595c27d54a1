"""Say what was going on when a call runs out of device memory, and what would fit."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from ernie_accel.common.language import said
from ernie_accel.common.text import human_gib
from ernie_accel.core.components import PROMPT_COMPONENTS, Pipeline, denoisers_of, device_of, modules_of
from ernie_accel.core.context import Context
from ernie_accel.core.hardware import GIB
from ernie_accel.core.out_of_memory import DeviceOutOfMemoryError
from ernie_accel.core.stand_in import Bound
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import Arguments, Call, wrap_call

_ASKED = re.compile(r"Tried to allocate ([\d.]+ [KMG]iB)")
_CHANGES = (said("errors of calls that run out of memory"),)


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
            last = _Last()
            for name, module in modules_of(pipe).items():
                works = getattr(module, "decoder", None) if name == "vae" else module
                if isinstance(works, nn.Module):
                    undo.hook_before_forward(works, _Mark(last, name))
            around = partial(_explaining, predicted=self.predicted, last=last)
            wrap_call(pipe, "out_of_memory", Bound(around, pipe), undo)
        return Applied(_CHANGES, undo=undo)


@dataclass
class _Last:
    """The component that was called last."""

    component: str | None = None


@dataclass(frozen=True)
class _Mark:
    """A hook before the forward of a component."""

    last: _Last
    component: str

    def __call__(self, *_: object) -> None:
        self.last.component = self.component


def _explaining(pipe: Pipeline, call: Call, arguments: Arguments, *, predicted: int | None, last: _Last) -> object:
    last.component = None
    try:
        return call(arguments)
    except DeviceOutOfMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        text = "\n".join(_lines(pipe, arguments, str(error), last.component, predicted))
        traceback.clear_frames(error.__traceback__)  # they hold what the call had computed so far
        error.__traceback__ = None
    if device_of(pipe).type == "cuda":
        torch.cuda.empty_cache()
    raise DeviceOutOfMemoryError(text)


def _lines(
    pipe: Pipeline, arguments: Arguments, error: str, component: str | None, predicted: int | None
) -> Iterator[str]:
    asked, where = _ASKED.search(error), _words(pipe, component)
    yield f"out of memory{where}: {f'{asked.group(1)} more were asked for' if asked else error}."
    device, others = device_of(pipe), 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        others = max(0, total - free - held)
        yield (
            f"  On the card, {human_gib(total)}: this process has {human_gib(used)} in use and "
            f"{human_gib(held - used)} cached; other processes, the driver and the desktop {human_gib(others)}; "
            f"{human_gib(free)} are free."
        )
        if predicted is not None:
            left = total - others
            yield f"  The plan predicted that {human_gib(predicted)} would be needed; {human_gib(left)} can be had."
            room = int(left / GIB * 10) / 10
            if predicted > left:
                yield f"  What would fit: load it with memory='{room}GiB', or end what else runs on the card."
    elif predicted is not None:
        yield f"  The plan predicted that {human_gib(predicted)} would be needed."
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


def _words(pipe: Pipeline, component: str | None) -> str:
    """Say in which stage an error was raised: what the component did that was called last."""
    if component is None:
        return ""
    if component in PROMPT_COMPONENTS:
        return f" while {component} {'enhanced' if component == 'pe' else 'encoded'} prompts"
    return f" while {component} {'denoised' if component in denoisers_of(pipe) else 'decoded'}"
