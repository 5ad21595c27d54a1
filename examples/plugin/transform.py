"""A transform: hide the bar that counts the denoising steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ernie_accel import Applied, Context, Effect, Phase, Preview, Transform, Undo


@dataclass(frozen=True, repr=False)
class HideProgress(Transform):
    """Hide the bar that counts the denoising steps.

    Attributes:
        leave: Keep the bar of a call on the screen, should somebody show it again.
    """

    phase = Phase.CALL
    slot = "progress-bar"
    effect = Effect.EXACT

    leave: bool = field(default=False, kw_only=True)

    def unsupported(self, pipe: Any, context: Context) -> list[str]:
        return [] if hasattr(pipe, "progress_bar") else [f"{type(pipe).__name__} has no progress bar"]

    def preview(self, pipe: Any, context: Context) -> Preview:
        hidden = getattr(pipe, "_progress_bar_config", {}).get("disable", False)
        return Preview(() if hidden else ("progress bar",), note="it is hidden already" if hidden else "")

    def apply(self, pipe: Any, context: Context) -> Applied:
        with Undo() as undo:
            undo.setattr(pipe, "_progress_bar_config", {"disable": True, "leave": self.leave})
        return Applied(("progress bar",), undo=undo)
