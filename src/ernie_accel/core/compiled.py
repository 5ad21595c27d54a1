"""See through what a script's own ``torch.compile`` made of modules, and take it off where a transform needs that.

``torch.compile(module)`` returns a wrapper, which hides the class of what it compiles and puts its own name into all
paths. ``module.compile()`` wraps nothing, but goes on calling the forward that it was made for. Plans look at what is
inside. A transform that changes the inside of a component gets it without the wrapper; afterwards the script's compiled
object is put back around it, or, where it cannot compile what is there now, it comes back with the transform's undo.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch

from ernie_accel.common.language import joined, said
from ernie_accel.common.text import summarise
from ernie_accel.core.carried import carried_report, carry
from ernie_accel.core.components import Pipeline, inside_of, is_compiled_wrapper, modules_of
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Applied, Phase, Preview, Transform
from ernie_accel.core.undo import Undo, leave, place_of

#: A module that a script compiled, and its path in the pipe.
_Found: TypeAlias = tuple[str, torch.nn.Module]


def seen_through(pipe: Pipeline) -> Pipeline:
    """Return the pipe as it would be without wrappers of ``torch.compile``: itself, or, where it has some, a view.

    The view is for plans: an object of the same class with the same modules, but for those that hold a wrapper.
    """
    modules = modules_of(pipe)
    if not any(map(_has_wrapper, modules.values())):
        return pipe
    inside = {name: _without_wrappers(module, {}) for name, module in modules.items()}
    view = object.__new__(type(pipe))
    vars(view).update(vars(pipe))
    vars(view).update({name: module for name, module in inside.items() if module is not modules[name]})
    if "components" in vars(pipe):
        vars(view)["components"] = {**pipe.components, **inside}
    carried = carried_report(pipe)
    if carried is not None:
        carry(view, carried)
    return view


def _has_wrapper(module: torch.nn.Module) -> bool:
    """Return whether a module, or one in it, is a wrapper; in a loop, as a plan asks this a hundred times."""
    left = [module]
    while left:
        module = left.pop()
        if is_compiled_wrapper(module):
            return True
        left.extend(child for child in module._modules.values() if child is not None)
    return False


def _without_wrappers(module: torch.nn.Module, known: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """Return a module, or a shallow copy with other children if wrappers are among them."""
    inner = inside_of(module)
    if id(inner) not in known:
        children = {
            name: None if child is None else _without_wrappers(child, known) for name, child in inner._modules.items()
        }
        made = inner
        if any(children[name] is not child for name, child in inner._modules.items()):
            made = object.__new__(type(inner))
            vars(made).update(vars(inner))
            vars(made)["_modules"] = children
        known[id(inner)] = made
    return known[id(inner)]


def previewed(
    pipe: Pipeline, transform: Transform, seen: Pipeline, context: Context, off: frozenset[str] = frozenset()
) -> Preview:
    """Return what a transform would change, with what becomes of the script's own compilation in the note.

    Args:
        pipe: The pipe.
        transform: A transform that it supports.
        seen: The pipe as `seen_through`.
        context: As `Transform.preview` gets it.
        off: Components from which transforms before this one take the compilation off.
    """
    preview = transform.preview(seen, context)
    if not preview.changes:
        return preview
    keeps = transform.keeps_compiled(seen, context)
    found = [each for each in _found(pipe, transform, keeps) if each[0].partition(".")[0] not in off]
    return replace(preview, note=_with_note(preview.note, found, keeps)) if found else preview


def apply_inside(pipe: Pipeline, transform: Transform, context: Context) -> Applied:
    """Apply a transform to what is inside the wrappers of ``torch.compile``; see the module's text."""
    keeps = transform.keeps_compiled(seen_through(pipe), context)
    found, beside = _found(pipe, transform, keeps), _wrappers_beside(pipe, transform)
    if not found and not beside:
        return transform.apply(pipe, context)
    with Undo() as undo, Undo() as meanwhile:
        for path, module in found:
            _take_off(pipe, path, module, meanwhile if keeps else undo)
        for path, module in beside:
            _take_off(pipe, path, module, meanwhile)
        done = transform.apply(pipe, context)
        meanwhile()
        if found:
            done = replace(done, note=_with_note(done.note, found, keeps))
        if not found or keeps or done.undo is None:
            return done
        undo.absorb(done.undo)
    return replace(done, undo=undo)


