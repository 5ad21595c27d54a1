"""How each sampler steps from one sigma to the next, in the variables of flow matching.

The sample at noise level sigma is ``x = (1 - sigma) * data + sigma * noise``, the model predicts the velocity
``v = noise - data``, and so ``data = x - sigma * v``. The DPM-Solver++ family (arXiv 2211.01095) and UniPC
(arXiv 2302.04867) integrate over the half log signal-to-noise ratio ``lambda = log((1 - sigma) / sigma)``, which is
minus infinity at sigma 1, where every run begins. The limits of all coefficients are finite. They come out right
because the scalars are Python floats, and the formulas below never form ``inf - inf`` or ``inf / inf``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch

from ernie_accel.common.language import said


class Noise(Protocol):
    """A source of standard normal noise."""

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Return the next noise, of the shape, dtype and device of `like`."""


class Solver(ABC):
    """One run of a sampler.

    Class-level facts:
        evaluations: Model evaluations per step. With two, a run of n steps evaluates 2n - 1 times: the last step,
            to sigma 0, needs one.
        stochastic: Whether it adds noise on the way.
        advice: A hint for the receipt.
    """

    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False
    advice: ClassVar[str] = ""

    def __init__(self, sigmas: Sequence[float], noise: Noise) -> None:
        """Begin a run.

        Args:
            sigmas: Noise levels of the evaluations as `grid` gives them, then 0; falling, from at most 1.
            noise: Where a stochastic sampler draws from.
        """
        self.sigmas = sigmas
        self.noise = noise

    @classmethod
    def grid(cls, sigmas: Sequence[float]) -> list[float]:
        """Return the noise levels of all evaluations, then 0, for a schedule of n steps `sigmas`, then 0."""
        return list(sigmas)

    @abstractmethod
    def advance(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the sample for the next model evaluation.

        Args:
            i: Number of the evaluation, from 0; a run may begin later (image to image).
            x: Sample [B, ...] at ``sigmas[i]``, float32 or float64.
            v: The model's velocity there.
        """


class EulerAncestral(Solver):
    """Ancestral Euler for rectified flows: step down further than required, then add noise. Keeps the variance.

    As ``sample_euler_ancestral_RF`` of ComfyUI with eta 1, which its "euler_ancestral" becomes for such models, and as
    ``LTXEulerAncestralRFScheduler`` of diffusers.
    """

    stochastic = True
    advice = said("adds noise at every step, so it needs more steps than euler")

    def advance(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, t = self.sigmas[i], self.sigmas[i + 1]
        data = x - s * v
        if t == 0:
            return data
        down = t * t / s
        scale = (1 - t) / (1 - down)
        renoise = math.sqrt(max(0.0, t * t - (scale * down) ** 2))
        return scale * (x - (s - down) * v) + renoise * self.noise.draw(x)


class LCM(Solver):
    """Predict the data, then add noise up to the next level: the multistep sampling of consistency models.

    As ``FlowMatchLCMScheduler`` and ``FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)`` of diffusers.
    Source: arXiv 2303.01469, algorithm 1.
    """

    stochastic = True
    advice = said("only sound for distilled (few-step) checkpoints; others lose variance (contrast, texture)")

    def advance(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, t = self.sigmas[i], self.sigmas[i + 1]
        data = x - s * v
        return data if t == 0 else (1 - t) * data + t * self.noise.draw(x)


class Heun(Solver):
    """Heun's method on the velocity: try an Euler step, then take the mean of the slopes at both ends."""

    evaluations = 2
    advice = said("two evaluations per step: n steps cost 2n - 1")

    def __init__(self, sigmas: Sequence[float], noise: Noise) -> None:
        super().__init__(sigmas, noise)
        self._start: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def grid(cls, sigmas: Sequence[float]) -> list[float]:
        first, *rest, last = sigmas
        return [first, *(sigma for sigma in rest for _ in range(2)), last]

    def advance(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self._start is None:
            if self.sigmas[i + 1] > 0:
                self._start = x, v
            return x + (self.sigmas[i + 1] - self.sigmas[i]) * v
        (x_start, v_start), self._start = self._start, None
        return x_start + (self.sigmas[i] - self.sigmas[i - 1]) * (v_start + v) / 2


class DPMpp2M(Solver):
    """DPM-Solver++(2M), multistep: one evaluation per step, the slope of the data from the last two."""

    advice = said("pays from about 20 steps on; at 8 it differs little from euler")

    def __init__(self, sigmas: Sequence[float], noise: Noise) -> None:
        super().__init__(sigmas, noise)
        self._past: list[tuple[float, torch.Tensor]] = []  # (lambda, data), the newest last

    def advance(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, t = self.sigmas[i], self.sigmas[i + 1]
        data = x - s * v
        self._past = [*self._past[-2:], (_lambda(s), data)]
        if t == 0:
            return data
        return self._update(x, s, t, self._slopes(_lambda(t), self._highest(i)))

    def _highest(self, i: int) -> int:
        """Return the highest order that evaluation `i` may use."""
        return 2

    def _slopes(self, to: float, highest: int) -> tuple[torch.Tensor, ...]:
        """Return the data and its divided differences, in units of the step to lambda `to`, newest first."""
        (here, data), *past = reversed(self._past)
        if not past or highest == 1:
            return (data,)
        h = to - here
        r0 = (here - past[0][0]) / h  # inf after a first step from sigma 1: the difference below is then 0
        first = (data - past[0][1]) / r0
        if len(past) == 1 or highest == 2:
            return data, first
        r1 = (past[0][0] - past[1][0]) / h
        older = (past[0][1] - past[1][1]) / r1
        return data, first + r0 / (r0 + r1) * (first - older), (first - older) / (r0 + r1)

    def _update(self, x: torch.Tensor, s: float, t: float, slopes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        h = _lambda(t) - _lambda(s)
        phi = math.expm1(-h)
        x = t / s * x - (1 - t) * phi * slopes[0]
        if len(slopes) == 2:
            return x - (1 - t) * phi / 2 * slopes[1]
        if len(slopes) == 3:
            return x + (1 - t) * ((phi / h + 1) * slopes[1] - ((phi + h) / h**2 - 0.5) * slopes[2])
        return x


class DPMpp3M(DPMpp2M):
    """DPM-Solver++(3M), multistep: the slope and the curvature of the data from the last three evaluations."""

    advice = said("pays from about 20 steps on; at 8 it differs little from euler, and dpmpp_2m is steadier")

    def _highest(self, i: int) -> int:
        # Below 15 steps the last but one step is of second order, for stability, as in diffusers.
        steps = len(self.sigmas) - 1
        return 2 if steps < 15 and i == steps - 2 else 3


class DPMpp2MSDE(DPMpp2M):
    """SDE-DPM-Solver++(2M): the multistep method for the stochastic equation with the same distributions."""

    stochastic = True
    advice = said("adds noise at every step, so it needs 20 or more steps")

    def _update(self, x: torch.Tensor, s: float, t: float, slopes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        data = slopes[0] if len(slopes) == 1 else slopes[0] + slopes[1] / 2
        return _sde_step(x, data, s, t, self.noise.draw(x))


class DPMppSDE(Solver):
    """DPM-Solver++ (SDE) with two evaluations a step: k-diffusion's "dpmpp_sde", at the middle in lambda.

    The noise of the two stages is that of one Brownian path: the first stage's noise, carried on, is part of the
    whole step's.
    """

    evaluations = 2
    stochastic = True
    advice = said("adds noise at every step; two evaluations per step: n steps cost 2n - 1")

    def __init__(self, sigmas: Sequence[float], noise: Noise) -> None:
        super().__init__(sigmas, noise)
        self._start: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def grid(cls, sigmas: Sequence[float]) -> list[float]:
        *steps, last = sigmas
        return [sigma for s, t in pairwise(steps) for sigma in (s, _middle(s, t))] + [steps[-1], last]

    def advance(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, t = self.sigmas[i], self.sigmas[i + 1]
        data = x - s * v
        if t == 0:
            return data
        fresh = self.noise.draw(x)
        if self._start is None:
            self._start = x, fresh
            return _sde_step(x, data, s, t, fresh)
        (x_start, before), self._start = self._start, None
        start = self.sigmas[i - 1]
        h1, h2 = _lambda(s) - _lambda(start), _lambda(t) - _lambda(s)
        carried, own = math.exp(-h2) * math.sqrt(-math.expm1(-2 * h1)), math.sqrt(-math.expm1(-2 * h2))
        whole = (carried * before + own * fresh) / math.hypot(carried, own)
        return _sde_step(x_start, data, start, t, whole)


class UniPC(Solver):
    """UniPC-2 with B(h) = e^h - 1 ("bh2"): each evaluation also corrects the step that led to it."""

    advice = said("pays from about 20 steps on; at 8 it differs little from euler")

    def __init__(self, sigmas: Sequence[float], noise: Noise) -> None:
        super().__init__(sigmas, noise)
        self._past: list[tuple[float, torch.Tensor]] = []  # (sigma, data), the newest last
        self._last: tuple[torch.Tensor, int] | None = None  # the sample that the last step left from, and its order

    def advance(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, t = self.sigmas[i], self.sigmas[i + 1]
        data = x - s * v
        if self._last is not None:
            x = self._corrected(s, data, *self._last)
        self._past = [*self._past[-1:], (s, data)]
        if t == 0:
            return data
        order = len(self._past)
        self._last = x, order
        first_order, phi, slope = self._first_order(x, t, order)
        return first_order if slope is None else first_order - (1 - t) * phi / 2 * slope

    def _first_order(self, x: torch.Tensor, t: float, order: int) -> tuple[torch.Tensor, float, torch.Tensor | None]:
        """Return the first-order step from the newest evaluation to `t`, e^-h - 1, and the data's slope, if any."""
        s, data = self._past[-1]
        h = _lambda(t) - _lambda(s)
        phi = math.expm1(-h)
        moved = t / s * x - (1 - t) * phi * data
        if order == 1:
            return moved, phi, None
        older, older_data = self._past[0]
        return moved, phi, (older_data - data) / ((_lambda(older) - _lambda(s)) / h)

    def _corrected(self, t: float, data: torch.Tensor, x: torch.Tensor, order: int) -> torch.Tensor:
        """Return the step to `t` once more, now that the data there is known."""
        moved, phi, slope = self._first_order(x, t, order)
        change = data - self._past[-1][1]
        if slope is None:
            return moved - (1 - t) * phi / 2 * change
        s, older = self._past[-1][0], self._past[0][0]
        h = _lambda(t) - _lambda(s)
        r = (_lambda(older) - _lambda(s)) / h  # -inf after a first step from sigma 1: the older weight is then 0
        b1 = (phi / -h - 1) / phi
        b2 = 2 * ((phi / -h - 1) / -h - 0.5) / phi
        weight = (b1 - b2) / (1 - r)
        return moved - (1 - t) * phi * (weight * slope + (b1 - weight) * change)


def _lambda(sigma: float) -> float:
    """Return half the log signal-to-noise ratio; -inf at sigma 1, +inf at sigma 0."""
    if sigma >= 1:
        return -math.inf
    return math.inf if sigma == 0 else math.log((1 - sigma) / sigma)


def _middle(s: float, t: float) -> float:
    """Return the sigma in the middle of a step in lambda.

    From sigma 1 there is none; there it is the mean lambda under the weight e^(2 lambda) that the step gives to the
    data, which keeps the step second order.
    """
    to = _lambda(t)
    middle = to - 0.5 if s >= 1 else (_lambda(s) + to) / 2
    return 1 / (1 + math.exp(middle))


def _sde_step(x: torch.Tensor, data: torch.Tensor, s: float, t: float, noise: torch.Tensor) -> torch.Tensor:
    """Solve the stochastic equation from sigma `s` to `t` > 0 for constant data (SDE-DPM-Solver++, first order)."""
    h = _lambda(t) - _lambda(s)
    gone = -math.expm1(-2 * h)
    return t / s * math.exp(-h) * x + (1 - t) * gone * data + t * math.sqrt(gone) * noise


#: Name -> solver; None is the pipeline's own Euler step.
SCHEDULERS: Mapping[str, type[Solver] | None] = MappingProxyType(
    {
        "euler": None,
        "euler_ancestral": EulerAncestral,
        "heun": Heun,
        "unipc": UniPC,
        "dpmpp_2m": DPMpp2M,
        "dpmpp_2m_sde": DPMpp2MSDE,
        "dpmpp_3m": DPMpp3M,
        "dpmpp_sde": DPMppSDE,
        "lcm": LCM,
    }
)
