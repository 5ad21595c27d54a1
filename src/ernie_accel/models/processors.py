"""Find the attentions that diffusers' dispatcher serves, and those that it can serve with a family's own processor."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ernie_accel.common.notes import Note
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of_transformer


@dataclass(frozen=True)
class ByMask:
    """The two processors of an attention whose kernel takes no mask.

    Attributes:
        unmasked: For calls without a mask.
        masked: For calls with one.
    """

    unmasked: Any
    masked: Any


BY_MASK = Note("by_mask", ByMask, "processor", "which processors it hands calls to, with a mask and without")


def processor_for(processor: object, mask: object) -> Any:
    """Return the processor that computes a call with this mask (None: without one)."""
    by_mask = BY_MASK.of(processor)
    if by_mask is None:
        return processor
    return by_mask.unmasked if mask is None else by_mask.masked


def attentions(transformer: object) -> Iterator[tuple[str, Any]]:
    """Yield (path, module) of every attention that the dispatcher serves, or serves after `send_through_dispatcher`."""
    for path, part in transformer.named_modules() if isinstance(transformer, nn.Module) else ():
        processor = getattr(part, "processor", None)
        if hasattr(processor, "_attention_backend") or _stand_in(transformer, processor) is not None:
            yield path, part


def passed_by(transformer: nn.Module) -> list[str]:
    """Return the class names of processors that call torch's kernel themselves and have no replacement.

    All such processors in diffusers' image transformers reshape every mask to [B, 1, 1, S] first.
    """
    processors = [getattr(part, "processor", None) for part in transformer.modules()]
    names = {
        type(processor).__name__
        for processor in processors
        if processor is not None
        and not hasattr(processor, "_attention_backend")
        and _stand_in(transformer, processor) is None
    }
    return sorted(names)


def send_through_dispatcher(transformer: nn.Module, undo: Undo) -> None:
    """Give attentions whose processor bypasses the dispatcher the family's replacement for it, in place."""
    for _, part in attentions(transformer):
        stand_in = _stand_in(transformer, part.processor)
        if stand_in is not None:
            undo.setattr(part, "processor", stand_in())


def _stand_in(transformer: object, processor: object) -> Any:
    """Return the replacement for a processor's class, or None."""
    path = family_of_transformer(transformer).dispatched.get(type(processor).__name__)
    if path is None:
        return None
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
