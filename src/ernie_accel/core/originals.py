"""The weights that layers were quantized from, which wait in host memory, and the LoRAs that are merged into them."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ernie_accel.common.notes import Note

_log = logging.getLogger(__name__)


class MergedTerm(NamedTuple):
    """What one adapter has added to some output features of a weight, in host memory.

    Attributes:
        start: First of the output features.
        name: Of the adapter; None if it stays whatever becomes of the adapter: it was unloaded or deleted meanwhile.
        down: [R, K].
        up: [features, R].
        scale: Factor of ``up @ down``.
    """

    start: int
    name: str | None
    down: Tensor
    up: Tensor
    scale: float

    def delta(self, device: torch.device) -> Tensor:
        """Return scale * up @ down, [features, K], in the adapter's dtype, rounded as PEFT's own layers round it."""
        dtype = self.up.dtype
        on_host = device.type == "cpu" and dtype in (torch.float16, torch.bfloat16)
        up, down = (part.to(device, torch.float32 if on_host else dtype) for part in (self.up, self.down))
        return (up @ down * self.scale).to(dtype)


class Original:
    """What one layer was quantized from: that of ``restore``, not a copy, and nothing is ever written into it.

    A copy of the layer has none: once the layer it was copied from is restored, scripts may write into that weight.

    Attributes:
        weight: [N, K].
        bias: [N], or None.
        where: The device on which it was quantized.
        terms: What is merged into the quantized weight by now.
        bits: A sum of all bits of the layer since that was made anew; None: it was not.
        waits: Whether the weight is to be made anew later, for all layers that it is computed for at once.
        sqnr_db: SQNR in dB of the weight that was made anew last, against the merged one.
    """

    def __init__(self, linear: nn.Linear, where: torch.device) -> None:
        self.weight = linear.weight.data
        self.bias = None if linear.bias is None else linear.bias.data
        self.where = where
        self.terms: tuple[MergedTerm, ...] = ()
        self.bits: tuple[str, int] | None = None
        self.waits = False
        self.sqnr_db: float | None = None

    def has(self, start: int, names: Collection[str]) -> bool:
        """Return whether all these adapters of the features from `start` on are among the terms."""
        return set(names) <= {term.name for term in self.terms if term.start == start}

    def settled(self, start: int, merged: Iterable[str]) -> tuple[MergedTerm, ...]:
        """Return the terms; those of the features from `start` on which PEFT no longer has as `merged` have no name."""
        still = set(merged)
        return tuple(
            term if term.start != start or term.name in still else term._replace(name=None) for term in self.terms
        )

    def merged(self) -> Tensor:
        """Return the weight [N, K] with all terms, in its dtype, on the device where it was quantized."""
        weight = self.weight.to(self.where, copy=bool(self.terms))
        for term in self.terms:
            delta = term.delta(self.where)
            weight[term.start : term.start + len(delta)] += delta
        return weight

    def give_back(self, linear: nn.Linear) -> None:
        """Let `linear`, which it was made of, have the weight with all terms; calling it twice changes nothing more."""
        if self.terms:
            linear.weight.data = self.merged().to(self.weight.device)

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def _nothing() -> None:
    """Stand for an original in a pickle."""


ORIGINAL = Note("original", Original, "linear layer", "what it was quantized from, if that is kept")


def log_made_anew(name: str, kind: str, found: list[float]) -> None:
    """Say what it cost to merge a LoRA into weights of this kind: the SQNR in dB of each; nothing if there are none."""
    if found:
        worst, middle = min(found), statistics.median(found)
        _log.info(
            "%s: %d %s weights were made anew, with an SQNR of %.1f dB, %.1f at least, against the merged ones",
            name,
            len(found),
            kind,
            middle,
            worst,
        )
