"""Bring up to date what a model's blocks read, before anything runs them: a ControlNet may share some of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

from ernie_accel.core.components import Pipeline, modules_of
from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.core.undo import Undo

#: Methods of diffusers' models that change which adapters are active, or how strong.
_CHANGE_ADAPTERS = (
    *("load_lora_adapter", "add_adapter", "set_adapter", "set_adapters", "disable_adapters", "enable_adapters"),
    *("disable_lora", "enable_lora", "fuse_lora", "unfuse_lora", "unload_lora", "delete_adapters"),
)
Update = Callable[[nn.Module], object]


def update_before_blocks(pipe: Pipeline, model: nn.Module, update: Update, undo: Undo) -> None:
    """Call ``update(model)`` before every forward that reads the adapters of `model`, in place.

    Z-Image's ControlNet runs the refiners of the transformer, earlier in a step than the transformer itself. One that
    is in `pipe` does it before its own forward, too. One that a script puts beside the model later is not known here:
    for its sake, each method that changes adapters ends with it.

    Args:
        pipe: With `model` and what may share its modules.
        model: A component of `pipe`.
        update: A function at module level, which is quick where nothing has changed.
        undo: Takes it back.
    """
    undo.hook_before_forward(model, update)
    parts = set(model.modules())
    for other in modules_of(pipe).values():
        if other is not model and not parts.isdisjoint(other.modules()):
            undo.hook_before_forward(other, _ForAnother(model, update))
    for name in _CHANGE_ADAPTERS:
        if callable(getattr(model, name, None)):
            undo.setattr(model, name, _ThenUpdates(model, name, update))


class _ForAnother:
    """A pre-hook of one model that updates another. A copy or a pickle does not take that other one along."""

    def __init__(self, model: nn.Module, update: Update) -> None:
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._update = update

    def __call__(self, *_: object) -> None:
        """Update it, if it is still there."""
        model = self._model()
        if model is not None:
            self._update(model)

    def __getstate__(self) -> dict[str, object]:
        return {"_model": _nobody, "_update": self._update}  # a copy is not compiled, and products look themselves


def _nobody() -> None:
    """Return no model."""


class _ThenUpdates(StandInMethod):
    """A method that changes adapters, and then what was made of them."""

    def __init__(self, owner: nn.Module, name: str, update: Update) -> None:
        super().__init__(owner, name)
        self._update = update

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what the method gives."""
        result = self.call_inner(*args, **kwargs)
        self._update(self.owner)  # type: ignore[arg-type]
        return result
