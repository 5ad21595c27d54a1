"""Change a live pipeline so that every change can be taken back, also when a transform fails half-way."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ernie_accel.core.components import Weight

_ABSENT = object()


class Undo:
    """Record changes to live objects and take them back in reverse order.

    As a context manager it takes everything back if the body raises; after a body that succeeds, the object itself
    is the undo: call it once. That is all a transform needs to be atomic and reversible::

        with Undo() as undo:
            undo.setattr(pipe.vae, "use_slicing", True)
        return Applied(changed=("vae.use_slicing",), undo=undo)
    """

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self()

    def __call__(self) -> None:
        """Take all changes back, the last one first. If one raises, it and those before it are still to be undone."""
        while self._actions:
            self._actions[-1]()
            self._actions.pop()

    def push(self, action: Callable[[], object]) -> None:
        """Remember `action` as the way back of a change just made (or about to be made).

        An action that raised is called again by the next undo, so it must be repeatable.
        """
        self._actions.append(action)

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute in place; the undo restores the old value, or its absence on the instance."""
        old = vars(owner).get(name, _ABSENT)
        if old is _ABSENT and isinstance(owner, torch.nn.Module) and name in {**owner._modules, **owner._parameters}:
            old = getattr(owner, name)  # torch keeps these outside the instance's __dict__
        self.push(lambda: delattr(owner, name) if old is _ABSENT else setattr(owner, name, old))
        setattr(owner, name, value)

    def set_data(self, weight: Weight, value: torch.Tensor, keep_on: str | None = None) -> None:
        """Give a parameter or buffer other values, dtype or strides in place; the tensor object stays the same.

        Args:
            weight: Where it lives. It is looked up again by the undo, because ``module.to`` replaces buffers.
            value: What it shall hold, same shape.
            keep_on: Device to keep the old data on until the undo ("cpu" frees the accelerator); default: where it is.
        """
        kept = weight.tensor.data if keep_on is None else weight.tensor.data.to(keep_on)

        def put_back() -> None:
            weight.tensor.data = kept.to(weight.tensor.device)

        self.push(put_back)
        weight.tensor.data = value
