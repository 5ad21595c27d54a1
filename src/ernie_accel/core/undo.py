"""Change a live pipeline so that every change can be undone, even after an error or Ctrl-C at any line."""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import MethodType, TracebackType
from typing import TypeAlias, TypeVar

import torch

from ernie_accel.common.notes import Note
from ernie_accel.core.components import Weight
from ernie_accel.core.errors import RestoreWarning
from ernie_accel.core.library_hooks import library_hooks

T = TypeVar("T")
#: An attribute that was set: identity of its owner, name, identity of the value before.
Replaced: TypeAlias = tuple[int, str, int]
_ABSENT = object()
#: Values that are the same when they compare equal; anything else is the same when it is the same object.
_PLAIN = (bool, int, float, str, type(None))
_NOWHERE = torch.nn.Module()
#: Where an `Undo` registers itself while `recorded` runs; a context variable, so that threads do not mix.
_journal: contextvars.ContextVar[list[Undo] | None] = contextvars.ContextVar("journal", default=None)


class Undo:
    """Record changes to live objects and undo them in reverse order.

    As a context manager it undoes everything if the body raises; after a body that succeeds, the object itself is the
    undo: call it once. That is all a transform needs to be atomic and reversible::

        with Undo() as undo:
            undo.setattr(pipe.vae, "use_slicing", True)
        return Applied(changed=("vae.use_slicing",), undo=undo)

    Each undo is recorded before its change is made, because an interrupt may come between the two.

    A script may have changed the same places since. So each undo looks before it writes: a change is undone where it is
    now, under a LoRA or a hook if need be. What other code has replaced since stays, with a `RestoreWarning` that names
    it; if that would lose something, `objections` says so before anything is undone.
    """

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []
        self._objections: list[Callable[[], str | None]] = []
        self._still_there: list[Callable[[set[Replaced]], bool]] = []
        #: (owner, name, the value that it replaced) of every attribute that was set.
        self._replaced: list[tuple[object, str, object]] = []
        self.no_way_back: str | None = None
        journal = _journal.get()
        if journal is not None:
            journal.append(self)

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.no_way_back is None:
            self()

    def __call__(self) -> None:
        """Undo all changes, last first. If one raises, it and those before it remain to be undone."""
        while self._actions:
            self._actions[-1]()
            self._actions.pop()

    def push(self, action: Callable[[], object]) -> None:
        """Remember `action` as the undo of a change that is about to be made.

        An interrupt may come before the change is made, and may interrupt the action itself, which is then called
        again. So an action must do no harm where there is nothing to undo, and be repeatable.
        """
        self._actions.append(action)

    def give_up(self, reason: str) -> None:
        """Declare that from here on the changes cannot be undone, and why.

        For a transform that keeps no originals: if it is interrupted, what it has done stays and is reported.
        """
        self.no_way_back = reason

    def object_if(self, objection: Callable[[], str | None]) -> None:
        """Register a check to run before anything is undone; it returns why that would lose something, or None."""
        self._objections.append(objection)

    def objections(self) -> Iterator[str]:
        """Yield why the changes cannot be undone now without losing what was done to the pipe since."""
        for objection in self._objections:
            reason = objection()
            if reason is not None:
                yield reason

    @property
    def replaced(self) -> frozenset[Replaced]:
        """What it set attributes in the place of: identities, which keep nothing alive."""
        return frozenset((id(owner), name, id(old)) for owner, name, old in self._replaced)

    def is_in_place(self, beneath: Iterable[Replaced] = ()) -> bool:
        """Return whether the changes are still there, as far as this is known: nothing has replaced them since.

        What later transforms have `replaced` (`beneath`) is still there, beneath their changes, and so is what this one
        set and then set again.
        """
        covered = {*beneath, *self.replaced}
        return all(still_there(covered) for still_there in self._still_there)

    def absorb(self, undo: Callable[[], object]) -> None:
        """Undo what another undo does, before all that is recorded so far, and object and watch as that one does."""
        self.push(undo)
        objections = getattr(undo, "objections", None)
        if objections is not None:
            self.object_if(lambda: next(iter(objections()), None))
        is_in_place = getattr(undo, "is_in_place", None)
        if is_in_place is not None:
            self._still_there.append(is_in_place)

    def watch(self, still_there: Callable[[], bool]) -> None:
        """Have `is_in_place` ask `still_there`, too: for a change that is recorded by `push`."""
        self._still_there.append(lambda beneath: still_there())

    def setattr(self, owner: object, name: str, value: object) -> None:
        """Set an attribute in place; the undo restores the old value, or its absence on the instance.

        If `value` is the forward of a module, and accelerate or diffusers have put a hook around it since, the hook
        stays and calls the old forward.
        """
        old = _held(owner, name)

        def put_back() -> None:
            now = _held(owner, name)
            if _is_same(now, value):
                _set_or_delete(owner, name, old)
            elif not (now is _ABSENT or _is_same(now, old) or put_below_hooks(owner, name, value, old)):
                leave(f"{type(owner).__name__}.{name}", f"is now {_shown(now)}, which was set after `optimize`")

        self.push(put_back)
        self._still_there.append(
            lambda beneath: (
                _is_same(_held(owner, name), value)
                or has_below_hooks(owner, name, value)
                or (id(owner), name, id(value)) in beneath
            )
        )
        self._replaced.append((owner, name, old))
        setattr(owner, name, value)

    def attach(self, note: Note[T], owner: object, value: T) -> None:
        """Let `owner` have `value` as its `note`, in place."""
        self.setattr(owner, note.attribute, value)

    def restore_attribute(self, owner: object, name: str) -> None:
        """Remember an attribute that other code is about to set; the undo restores its value, or its absence."""
        old = _held(owner, name)
        self.push(lambda: _set_or_delete(owner, name, old))

    def put_module(
        self,
        root: torch.nn.Module,
        path: str,
        new: torch.nn.Module,
        give_back: Callable[[torch.nn.Module], torch.nn.Module],
    ) -> None:
        """Replace the module at `path` by `new`; the undo puts the old one where `new` is by then.

        A LoRA replaces a layer by its own and keeps the old one as its base; unloading it puts the base back.

        Args:
            root: The component.
            path: Of the module within it.
            new: What takes its place.
            give_back: Called by the undo with `new`; returns the old module, ready to run where `new` runs.
        """
        parent, _, name = path.rpartition(".")
        old = root.get_submodule(path)

        def put_back() -> None:
            place = place_of(new, root, path)
            if place is not None:
                holder, child = place
                holder._modules[child] = give_back(new)
                _tell_adapter(holder)
            elif place_of(old, root, path) is None:
                leave(f"{type(root).__name__}.{path}", "was replaced after `optimize`")

        self.push(put_back)
        self._still_there.append(lambda beneath: place_of(new, root, path) is not None)
        root.get_submodule(parent)._modules[name] = new

    def set_data(self, weight: Weight, value: torch.Tensor, keep_on: str | None = None) -> None:
        """Give a parameter or buffer another dtype or other strides in place; the tensor object stays the same.

        Values that changed since (a LoRA was fused, another checkpoint loaded) stay; the undo gives them the old dtype.
        If other code has cast the weight since (``pipe.to(torch.float16)``), its dtype stays, as the cast of all other
        weights does.

        Args:
            weight: Where it lives. It is looked up again by the undo, because ``module.to`` replaces buffers.
            value: What it is to hold, same shape.
            keep_on: Device to keep the old data on until the undo ("cpu" frees the accelerator); default: where it is.
        """
        kept = weight.tensor.data if keep_on is None else weight.tensor.data.to(keep_on)
        dtype = value.dtype

        def put_back() -> None:
            now = getattr(weight.owner, weight.name, None)
            if not isinstance(now, torch.Tensor) or now.shape != kept.shape:
                leave(weight.path, "was replaced after `optimize`")
                return
            here = kept.to(now.device)
            as_now = here if now.dtype == dtype else here.to(now.dtype)
            if now.device.type != "meta" and not _same_values(now.data, here.to(dtype).to(now.dtype)):
                now.data = torch.empty_like(as_now).copy_(now.data)
                leave(weight.path, f"got other values after `optimize` (a LoRA fused?), now {now.dtype} again")
                return
            now.data = as_now

        self.push(put_back)
        weight.tensor.data = value

    def hook_before_forward(
        self, module: torch.nn.Module, hook: Callable[..., object], *, kwargs: bool = False
    ) -> None:
        """Register a forward pre-hook on `module`; with `kwargs` it is called with the keyword arguments, too.

        Without, it also runs before those methods that call the forward themselves, which runs no hooks.
        """
        self.push(lambda: _unhook(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook))
        module.register_forward_pre_hook(hook, with_kwargs=kwargs)
        for name in _WITHOUT_HOOKS if not kwargs else ():
            if callable(getattr(type(module), name, None)):
                method = HookedMethod.of(module, name)
                self.push(partial(method.drop, hook))
                method.add(hook)

    def hook_before_state_dict(self, module: torch.nn.Module, hook: Callable[..., object]) -> None:
        """Register a hook on `module` that runs before its state dict is made."""
        self.push(lambda: _unhook(module._state_dict_pre_hooks, {}, hook))
        module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


