"""Know which pipe changed a component: pipelines share components, and only the one that changed it can undo that.

Kept beside the modules, not in them: a deep copy or what comes out of a pickle was changed by nobody here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ernie_accel.core.components import Pipeline, modules_of
from ernie_accel.core.transform import Transform


@dataclass(frozen=True)
class _Claim:
    """A transform changed a component for a pipe. Neither is kept alive by that."""

    pipe: weakref.ref[Pipeline]
    transform: Transform
    module: weakref.ref[torch.nn.Module]


_claims: list[_Claim] = []


def changed_components(pipe: Pipeline, changes: Iterable[str]) -> dict[str, torch.nn.Module]:
    """Return the components that `changes` of a preview name: each begins with a component, or is of the pipe alone."""
    named = {change.partition(" ")[0].partition(".")[0] for change in changes}
    return {name: module for name, module in modules_of(pipe).items() if name in named}


def sharing_problems(pipe: Pipeline, changes: Iterable[str]) -> list[str]:
    """Return one reason for each component among `changes` that another living pipe has changed."""
    reasons = []
    for name, module in changed_components(pipe, changes).items():
        theirs = [claim for claim in _living() if claim.module() is module and claim.pipe() is not pipe]
        if theirs:
            done = ", ".join(repr(claim.transform) for claim in theirs)
            reasons.append(
                f"{name} is shared with another pipe ({type(theirs[0].pipe()).__name__}), for which it was changed by "
                f"{done}: ernie_accel.restore that pipe first, or give this one a copy (copy.deepcopy)"
            )
    return reasons


def claim(pipe: Pipeline, transform: Transform, changes: Iterable[str]) -> None:
    """Note that `transform` changes, for `pipe`, the components that `changes` name."""
    modules = changed_components(pipe, changes).values()
    mine = [_Claim(weakref.ref(pipe), transform, weakref.ref(module)) for module in modules]
    _claims[:] = [*_living(), *mine]  # a service that loads pipes again and again keeps nothing of the old ones


def release(pipe: Pipeline, transform: Transform) -> None:
    """Note that what `transform` changed for `pipe` was undone."""
    _claims[:] = [claim for claim in _living() if claim.pipe() is not pipe or claim.transform != transform]


def was_replaced(pipe: Pipeline, transform: Transform, changes: Iterable[str]) -> bool:
    """Return whether a component that `transform` changed for `pipe` is another one by now."""
    mine = [claim.module() for claim in _living() if claim.pipe() is pipe and claim.transform == transform]
    return bool(mine) and any(
        all(module is not one for one in mine) for module in changed_components(pipe, changes).values()
    )


def _living() -> list[_Claim]:
    """Return the claims of pipes that are still there; nobody can undo those of others."""
    return [claim for claim in list(_claims) if claim.pipe() is not None]
