"""Know which pipe changed a component or freed its weights: pipelines share components, and only that one can undo it.

Claims are kept beside the modules, not in them: a deep copy, or what comes out of a pickle, has none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ernie_accel.common.language import said
from ernie_accel.core.carried import carried_report
from ernie_accel.core.components import Pipeline, emptied_components, inside_of, modules_of
from ernie_accel.core.transform import Phase, Transform

#: The slot of the transform that frees weights between calls, and fetches them before they are needed.
FREES_WEIGHTS = "free-after-use"
#: Phases that change weights, which therefore have to be there.
_CHANGE_WEIGHTS = (Phase.DTYPE, Phase.QUANTIZE, Phase.LAYOUT)


class FreedWeights:
    """Base of objects that free a component's weights between calls, by a method among its forward pre-hooks."""


@dataclass(frozen=True)
class _Claim:
    """A transform changed a component for a pipe. This keeps neither alive."""

    pipe: weakref.ref[Pipeline]
    transform: Transform
    module: weakref.ref[torch.nn.Module]


_claims: list[_Claim] = []


def changed_components(pipe: Pipeline, changes: Iterable[str]) -> dict[str, torch.nn.Module]:
    """Return the components that `changes` of a preview name: each begins with a component, or is of the pipe alone."""
    named = {change.partition(" ")[0].partition(".")[0] for change in changes}
    return {name: inside_of(module) for name, module in modules_of(pipe).items() if name in named}


def sharing_problems(pipe: Pipeline, changes: Iterable[str]) -> list[str]:
    """Return one reason for each component among `changes` that another living pipe has changed."""
    reasons = []
    for name, module in changed_components(pipe, changes).items():
        theirs = [claim for claim in _living() if claim.module() is module and claim.pipe() is not pipe]
        if theirs:
            done = ", ".join(repr(claim.transform) for claim in theirs)
            reasons.append(
                said(
                    "{name} is shared with another pipe ({pipe}), for which it was changed by {done}: "
                    "ernie_accel.restore that pipe first, or give this one a copy (copy.deepcopy)",
                    name=name,
                    pipe=type(theirs[0].pipe()).__name__,
                    done=done,
                )
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
    """Return whether a component that `transform` changed for `pipe` has been replaced since."""
    mine = [claim.module() for claim in _living() if claim.pipe() is pipe and claim.transform == transform]
    return bool(mine) and any(
        all(module is not one for one in mine) for module in changed_components(pipe, changes).values()
    )


def is_freed_by_another(pipe: Pipeline, module: torch.nn.Module) -> bool:
    """Return whether the weights of `module`, a component of `pipe`, come and go with the calls of another pipe."""
    hooks = module._forward_pre_hooks.values()
    return not _frees_weights(pipe) and any(isinstance(getattr(hook, "__self__", None), FreedWeights) for hook in hooks)


def freed_elsewhere_reasons(pipe: Pipeline, transform: Transform) -> list[str]:
    """Return why weights that another pipe has freed cannot be changed; those that this pipe freed are filled first."""
    if transform.phase not in _CHANGE_WEIGHTS or _frees_weights(pipe):
        return []
    return [
        said(
            "{name} has no weights at the moment: FreeAfterUse() on another pipe that shares it has freed them; "
            "restore that pipe first",
            name=name,
        )
        for name in emptied_components(pipe, getattr(transform, "components", ()))
    ]


def _frees_weights(pipe: Pipeline) -> bool:
    carried = carried_report(pipe)
    entries = () if carried is None else carried.entries
    return any(entry.applied is not None and entry.step.transform.slot == FREES_WEIGHTS for entry in entries)


def _living() -> list[_Claim]:
    """Return the claims of pipes that still exist; those of others can no longer be undone."""
    return [claim for claim in list(_claims) if claim.pipe() is not None]