def _with_note(note: str, found: Sequence[_Found], keeps: bool) -> str:
    names = summarise(tuple(dict.fromkeys(path for path, _ in found)))
    if keeps:
        more = said("your own torch.compile of {names} stays, and compiles it again", names=names)
    else:
        more = said(
            "your own torch.compile of {names} is taken off until restore(pipe), which gives it back; Compile() and "
            "CompileVae() compile what this makes",
            names=names,
        )
    return joined((note, more))


def _found(pipe: Pipeline, transform: Transform, keeps: bool) -> list[_Found]:
    """Return the wrappers in what a transform changes inside, and unless they stay, modules compiled in place.

    By the phase that compiles, parts may have been compiled by this library, which never compiles a whole component.
    """
    modules = modules_of(pipe)
    return [
        (path, module)
        for name in transform.changes_inside
        if name in modules
        for path, module in _compiled_in(modules[name], name)
        if is_compiled_wrapper(module) or (not keeps and (transform.phase < Phase.COMPILE or path == name))
    ]


def _wrappers_beside(pipe: Pipeline, transform: Transform) -> list[_Found]:
    """Return the wrappers in the other components, which stay: a transform sets attributes and hooks there."""
    return [
        (path, module)
        for name, component in modules_of(pipe).items()
        if name not in transform.changes_inside
        for path, module in _compiled_in(component, name)
        if is_compiled_wrapper(module)
    ]


def _compiled_in(module: torch.nn.Module, path: str) -> Iterator[_Found]:
    """Yield wrappers and modules compiled in place with their paths, in which no wrapper has a part."""
    if is_compiled_wrapper(module):
        yield path, module
        module = inside_of(module)
    if is_compiled_in_place(module):
        yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _compiled_in(child, f"{path}.{name}")


def is_compiled_in_place(module: torch.nn.Module) -> bool:
    """Return whether ``module.compile()`` was called; `Residency` keeps something else in the same place."""
    return hasattr(module._compiled_call_impl, "_torchdynamo_orig_callable")


def is_compiled_whole(module: torch.nn.Module) -> bool:
    """Return whether all that a component does is compiled: it is a wrapper, or ``compile()`` was called on it."""
    return is_compiled_wrapper(module) or is_compiled_in_place(module)


def _take_off(pipe: Pipeline, path: str, module: torch.nn.Module, undo: Undo) -> None:
    """Take off a wrapper at `path`, and what ``compile()`` made of a module there, in place."""
    if not is_compiled_wrapper(module):
        undo.setattr(module, "_compiled_call_impl", None)
        return
    inner = inside_of(module)
    component, _, within = path.partition(".")
    if not within:
        undo.push(partial(_put_back, pipe, component, module))
        setattr(pipe, component, inner)
        return
    root, (parent, _, name) = modules_of(pipe)[component], within.rpartition(".")
    undo.push(partial(_put_back_within, root, path, module))
    root.get_submodule(parent)._modules[name] = inner


def _put_back(pipe: Pipeline, component: str, wrapper: torch.nn.Module) -> None:
    now = getattr(pipe, component, None)
    if now is inside_of(wrapper):
        setattr(pipe, component, wrapper)
    elif not isinstance(now, torch.nn.Module) or inside_of(now) is not inside_of(wrapper):
        leave(component, "was replaced after `optimize`, and what torch.compile(...) had returned is not put back")


def _put_back_within(root: torch.nn.Module, path: str, wrapper: torch.nn.Module) -> None:
    within = path.partition(".")[2]
    place = place_of(inside_of(wrapper), root, within)
    if place is None and place_of(wrapper, root, within) is None:
        leave(path, "was replaced after `optimize`, and what torch.compile(...) had returned is not put back")
    elif place is not None and not is_compiled_wrapper(place[0]):
        place[0]._modules[place[1]] = wrapper
