"""How an attention mask reaches the blocks of a transformer, and how to change it on the way without a class patch.

A transformer builds the mask inside its forward and passes it to every block, so on one instance it can only be changed
at the entry of each block, by a forward pre-hook (`map_masks`). The pipeline's padding method knows earlier, and on the
host, whether anything is padded (`watch_padding`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ernie_accel.common.language import said
from ernie_accel.common.notes import Note
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of, repeated_blocks
from ernie_accel.families.family import AlwaysMasks

#: What blocks call their mask argument: those of diffusers' transformers, and the rewritten ones.
MASK_NAMES = ("attention_mask", "attn_mask", "mask_b11s")


class Padding:
    """What the host knows about one padded batch. It is attached to both tensors, which identifies them as a pair.

    Attributes:
        padded: Whether any prompt is shorter than the batch is wide.
    """

    def __init__(self, padded: bool) -> None:
        self.padded = padded


PADDING = Note("padding", Padding, "tensor", "whether the batch that it belongs to pads anything")


class _Forward:
    """What is known of the forward that runs in one thread."""

    def __init__(self) -> None:
        self.padding: Padding | None = None  # no class attribute: torch.compile would guard on that one


class _Running(threading.local):
    """Holds one object for each thread; a new thread gets its own when it first looks.

    The object never changes, only what is written on it. torch.compile loses what it writes to a local of a thread
    itself as soon as its graph ends, but finds an object there again, in the thread that runs, and writes to it.
    """

    def __init__(self) -> None:
        self.forward = _Forward()

    def __reduce__(self) -> Any:
        return _Running, ()  # a copy of the pipe runs nothing yet


class PaddingWatch:
    """What the running forward knows about its padding. Hooks write it, blocks read it.

    Each thread has its own: another pipe, which need not wait for this one, may draw with the same transformer.
    """

    def __init__(self, how: AlwaysMasks, transformer: nn.Module) -> None:
        self._running = _Running()
        self._how = how
        names = list(inspect.signature(transformer.forward).parameters)
        self._lengths_at, self._text_at = names.index(how.lengths), names.index(how.text)

    @property
    def padding(self) -> Padding | None:
        """Of the forward that runs in this thread; None if it is not known on the host."""
        return self._running.forward.padding

    @property
    def elided(self) -> bool:
        """Whether the running forward is known to pad nothing."""
        padding = self.padding
        return padding is not None and not padding.padded

    def before_transformer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out whether this forward pads; a forward pre-hook (with keywords) of the transformer."""
        lengths_b = args[self._lengths_at] if len(args) > self._lengths_at else kwargs[self._how.lengths]
        text_bth = args[self._text_at] if len(args) > self._text_at else kwargs[self._how.text]
        padding = PADDING.of(text_bth)
        if padding is not PADDING.of(lengths_b):
            padding = None
        if padding is None and not torch.compiler.is_compiling():
            # Not what the pipeline padded: look, once for this pair of tensors. That would break a graph, so in a
            # transformer that is compiled as a whole the mask stays.
            padding = mark(text_bth, lengths_b, lengths_b.tolist())
        self._running.forward.padding = padding


def mark(text_bth: Tensor, lengths_b: Tensor, lengths: list[int]) -> Padding:
    """Note on both tensors whether `text_bth` [B, T, H] is padded, given `lengths`, the values of `lengths_b` [B]."""
    padding = Padding(any(length != text_bth.shape[1] for length in lengths))
    for tensor in (text_bth, lengths_b):
        PADDING.put(tensor, padding)
    return padding


def watch_padding(pipe: Pipeline, how: AlwaysMasks, undo: Undo) -> PaddingWatch:
    """Keep what the padding method of `pipe` knows, in place, and return where a running forward finds it."""
    watch = PaddingWatch(how, pipe.transformer)
    undo.setattr(pipe, how.pad_method, _MarkingPad(pipe, how.pad_method))
    undo.hook_before_forward(pipe.transformer, watch.before_transformer, kwargs=True)
    return watch


class _MarkingPad(StandInMethod):
    """A pipeline's padding method, ([T, H] of each prompt) -> (text_bth, lengths_b), that marks its result."""

    def __call__(self, text_hiddens: list[Tensor], *args: object, **kwargs: object) -> Any:
        text_bth, lengths_b = self.call_inner(text_hiddens, *args, **kwargs)
        mark(text_bth, lengths_b, [hidden.shape[0] for hidden in text_hiddens])
        return text_bth, lengths_b


def masked_blocks(transformer: nn.Module) -> Iterator[tuple[str, nn.Module, int, str]]:
    """Yield (path, block, position and name of its mask argument) for every repeated block that takes a mask."""
    repeated = repeated_blocks(transformer)
    for path, block in transformer.named_modules():
        if type(block).__name__ not in repeated:
            continue
        names = list(inspect.signature(block.forward).parameters)
        found = next((name for name in MASK_NAMES if name in names), None)
        if found is not None:
            yield path, block, names.index(found), found


def map_masks(transformer: nn.Module, change: Callable[[Tensor], Tensor | None], undo: Undo) -> None:
    """Let every block see ``change(mask)`` instead of its mask, in place; a block that gets no mask stays so."""
    hooks: dict[tuple[int, str], _MaskHook] = {}
    for _, block, position, name in masked_blocks(transformer):
        # One object for all blocks: with one each, torch.compile would compile every block again.
        hook = hooks.setdefault((position, name), _MaskHook(change, position, name))
        undo.hook_before_forward(block, hook, kwargs=True)


class _MaskHook:
    """A forward pre-hook (with keywords) that changes one argument; an object, so that a deep copy copies its state."""

    def __init__(self, change: Callable[[Tensor], Tensor | None], position: int, name: str) -> None:
        self._change, self._position, self._name = change, position, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if len(args) > self._position:
            if args[self._position] is None:
                return None
            changed = self._change(args[self._position])
            return (*args[: self._position], changed, *args[self._position + 1 :]), kwargs
        if kwargs.get(self._name) is None:
            return None
        return args, {**kwargs, self._name: self._change(kwargs[self._name])}


def no_mask_reason(pipe: Pipeline, context: Context) -> str | None:
    """Return why no mask reaches the attention of `pipe` unless a batch really pads; None if one always does."""
    family = family_of(pipe)
    if family.always_masks is None:
        return said("{name} builds a mask only for a batch that really pads", name=family.name_for(pipe))
    return context.planned(pipe).elides_mask
