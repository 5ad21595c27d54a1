"""One transform of a plan: what it would do here, or why it cannot."""

from __future__ import annotations

from dataclasses import dataclass, field

from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Preview, Transform


@dataclass(frozen=True)
class Step:
    """One transform of a plan.

    Attributes:
        transform: The transform.
        reasons: Why it cannot run; empty if it can.
        preview: What it would change; None if it cannot run.
        planned: What the pipe would be afterwards; None if nothing would change.
        in_place: Whether an earlier `optimize` dealt with it and it stays.
    """

    transform: Transform
    reasons: tuple[str, ...]
    preview: Preview | None
    in_place: bool = False
    planned: PlannedPipe | None = field(default=None, repr=False, compare=False)

    @property
    def verdict(self) -> str:
        """Return "in place", "apply", "nothing to do" (the pipe is already so) or "unsupported"."""
        if self.in_place:
            return "in place"
        if self.preview is None:
            return "unsupported"
        return "apply" if self.preview.changes else "nothing to do"
