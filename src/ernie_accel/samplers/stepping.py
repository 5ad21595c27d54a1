"""Let a stock flow-matching scheduler use another solver, without another class.

The stock classes of other samplers cannot be swapped in: on the sigmas that flow-matching pipelines pass, most of them
raise, and some silently run a wrong schedule. So the scheduler stays diffusers' ``FlowMatchEulerDiscreteScheduler``,
which makes the checkpoint's sigmas and float timesteps from whatever the pipeline passes. Only ``step`` is replaced, on
the instance. So ``save_pretrained`` writes a stock scheduler with the checkpoint's schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ernie_accel.common.notes import Note
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import Bound, caller_of_bound
from ernie_accel.core.undo import Undo
from ernie_accel.samplers.noise import GivenNoise, RowNoise
from ernie_accel.samplers.solvers import SCHEDULERS, Solver


class _Scheduler(Protocol):
    """Diffusers' ``FlowMatchEulerDiscreteScheduler`` as a type checker sees it: it comes without types."""

    config: Any
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    step_index: int | None
    _step_index: int

    def set_begin_index(self, begin_index: int = 0) -> None: ...

    def set_timesteps(self, num_inference_steps: int | None = None, **settings: object) -> None: ...

    def _init_step_index(self, timestep: float | torch.Tensor) -> None: ...


@dataclass
class Stepping:
    """Which solver a scheduler instance uses.

    Attributes:
        name: A key of `SCHEDULERS`.
        trailing: Use trailing spacing if the pipeline leaves the spacing to the scheduler.
        run: The solver in the middle of a run; None before the first.
        evaluations: Whether the pipeline counts evaluations as its steps, because it passed its own sigmas.
        adjusted: Whether the pipeline's count of steps is being put right (`start_at_a_step`).
    """

    name: str
    trailing: bool = False
    run: Solver | None = None
    evaluations: bool = False
    adjusted: bool = False


STEPPING = Note("stepping", Stepping, "scheduler", "which solver it uses, and the run under way")


def install(scheduler: Any, name: str, trailing: bool) -> None:
    """Let `scheduler`, a stock instance, use the solver called `name`, in place."""
    STEPPING.put(scheduler, Stepping(name, trailing))
    scheduler.set_timesteps = Bound(_set_timesteps, scheduler)
    solver = SCHEDULERS[name]
    if solver is not None:
        scheduler.step = Bound(_step, scheduler)
        scheduler.order = solver.evaluations  # pipelines multiply with it: progress bar, first step of image to image
        if solver.evaluations > 1:
            scheduler.set_begin_index = Bound(_set_begin_index, scheduler)


def start_at_a_step(pipe: object, undo: Undo) -> None:
    """Let image-to-image pipelines begin at the step where stock begins, in place.

    Of the steps that a strength leaves out, they skip ``order`` timesteps each. But where a pipeline passes sigmas, it
    counts what ``set_timesteps`` made of them, evaluations, and skips twice as much, up to all of them.
    """
    stock = getattr(type(pipe), "get_timesteps", None)
    if stock is not None and list(inspect.signature(stock).parameters)[1:2] == ["num_inference_steps"]:
        undo.setattr(pipe, "get_timesteps", Bound(_get_timesteps, pipe))


