"""Choose the next token of each row: greedy, or by temperature, top-k and top-p with a random number per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters apply in this order, as in transformers.

    Attributes:
        temperature: Divides the logits, > 0.
        top_k: Only so many of the most probable tokens; 0 for all.
        top_p: Only the most probable tokens that together reach this probability, in (0, 1].
    """

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; 1.0 with top_p 1.0 decodes greedily")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def draws_for(seeds: Sequence[int], tokens: int) -> Tensor:
    """Return uniform random numbers in [0, 1), one for each row and token [B, tokens], on the CPU.

    They depend on a row's seed alone: not on its neighbours, the device, or the global random numbers.
    """
    rows = [torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).float()


def choose(logits_bv: Tensor, sampling: Sampling | None, draw_b: Tensor) -> Tensor:
    """Return the next token of each row [B], int64, without waiting for the device.

    Args:
        logits_bv: Unnormalized log-probabilities of the vocabulary.
        sampling: None for the most probable token.
        draw_b: A uniform random number in [0, 1) for each row; the token is found by inverse transform.
    """
    if sampling is None:
        return logits_bv.argmax(-1)
    scores = logits_bv.float() / sampling.temperature
    kept = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    best_bk, tokens_bk = scores.topk(kept)  # sorted, the most probable first
    probability = best_bk.softmax(-1)
    reached = probability.cumsum(-1)
    # A token stays while those before it do not reach top_p; the first one always stays.
    probability = probability.where(reached - probability < sampling.top_p, 0.0)
    reached = probability.cumsum(-1)
    index = torch.searchsorted(reached, draw_b[:, None] * reached[:, -1:], right=True)
    last = (probability > 0).sum(-1, keepdim=True) - 1
    return tokens_bk.gather(1, index.minimum(last)).squeeze(1)
