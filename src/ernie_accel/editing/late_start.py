"""Let one call of a text-to-image pipeline begin in the middle of its schedule, at a picture with noise on it.

The pipeline's own call runs, with everything that was done to it. It asks its scheduler for a schedule and gets the end
of it, and its initial latents, which it has by then, are filled with the noised picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ernie_accel.core.components import Pipeline
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.undo import Undo


class LateStart:
    """One call that begins late.

    Attributes:
        latents: What to pass to the call as its initial latents [B, C, H, W].
    """

    def __init__(
        self,
        pipe: Pipeline,
        encoded: torch.Tensor,
        strength: float,
        noise: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        mask: torch.Tensor | None,
    ) -> None:
        """Prepare a call.

        Args:
            pipe: Its pipeline.
            encoded: The picture's latents [B, C, H, W], in the dtype in which the pipeline draws noise.
            strength: From 0, no steps at all, to 1, all of them.
            noise: Of the shape of `encoded`; None: drawn as the pipeline draws it.
            generator: Where to draw it from.
            mask: What may change, [B, 1, H, W] in [0, 1]; None: everything.
        """
        self._pipe, self._scheduler = pipe, pipe.scheduler
        self._encoded, self._strength, self._mask = encoded, strength, mask
        self._noise, self._generator = noise, generator
        self.latents = torch.empty_like(encoded)
        self._begun = self._stepped = False

    def install(self, undo: Undo) -> None:
        """Replace what the call uses, in place."""
        scheduler, pipe = self._scheduler, self._pipe
        undo.setattr(scheduler, "set_timesteps", _Instead(scheduler.set_timesteps, self._set_timesteps))
        undo.setattr(scheduler, "step", _Instead(scheduler.step, self._step))
        if hasattr(pipe, "progress_bar"):
            undo.setattr(pipe, "progress_bar", _Instead(pipe.progress_bar, self._progress_bar))

    def check_begun(self) -> None:
        """Refuse a picture that the call never looked at.

        Raises:
            ErnieAccelError: The call made no schedule.
        """
        if not self._begun:
            raise ErnieAccelError(
                f"{type(self._pipe).__name__} made no schedule (set_timesteps of its scheduler), so it cannot begin at "
                "a picture"
            )

    def _set_timesteps(self, inner: Callable[..., None], *args: object, **kwargs: object) -> None:
        inner(*args, **kwargs)
        scheduler = self._scheduler
        order = scheduler.order  # two evaluations a step, but in the last, with heun and dpmpp_sde
        steps = -(-len(scheduler.timesteps) // order)
        skipped = steps if self._strength == 0 else min(int(max(steps - steps * self._strength, 0)), steps - 1)
        begin = min(skipped * order, len(scheduler.timesteps))
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[begin:], scheduler.sigmas[begin:]
        if self._noise is None:
            from diffusers.utils.torch_utils import randn_tensor

            like = self._encoded
            self._noise = randn_tensor(like.shape, generator=self._generator, device=like.device, dtype=like.dtype)
        self.latents.copy_(self._noise if begin == 0 else self._noised(0))
        self._begun = True

    def _step(self, inner: Callable[..., Any], *args: object, **kwargs: object) -> object:
        bound = inspect.signature(inner).bind(*args, **kwargs).arguments
        if not self._stepped and bound["sample"].data_ptr() != self.latents.data_ptr():
            raise ErnieAccelError(
                f"{type(self._pipe).__name__} did not begin with the latents that it was given, so it cannot begin at "
                "a picture"
            )
        self._stepped = True
        out = inner(*args, **kwargs)
        if self._mask is None:
            return out
        kept = self._noised(self._scheduler.step_index)
        sample = torch.lerp(kept, out[0].float(), self._mask).to(out[0].dtype)
        if isinstance(out, tuple):
            return (sample, *out[1:])
        out.prev_sample = sample
        return out

    def _noised(self, index: int) -> torch.Tensor:
        """Return the picture at the noise level of one evaluation, in float32; the device is not waited for."""
        if self._noise is None:
            raise LookupError("there is no noise before the schedule is made")
        sigma = self._scheduler.sigmas[index].to(self._encoded.device)
        return torch.lerp(self._encoded.float(), self._noise.float(), sigma)

    def _progress_bar(self, inner: Callable[..., object], iterable: object = None, total: int | None = None) -> object:
        if total is not None:
            total = min(total, len(self._scheduler.timesteps))
        return inner(iterable, total)


class _Instead:
    """A method that another one is called in the place of, with it as the first argument; of the same signature."""

    def __init__(self, inner: Callable[..., object], instead: Callable[..., object]) -> None:
        self._inner, self._instead = inner, instead
        self.__signature__ = inspect.signature(inner)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._instead(self._inner, *args, **kwargs)
