"""Draw one picture and watch it: the latents it began and ended with, the time of its steps, what is not finite."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernie_accel.core.components import CallablePipeline, device_of
from ernie_accel.core.outputs import images_of
from ernie_accel.core.undo import Undo


@dataclass(frozen=True)
class Rendering:
    """One picture.

    Attributes:
        image: [3, H, W] in [0, 1], float32, on the CPU.
        start: The latents the run began with, in the pipe's own dtype, on the CPU.
        latents: The latents it ended with, float32, on the CPU.
        steps: How often the scheduler stepped, that is, the model was evaluated.
        ms_per_step: Milliseconds from one step's end to the next one's, the mean; of the whole call if there is one
            step only.
        seconds: Wall time of the whole call: text encoding, steps and decoding.
    """

    image: torch.Tensor
    start: torch.Tensor
    latents: torch.Tensor
    steps: int
    ms_per_step: float
    seconds: float

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not finite, in words; empty for a sound picture."""
        parts = {"latents": self.latents, "picture": self.image}
        return tuple(f"NaN or Inf in the {name}" for name, tensor in parts.items() if not tensor.isfinite().all())


class _Probe:
    """Stands in for a scheduler's ``step`` during one call. The device is waited for twice: at both ends."""

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        self._scheduler, self._device, self._step = scheduler, device, scheduler.step
        self.start: torch.Tensor | None = None
        self.latents: torch.Tensor | None = None
        self.steps = 0
        self.first_end = self.last_end = 0.0

    def __call__(
        self, model_output: torch.Tensor, timestep: object, sample: torch.Tensor, *args: object, **kwargs: object
    ) -> object:
        if self.start is None:
            self.start = sample.detach().clone()
        out = self._step(model_output, timestep, sample, *args, **kwargs)
        self.steps += 1
        self.latents = out[0]
        if self.steps == 1 or self.steps == len(self._scheduler.timesteps):
            synchronize(self._device)
            self.last_end = time.perf_counter()
            self.first_end = self.first_end or self.last_end
        return out


def render(
    pipe: CallablePipeline, prompt: str, seed: int, call: Mapping[str, object], start: torch.Tensor | None = None
) -> Rendering:
    """Draw `prompt`.

    Args:
        pipe: The pipeline.
        prompt: What to draw.
        seed: Seed of the initial latents, drawn on the CPU; unused where `start` is given.
        call: Further arguments of the call.
        start: The latents to begin with, in the dtype the pipe would draw them in.
    """
    device = device_of(pipe)
    arguments = dict(call) | {"output_type": "pt"}
    if start is not None:
        arguments["latents"] = start.to(device)
    with Undo() as undo:
        probe = _Probe(pipe.scheduler, device)
        undo.setattr(pipe.scheduler, "step", probe)
        synchronize(device)
        begin = time.perf_counter()
        try:
            image = images_of(pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments))[0]
            synchronize(device)
            seconds = time.perf_counter() - begin
        finally:
            undo()
    if probe.start is None or probe.latents is None:
        raise RuntimeError(f"{type(pipe).__name__} never stepped its scheduler")
    spent = (probe.last_end - probe.first_end) / (probe.steps - 1) if probe.steps > 1 else seconds
    return Rendering(
        image=image.detach().float().cpu(),
        start=probe.start.cpu(),
        latents=probe.latents.detach().float().cpu(),
        steps=probe.steps,
        ms_per_step=spent * 1e3,
        seconds=seconds,
    )


def accepts(pipe: CallablePipeline, argument: str) -> bool:
    """Return whether the pipe's call takes `argument`."""
    return argument in inspect.signature(pipe.__call__).parameters


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class PeakMemory:
    """Peak memory of a stretch of work: of the accelerator's allocator, or of this process on Linux."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def kind(self) -> str:
        """What `read` counts."""
        return "allocated on the device" if self._device.type == "cuda" else "resident memory of the process"

    def reset(self) -> None:
        """Begin a stretch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # resets VmHWM: proc(5)

    def read(self) -> int | None:
        """Return the peak in bytes since `reset`; None where this system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._device.type != "cpu" or not _STATUS.exists():
            return None
        line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return int(line.split()[1]) * 1024 if line else None


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
