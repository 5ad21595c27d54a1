"""The embedding of the time by code that makes its table of rates on the host, and copies it at every step.

No CUDA graph can hold such a copy, and each waits for the device. So the table is made once, with the positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ernie_accel.kernels.low_rank import is_bare

#: Between the slowest rate and the fastest, as in the code of DiT.
_LARGEST_PERIOD = 10000
#: Times at which another code of the same sinusoids would show.
_PROBES = (0.0, 0.37, 1.0)


class TimeEmbedder(Protocol):
    """Such an embedding as a type checker sees it."""

    frequency_embedding_size: int
    timestep_embedding: Callable[[Tensor, int], Tensor]
    mlp: nn.Sequential


def rates_of(embedder: nn.Module, device: torch.device | str) -> Tensor | None:
    """Return the rates [F / 2], float32, of sinusoids on `device`; None if `embedder` makes other sinusoids.

    Those of a few times are compared with its own, bit by bit, on the CPU.
    """
    known = cast(TimeEmbedder, embedder)
    if not all(hasattr(embedder, name) for name in ("frequency_embedding_size", "timestep_embedding", "mlp")):
        return None
    half = known.frequency_embedding_size // 2
    rates = torch.exp(-math.log(_LARGEST_PERIOD) * torch.arange(half, dtype=torch.float32, device="cpu") / half)
    times = torch.tensor(_PROBES, device="cpu")
    own = known.timestep_embedding(times, known.frequency_embedding_size)
    return rates.to(device) if torch.equal(own, _sinusoids(times, rates)) else None


def embedded_time(embedder: nn.Module, t: Tensor, rates: Tensor | None) -> Tensor:
    """Return the embedded time [B, E] of `t` [B], as `embedder(t)` does; `rates` are those of `rates_of`."""
    if rates is None or not is_bare(embedder):
        return cast(Tensor, embedder(t))
    mlp = cast(TimeEmbedder, embedder).mlp
    return cast(Tensor, mlp(_sinusoids(t, rates).to(cast(nn.Linear, mlp[0]).weight.dtype)))


def _sinusoids(t: Tensor, rates: Tensor) -> Tensor:
    angles = t[:, None].float() * rates[None]
    return torch.cat([angles.cos(), angles.sin()], -1)
