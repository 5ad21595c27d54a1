"""Every error the library raises, in one tree.

::

    ErnieAccelError
    ├── UnknownNameError (ValueError)     an unknown preset, transform, device, scheduler ...
    ├── ConflictError (ValueError)        two transforms for one slot in one call
    ├── UnsupportedError                  a plan that cannot run here; carries the plan
    ├── ApplyError                        a transform failed; everything was undone; carries the report
    ├── RestoreError                      the original cannot be restored; says why
    ├── SavedPipelineError                a folder that `load` cannot read, or a pipe that `save` cannot write
    ├── PictureError (ValueError)         a picture, mask or strength to draw from is unusable (editing/files.py)
    ├── MissingExtraError (ImportError)   an optional package is needed; names the pip extra
    ├── BatchInputError (ValueError)      rows with mistakes, all of them with their lines   (batch/errors.py)
    ├── BatchOutputError                  pictures cannot be written where they should go    (batch/errors.py)
    ├── BatchChangedError                 a job cannot go on with another input or settings  (batch/errors.py)
    └── MetricsServerError                a batch's metrics cannot be served where asked     (batch/errors.py)

Beside it there is one warning, RestoreWarning: `restore` left alone what was replaced after `optimize`.

Messages repeat the input, say what was found, what was expected and the fix; the same facts are attributes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from ernie_accel.common.language import say

__all__ = [
    "ApplyError",
    "ConflictError",
    "ErnieAccelError",
    "MissingExtraError",
    "RestoreError",
    "RestoreWarning",
    "SavedPipelineError",
    "UnknownNameError",
    "UnsupportedError",
]


class ErnieAccelError(Exception):
    """Base of all errors of this library."""


class UnknownNameError(ErnieAccelError, ValueError):
    """An unknown name, with the valid ones.

    Attributes:
        kind: What was looked for, as a noun ("preset").
        name: The name as given.
        valid: The names that exist.
        note: What else helps to choose.
        suggestion: The valid name that was probably meant; None if none is close. Given as "", none is looked for.
    """

    def __init__(
        self, kind: str, name: object, valid: Iterable[str], *, note: str = "", suggestion: str | None = None
    ) -> None:
        self.kind, self.name, self.valid, self.note = kind, name, tuple(valid), note
        self.suggestion = (closest(str(name), self.valid) if suggestion is None else suggestion) or None
        hint = f" Did you mean {self.suggestion!r}?" if self.suggestion else ""
        super().__init__(f"Unknown {kind} {name!r}.{hint} Valid: {', '.join(self.valid)}.{note and ' ' + note}")


def closest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name closest to `name`, whatever its case and separators ("RTX 4090"); None if none is close."""
    by_letters = {_letters(each): each for each in valid}
    close = difflib.get_close_matches(_letters(name), by_letters, n=1)
    return by_letters[close[0]] if close else None


def _letters(name: str) -> str:
    return re.sub(r"[\s_.-]", "", name.lower())


class ConflictError(ErnieAccelError, ValueError):
    """Two transforms were given for one slot.

    Attributes:
        transforms: The transforms that exclude each other.
    """

    def __init__(self, slot: str, transforms: Iterable[object]) -> None:
        self.slot, self.transforms = slot, tuple(transforms)
        both = " and ".join(map(repr, self.transforms))
        super().__init__(f"{both} exclude each other: a pipe has one {slot!r} slot. Pass only one of them.")


class RefusedPlan(Protocol):
    """What an error says of a `Plan`."""

    @property
    def title(self) -> str: ...
    @property
    def preset(self) -> object | None: ...
    @property
    def blockers(self) -> tuple[str, ...]: ...
    @property
    def problems(self) -> Mapping[Any, tuple[str, ...]]: ...

    def problem_lines(self) -> Iterator[str]:
        """Yield all that stands in the way, one reason a line."""


class UnsupportedError(ErnieAccelError):
    """A plan cannot run here.

    Attributes:
        plan: The refused `Plan`; ``plan.problems`` lists the transforms with their reasons.
    """

    def __init__(self, plan: RefusedPlan) -> None:
        self.plan = plan
        super().__init__(str(self))

    def __str__(self) -> str:
        """Return the heading, all reasons, and what to do."""
        can_skip, has_preset = not self.plan.blockers, self.plan.preset is not None
        if can_skip and has_preset:
            fix = say("Fix these, choose another preset, or pass on_unsupported='skip'.")
        elif can_skip:
            fix = say("Fix these, or pass on_unsupported='skip'.")
        else:
            fix = say("Fix these, or choose another preset.") if has_preset else say("Fix these.")
        heading = say("Cannot apply {title}:", title=self.plan.title)
        return "\n".join([heading, *self.plan.problem_lines(), fix])


class ApplyError(ErnieAccelError):
    """A transform failed while it was applied; what had been applied before it was undone.

    Attributes:
        transform: The transform that failed.
        report: What had been applied until then, a `Report`.
        left: The transforms that stay applied because they have no undo; empty: the pipe is as it was before.
    """

    def __init__(self, transform: object, reason: str, report: object, left: tuple[object, ...] = ()) -> None:
        self.transform, self.report, self.left = transform, report, left
        stays = ", ".join(map(repr, left))
        state = f"{stays} stays applied: no undo." if stays else "The pipe is as it was before this call."
        super().__init__(f"{transform!r} failed: {reason}\n{state}\n{report}")


class RestoreError(ErnieAccelError):
    """The original pipe cannot be restored.

    Attributes:
        transform: The transform that has no undo.
        reason: Why it has none.
    """

    def __init__(self, transform: object, reason: str) -> None:
        self.transform, self.reason = transform, reason
        super().__init__(f"Cannot undo {transform!r}: {reason}. Load the pipeline again to start from the original.")


class RestoreWarning(UserWarning):
    """`restore` found something that was replaced after `optimize`, and left it as it is; the rest was undone."""


class SavedPipelineError(ErnieAccelError):
    """A folder is not what `save` writes, is damaged, or needs another version; or a pipe cannot be saved.

    Attributes:
        folder: The folder.
        reason: What was found.
    """

    def __init__(self, folder: object, reason: str) -> None:
        self.folder, self.reason = str(folder), reason
        super().__init__(f"{folder}: {reason}")


class MissingExtraError(ErnieAccelError, ImportError):
    """An optional package is not installed.

    Attributes:
        package: The package to import.
        extra: The pip extra that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{package} is not installed: pip install 'ernie-accel[{extra}]'")