def _get_timesteps(self: Any, num_inference_steps: int, *args: object, **kwargs: object) -> object:
    """Return what the pipeline's own method does, for the number of steps, not of evaluations."""
    scheduler, stepping = self.scheduler, installed(self.scheduler)
    if stepping is None:
        return type(self).get_timesteps(self, num_inference_steps, *args, **kwargs)
    if stepping.evaluations and num_inference_steps == len(scheduler.timesteps):
        num_inference_steps = -(-num_inference_steps // scheduler.order)  # the last step has one evaluation
    stepping.adjusted = True
    try:
        return type(self).get_timesteps(self, num_inference_steps, *args, **kwargs)
    finally:
        stepping.adjusted = False


def _set_begin_index(self: _Scheduler, begin_index: int = 0) -> None:
    """Begin at this evaluation, in place.

    Raises:
        ErnieAccelError: A pipeline that was not optimized itself, but shares the scheduler, miscounts the steps.
    """
    stepping = STEPPING.required(self)
    caller = caller_of_bound()  # a loop of your own may begin where it likes
    counts = caller is not None and caller.f_code.co_name == "get_timesteps"
    if begin_index > 0 and stepping.evaluations and not stepping.adjusted and counts:
        raise ErnieAccelError(
            f"the scheduler steps by {stepping.name!r}, with two evaluations a step, because another pipe that shares "
            "it was optimized, and this pipe would begin at the wrong one. Optimize this pipe itself: "
            f"optimize(pipe, SwapScheduler({stepping.name!r}))"
        )
    type(self).set_begin_index(self, begin_index)


def installed(scheduler: object) -> Stepping | None:
    """Return the solver that `scheduler` uses, or None for a stock one."""
    return STEPPING.of(scheduler)


def _set_timesteps(
    self: _Scheduler,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    sigmas: Sequence[float] | torch.Tensor | None = None,
    mu: float | None = None,
    timesteps: Sequence[float] | None = None,
) -> None:
    """Make the schedule as stock does (in place), then add the evaluations between its steps, if there are any."""
    stepping = STEPPING.required(self)
    stepping.evaluations = sigmas is not None or timesteps is not None
    if stepping.trailing and sigmas is None and timesteps is None:
        # Stock would take sigmas that are shifted already, and shift them again.
        sigmas = torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps) if num_inference_steps else None
    type(self).set_timesteps(self, num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
    solver = SCHEDULERS[stepping.name]
    if solver is not None and solver.evaluations > 1:
        self.sigmas = torch.tensor(solver.grid(self.sigmas.tolist()), dtype=torch.float32, device=self.sigmas.device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps


def _step(
    self: _Scheduler,
    model_output: torch.Tensor,
    timestep: float | torch.Tensor,
    sample: torch.Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    per_token_timesteps: torch.Tensor | None = None,
    return_dict: bool = True,
) -> object:
    """Run one step: the velocity `model_output` [B, ...] at `sample` [B, ...]. Returns the dtype of `model_output`.

    Args:
        self: The scheduler.
        model_output: The model's velocity.
        timestep: One of ``self.timesteps``, a float.
        sample: The latents.
        s_churn: Has no effect, as in stock; nor have the next three.
        s_tmin: See `s_churn`.
        s_tmax: See `s_churn`.
        s_noise: See `s_churn`.
        generator: Where a stochastic solver draws from; None: from the latents that the run began with.
        per_token_timesteps: A noise level for each token, which stock's own step alone knows; None.
        return_dict: Return diffusers' output object and not a tuple.

    Raises:
        ErnieAccelError: Tokens have noise levels of their own.
        ValueError: `timestep` is an integer (an index), as stock refuses it, or the run is over.
    """
    if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
        raise ValueError(f"step takes one of scheduler.timesteps, which are floats; got the integer {timestep}")
    stepping = STEPPING.required(self)
    if per_token_timesteps is not None:
        raise ErnieAccelError(
            f"the scheduler steps by {stepping.name!r}, and this pipeline gives each token a noise level of its own, "
            "which only the stock step knows: restore(pipe), or use SwapScheduler('euler')"
        )
    if self.step_index is None:
        self._init_step_index(timestep)
        stepping.run = _begin(stepping.name, self.sigmas, sample)
    index = self.step_index
    if stepping.run is None or index is None:
        raise ValueError("the run is over, or was never begun: call set_timesteps first")
    if generator is not None:
        stepping.run.noise = GivenNoise(generator)
    x = stepping.run.advance(index, sample.to(torch.float32), model_output.to(torch.float32))
    self._step_index += 1
    if self.step_index == len(self.timesteps):
        stepping.run = None  # its history is as large as several latents
    x = x.to(model_output.dtype)
    if not return_dict:
        return (x,)
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

    return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x)


def _begin(name: str, sigmas: torch.Tensor, sample: torch.Tensor) -> Solver:
    solver = SCHEDULERS[name]
    if solver is None:
        raise ValueError(f"{name!r} is the scheduler's own step")
    return solver(sigmas.tolist(), RowNoise(sample))
