"""What forwards that are replayed as CUDA graphs have in common: the graphs, and when they are stale."""

from __future__ import annotations

import threading
from typing import ClassVar, Generic

from torch import nn

from ernie_accel.core.captured import Fingerprint
from ernie_accel.core.stand_in import StandInForward
from ernie_accel.models.replays import Capture, Inputs, Replays, Result


class ReplayedForward(StandInForward, Generic[Inputs, Result]):
    """A stand-in that replays graphs of the module's forward. Threads take turns, under its lock.

    A module with other adapters or scales, other weights or other hooks than when it was last seen is captured anew.
    """

    captured: ClassVar[tuple[str, ...]] = ("_graphs", "_seen", "_lock")

    def __init__(self, module: nn.Module, keep: int, capture: Capture | None) -> None:
        """Stand in for the forward of `module`, with graphs of the last `keep` names; see `Replays`."""
        self._keep, self._capture = keep, capture
        super().__init__(module)

    def forget(self) -> None:
        if "_lock" not in vars(self):
            self._lock = threading.RLock()
        with self._lock:
            self._graphs: Replays[Inputs, Result] = Replays(self._keep, self._capture)
            self._seen: Fingerprint | None = None
            self._forget_inputs()

    def _forget_inputs(self) -> None:
        """Free what is kept beside the graphs; called under the lock."""

    def _forget_if_stale(self, now: Fingerprint) -> None:
        """Free everything if the module has changed; called under the lock."""
        if now != self._seen:
            self.forget()
            self._seen = now