#: Methods of transformers by which their authors' pipelines call ``self.forward(...)``.
_WITHOUT_HOOKS = ("forward_with_cfg",)


class HookedMethod:
    """A method of one module that runs hooks first. Copies and pickles of the module have their own."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._inner: Callable[..., object] | None = vars(module).get(name)
        self._hooks: list[Callable[..., object]] = []

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what the method gives."""
        for hook in tuple(self._hooks):
            hook(self._module, ())
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        found: object = getattr(type(self._module), self._name)(self._module, *args, **kwargs)
        return found

    @classmethod
    def of(cls, module: torch.nn.Module, name: str) -> HookedMethod:
        """Return the one that `module` has in place of its method, or a new one, which `add` puts there."""
        found = vars(module).get(name)
        return found if isinstance(found, cls) else cls(module, name)

    def add(self, hook: Callable[..., object]) -> None:
        """Have `hook` run before the method, in place."""
        self._hooks.append(hook)
        if vars(self._module).get(self._name) is not self:
            setattr(self._module, self._name, self)

    def drop(self, hook: Callable[..., object]) -> None:
        """Undo `add`, in place; beneath what a script has put there since, only the hook goes."""
        self._hooks = [each for each in self._hooks if each != hook]
        if not self._hooks and vars(self._module).get(self._name) is self:
            if self._inner is None:
                delattr(self._module, self._name)
            else:
                setattr(self._module, self._name, self._inner)


