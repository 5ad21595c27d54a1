"""Change a live pipeline so that every change can be taken back, whatever interrupts: an error, or Ctrl-C anywhere."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

from ernie_accel.core.components import Weight

T = TypeVar("T")
_ABSENT = object()
#: Where an `Undo` registers itself while `recorded` runs; a context variable, so that threads do not mix.
_journal: contextvars.ContextVar[list[Undo] | None] = contextvars.ContextVar("journal", default=None)


class Undo:
    """Record changes to live objects and take them back in reverse order.

    As a context manager it takes everything back if the body raises; after a body that succeeds, the object itself
    is the undo: call it once. That is all a transform needs to be atomic and reversible::

        with Undo() as undo:
            undo.setattr(pipe.vae, "use_slicing", True)
        return Applied(changed=("vae.use_slicing",), undo=undo)

    Every way back is recorded before its change is made, because an interrupt may come between the two.
    """

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []
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
        """Take all changes back, the last one first. If one raises, it and those before it are still to be undone."""
        while self._actions:
            self._actions[-1]()
            self._actions.pop()

    def push(self, action: Callable[[], object]) -> None:
        """Remember `action` as the way back of a change that is about to be made.

        An interrupt may come before the change is made, and may interrupt the action itself, which is then called
        again. So an action must do no harm where there is nothing to undo, and be repeatable.
        """
        self._actions.append(action)

    def give_up(self, reason: str) -> None:
        """Declare that from here on the changes cannot be taken back, and why.

        For a transform that keeps no originals: if it is interrupted, what it has done stays and is reported.
        """
        self.no_way_back = reason

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute in place; the undo restores the old value, or its absence on the instance."""
        old = vars(owner).get(name, _ABSENT)
        if old is _ABSENT and isinstance(owner, torch.nn.Module) and name in _registered(owner):
            old = getattr(owner, name)  # torch keeps these outside the instance's __dict__

        def put_back() -> None:
            if old is not _ABSENT:
                setattr(owner, name, old)
            elif name in vars(owner) or (isinstance(owner, torch.nn.Module) and name in _registered(owner)):
                delattr(owner, name)

        self.push(put_back)
        setattr(owner, name, value)

    def set_data(self, weight: Weight, value: torch.Tensor, keep_on: str | None = None) -> None:
        """Give a parameter or buffer other values, dtype or strides in place; the tensor object stays the same.

        Args:
            weight: Where it lives. It is looked up again by the undo, because ``module.to`` replaces buffers.
            value: What it is to hold, same shape.
            keep_on: Device to keep the old data on until the undo ("cpu" frees the accelerator); default: where it is.
        """
        kept = weight.tensor.data if keep_on is None else weight.tensor.data.to(keep_on)

        def put_back() -> None:
            weight.tensor.data = kept.to(weight.tensor.device)

        self.push(put_back)
        weight.tensor.data = value

    def hook_before_forward(self, module: torch.nn.Module, hook: Callable[..., Any], *, kwargs: bool = False) -> None:
        """Register a forward pre-hook on `module`; with `kwargs` it is called with the keyword arguments, too."""
        self.push(lambda: _unhook(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook))
        module.register_forward_pre_hook(hook, with_kwargs=kwargs)

    def hook_before_state_dict(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """Register a hook on `module` that runs before its state dict is made."""
        self.push(lambda: _unhook(module._state_dict_pre_hooks, {}, hook))
        module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


def recorded(journal: list[Undo], do: Callable[[], T]) -> T:
    """Return ``do()``, with every `Undo` that is made meanwhile in `journal` before it records anything."""

    def run() -> T:
        _journal.set(journal)
        return do()

    return contextvars.copy_context().run(run)  # a copy, so that no interrupt can leave the variable set


def _registered(module: torch.nn.Module) -> set[str]:
    return {*module._modules, *module._parameters, *module._buffers}


def _unhook(hooks: dict[int, Any], with_kwargs: dict[int, bool], hook: Callable[..., Any]) -> None:
    """Remove `hook` by what it is: an interrupt may come before the caller of ``register_...`` holds the handle."""
    for key in [key for key, registered in hooks.items() if registered == hook]:
        del hooks[key]
        with_kwargs.pop(key, None)
