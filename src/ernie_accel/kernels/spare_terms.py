"""Adapters as the spare columns of float8 products hold them: computed for many at once, and kept for the next swap."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_accel.core.captured import comes_and_goes, version_of
from ernie_accel.kernels import ops
from ernie_accel.kernels.reference import FP8_MAX, ROOM

#: Largest factor by which ``x @ down.T`` is stored, for rows of ``down`` of norm one. The values of ``x`` reach
#: FP8_MAX / ROOM, so that four times as much is still not clamped. An adapter that needs more is added to the result.
LARGEST_FACTOR = 8.0
#: A term is kept until the adapters of its product have changed this often without it.
KEPT_CHANGES = 4
#: What a product keeps takes at most this part of its weight's bytes. Rank 64 takes a 30th of a weight of 4096 columns.
KEPT_PART_OF_WEIGHT = 1 / 8
#: Bytes of a float32 operand that are computed at once; all temporaries take about five times as many.
_AT_ONCE_BYTES = 1 << 25


class Term(NamedTuple):
    """What one adapter adds to some output features: ``scale * x @ down.T @ up.T``.

    Attributes:
        down: [rank, K].
        up: [features, rank].
        scale: Of the adapter now.
        start: First of the output features.
    """

    down: Tensor
    up: Tensor
    scale: float
    start: int


class SpareTerm(NamedTuple):
    """A term in float8, as bytes.

    Attributes:
        down: [rank, K], each row by a scale of its own.
        factor: [rank], float32: ``x @ down.T * factor`` is what spare columns of the rows hold.
        up: [features, rank], in units of the weight's scales, with the inverse of the factor.
    """

    down: Tensor
    factor: Tensor
    up: Tensor

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(each.nbytes for each in self)


class Wanted(NamedTuple):
    """A term that is asked for, and the scales [1, N] of the rows of the weight that it is added to."""

    term: Term
    weight_scale: Tensor


def computed(wanted: Sequence[Wanted]) -> list[SpareTerm | None]:
    """Return terms as spare columns hold them; None for one that is too large for them.

    Terms of equal shapes are computed together, and the device is looked at once. The bits of a term do not depend on
    what it is computed with: where values are summed, the sum is exact.
    """
    groups: dict[object, list[int]] = {}
    for i, (term, scale) in enumerate(wanted):
        kind = ((each.shape, each.dtype, each.device) for each in (term.down, term.up))
        groups.setdefault((scale.device, *kind), []).append(i)
    made: list[SpareTerm | None] = [None] * len(wanted)
    order, factors = [], []
    for members in groups.values():
        term = wanted[members[0]].term
        at_once = max(1, _AT_ONCE_BYTES // (4 * max(term.down.numel(), term.up.numel(), 1)))
        for first in range(0, len(members), at_once):
            some = members[first : first + at_once]
            terms, largest_n = _computed_together([wanted[i] for i in some])
            for i, each in zip(some, terms, strict=True):
                made[i] = each
            order += some
            factors.append(largest_n)
    if factors:
        largest = torch.cat([each.to(factors[0].device) for each in factors]).tolist()
        for i, factor in zip(order, largest, strict=True):
            if not factor <= LARGEST_FACTOR:
                made[i] = None
    return made


def _computed_together(wanted: list[Wanted]) -> tuple[list[SpareTerm], Tensor]:
    """Return terms of equal shapes, and the largest factor [N] of each for rows of `down` of norm one."""
    device = wanted[0].weight_scale.device
    down_nrk = torch.stack([term.down for term, _ in wanted]).to(device, torch.float32)
    count, ranks, columns = down_nrk.shape
    values, scale = ops.quantize_rows(down_nrk.flatten(0, 1))
    scale_nr = scale.view(count, ranks)
    # Squares of float8 are multiples of 2 ** -18, so float64 sums them exactly, in whatever order.
    norm_nr = values.double().square().sum(-1).sqrt().float().view(count, ranks) * scale_nr
    scales_n = torch.tensor([term.scale for term, _ in wanted], dtype=torch.float32).to(device)
    rows = [scale[0, term.start : term.start + len(term.up)] for term, scale in wanted]
    unit_nf = torch.stack(rows).reciprocal() * scales_n[:, None]
    up_nfr = torch.stack([term.up for term, _ in wanted]).to(device, torch.float32) * unit_nf[:, :, None]
    largest_nr = torch.linalg.vector_norm(up_nfr, float("inf"), dim=1)
    # The smallest at which `up` is within float8; but not less than at which no row at all is clamped.
    factor_nr = (largest_nr * norm_nr / FP8_MAX).clamp_min(ROOM / math.sqrt(columns))
    stored_nr = factor_nr * scale_nr / norm_nr.clamp_min(torch.finfo(torch.float32).tiny)
    up_nfr = (up_nfr * (norm_nr / factor_nr)[:, None, :]).to(torch.float8_e4m3fn).view(torch.uint8)
    parts = (values.view(torch.uint8).view(count, ranks, columns), stored_nr, up_nfr)
    downs, factors, ups = (_apart(each) for each in parts)
    return list(map(SpareTerm, downs, factors, ups)), factor_nr.amax(1)


def _apart(together: Tensor) -> list[Tensor]:
    """Return copies along the first dimension, each in memory of its own: one that is dropped is freed."""
    if len(together) == 1:
        return [together[0]]
    given = list(together.unbind())
    made = [torch.empty_like(each) for each in given]
    torch._foreach_copy_(made, given)
    return made


@dataclass
class KeptTerm:
    """A term as it was computed, what of, and when it was last used.

    Attributes:
        made: None: it is too large for spare columns.
    """

    made: SpareTerm | None
    sources: tuple[weakref.ref[object], ...]
    facts: tuple[object, ...]
    used: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return 0 if self.made is None else self.made.nbytes

    @property
    def is_there(self) -> bool:
        """Whether what it was made of still is."""
        return all(ref() is not None for ref in self.sources)

    def is_of(self, sources: tuple[object, ...], facts: tuple[object, ...]) -> bool:
        """Return whether it was made of the same, unchanged."""
        return self.facts == facts and all(ref() is each for ref, each in zip(self.sources, sources, strict=True))


class KeptTerms:
    """The last few terms of a product, so that a swap back to one of them is a copy.

    A term is found again while the very same tensors lie in the same memory unchanged (by torch's count of changes in
    place), at the same scale; memory that was freed and given to another tensor is not the same. What comes and goes,
    and tensors of inference mode, whose changes torch does not count, are not kept. Adapters are not kept alive.
    """

    def __init__(self) -> None:
        self._kept: list[KeptTerm] = []
        self._changes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(each.nbytes for each in self._kept)

    def find(self, wanted: Wanted) -> KeptTerm | None:
        """Return what was kept of a term, which counts as used; None if nothing was."""
        sources, facts = _sources(wanted), _facts(wanted)
        for kept in self._kept:
            if kept.is_of(sources, facts):
                kept.used = self._changes
                return kept
        return None

    def keep(self, wanted: Wanted, made: SpareTerm | None) -> None:
        """Keep a term, or that it is too large."""
        sources, facts = _sources(wanted), _facts(wanted)
        moves = comes_and_goes(wanted.term.down) or comes_and_goes(wanted.term.up)
        if not moves and None not in facts:
            self._kept.append(KeptTerm(made, tuple(map(weakref.ref, sources)), facts, self._changes))

    def changed(self, most_bytes: float) -> None:
        """Count a change of adapters, and drop what is gone, was not used for long, or is too much."""
        self._changes += 1
        oldest = self._changes - KEPT_CHANGES
        kept = [each for each in self._kept if each.used >= oldest and each.is_there]
        kept.sort(key=lambda each: each.used)
        total = sum(each.nbytes for each in kept)
        while total > most_bytes:
            total -= kept.pop(0).nbytes
        self._kept = kept

    def clear(self) -> None:
        """Drop everything."""
        self._kept = []


def _sources(wanted: Wanted) -> tuple[object, ...]:
    """Return the tensors that a term is made of, and their memory: it could be freed, and given to another."""
    (down, up, _, _), scale = wanted
    return down, up, down.untyped_storage(), up.untyped_storage(), scale.untyped_storage()


def _facts(wanted: Wanted) -> tuple[object, ...]:
    (down, up, *others), scale = wanted
    versions = version_of(down), version_of(up), version_of(scale)
    places = down.data_ptr(), down.shape, up.data_ptr(), up.shape, scale.data_ptr()
    return (*versions, *others, *places)