def recorded(journal: list[Undo], do: Callable[[], T]) -> T:
    """Return ``do()``, with every `Undo` that is made meanwhile in `journal` before it records anything."""

    def run() -> T:
        _journal.set(journal)
        return do()

    return contextvars.copy_context().run(run)  # a copy, so that no interrupt can leave the variable set


def place_of(module: torch.nn.Module, root: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str] | None:
    """Return the parent of `module` within `root`, and its name there; it is looked for at `path` first."""
    place, there = root, root
    for name in path.split("."):
        place, there = there, there._modules.get(name) or _NOWHERE
    candidates = [place] if there is module else [*there.modules(), *root.modules()]
    for candidate in candidates:
        for child, held in candidate._modules.items():
            if held is module:
                return candidate, child
    return None


def _registered(module: torch.nn.Module) -> set[str]:
    return {*module._modules, *module._parameters, *module._buffers}


def _held(owner: object, name: str) -> object:
    """Return what `owner` itself, not its class, holds under `name`; `_ABSENT` if nothing."""
    if name not in vars(owner) and isinstance(owner, torch.nn.Module) and name in _registered(owner):
        return getattr(owner, name)  # torch keeps these outside the instance's __dict__
    return vars(owner).get(name, _ABSENT)


def _set_or_delete(owner: object, name: str, old: object) -> None:
    if old is not _ABSENT:
        setattr(owner, name, old)
    elif _held(owner, name) is not _ABSENT:
        delattr(owner, name)


def _is_same(one: object, other: object) -> bool:
    return one is other or (isinstance(one, _PLAIN) and type(one) is type(other) and bool(one == other))


def _hooks_around(owner: object, name: str) -> Iterator[tuple[object, str]]:
    """Yield the places where accelerate's and diffusers' hooks on a module keep the forward that they go around."""
    if name != "forward" or not isinstance(owner, torch.nn.Module):
        return
    yield owner, "_old_forward"  # accelerate/hooks.py, add_hook_to_module
    registry = library_hooks(owner).diffusers
    for reference in getattr(registry, "_fn_refs", ()):  # diffusers/hooks/hooks.py, HookRegistry.register_hook
        yield reference, "forward"
        yield reference, "original_forward"


def has_below_hooks(owner: object, name: str, value: object) -> bool:
    """Return whether hooks of accelerate or diffusers go around `value`."""
    return any(vars(place).get(attribute) is value for place, attribute in _hooks_around(owner, name))


def put_below_hooks(owner: object, name: str, value: object, old: object = _ABSENT) -> bool:
    """Have hooks that go around `value` go around `old` instead, or around the method of the class.

    Returns:
        Whether there were any.
    """
    found = False
    for place, attribute in _hooks_around(owner, name):
        if vars(place).get(attribute) is value:
            setattr(place, attribute, MethodType(getattr(type(owner), name), owner) if old is _ABSENT else old)
            found = True
    return found


def _tell_adapter(holder: torch.nn.Module) -> None:
    """Let a LoRA layer that was made for torchao's weights merge into plain ones again."""
    if type(holder).__name__ == "TorchaoLoraLinear" and hasattr(holder, "lora_A"):  # peft/tuners/lora/torchao.py
        holder.__class__ = next(cls for cls in type(holder).__mro__ if cls.__name__ == "Linear")


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, _PLAIN) else f"a {type(value).__name__}"


def leave(where: str, why: str) -> None:
    """Warn that an undo leaves something as it is."""
    warnings.warn(f"restore left {where} as it is: it {why}", RestoreWarning, stacklevel=3)


def _unhook(hooks: dict[int, Callable[..., object]], with_kwargs: dict[int, bool], hook: Callable[..., object]) -> None:
    """Remove `hook` by what it is: an interrupt may come before the caller of ``register_...`` holds the handle."""
    for key in [key for key, registered in hooks.items() if registered == hook]:
        del hooks[key]
        with_kwargs.pop(key, None)
