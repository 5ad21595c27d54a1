"""What `RewriteBlocks` asks of a transformer with the blocks of this kind, whatever the family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.undo import Undo
from ernie_accel.models import rewriting
from ernie_accel.models.next_dit.blocks import RewrittenNextBlock
from ernie_accel.models.next_dit.time_rates import rates_of
from ernie_accel.models.rewriting import RewrittenForward, blocks_of

#: Attributes of the transformer with the blocks.
LISTS = ("noise_refiner", "context_refiner", "layers")


@dataclass(frozen=True)
class NextRewriting:
    """That half of a `RewrittenModel` which changes the transformer; a family's module has its methods as functions.

    Attributes:
        block: Class of the rewritten blocks.
        forward: Class of the rewritten forward.
    """

    block: type[RewrittenNextBlock]
    forward: type[RewrittenForward]

    @property
    def fused_layers(self) -> tuple[str, ...]:
        """The layers of a block that are one product where their parts are fused, by path within the block."""
        names, attention, feed_forward = self.block.names, self.block.attention_class, self.block.feed_forward_class
        return (f"{names.attention}.{attention.fused_name}", f"{names.feed_forward}.{feed_forward.fused_name}")

    def is_rewritten(self, transformer: nn.Module) -> bool:
        """Return whether `rewrite` has been here."""
        return any(isinstance(block, self.block) for *_, block in blocks_of(transformer, LISTS[-1:]))

    def to_be_fused(self, transformer: nn.Module, *, beneath_loras: bool = False) -> dict[str, tuple[str, ...]]:
        """Return which layers `rewrite` would make one: path of the one -> paths of its parts.

        With `beneath_loras`, also those that `FuseKernels` would.
        """
        return rewriting.to_be_fused(transformer, LISTS, self.block, beneath_loras=beneath_loras)

    def rewrite(self, pipe: Pipeline, undo: Undo, fuse: bool) -> dict[str, str]:
        """Rewrite the transformer of `pipe` in place and return what could not be fused: path -> reason."""
        return rewriting.rewrite(pipe.transformer, LISTS, self.block, self.forward, undo, fuse)


@dataclass(frozen=True)
class DiffusersRewriting(NextRewriting):
    """The same for a transformer of diffusers.

    Attributes:
        transformer: The class whose forward is rewritten.
        processors: Classes of attention processors that do what the rewritten attention does.
    """

    transformer: type[nn.Module]
    processors: tuple[type, ...]

    def fits(self, transformer: nn.Module) -> bool:
        """Return whether this is the implementation that is rewritten: its forward is diffusers' own, as known here."""
        stock = type(transformer).forward
        return stock is self.transformer.forward and rewriting.takes_all_of(self.forward.function, stock)

    def unsupported_reasons(self, transformer: nn.Module) -> list[str]:
        """Return every reason why this stock transformer cannot be rewritten."""
        return rewriting.unsupported_reasons(transformer, LISTS, self.block.names.attention, self.processors)


@dataclass(frozen=True)
class RemoteRewriting(NextRewriting):
    """The same for a transformer whose class comes with a checkpoint, and is known by its name and its parts.

    Attributes:
        transformer: Name of the class whose forward is rewritten.
        methods: Its forward and what that calls: name -> arguments.
        children: All of its children beside the lists of blocks.
        time_embedder: The one of these that embeds the time, by sinusoids that `time_rates` knows.
        block_arguments: Those of a block's forward.
        attention_arguments: Those of an attention's.
    """

    transformer: str
    methods: Mapping[str, tuple[str, ...]]
    children: tuple[str, ...]
    time_embedder: str
    block_arguments: tuple[str, ...]
    attention_arguments: tuple[str, ...]

    def fits(self, transformer: nn.Module) -> bool:
        """Return whether this is the implementation that is rewritten, as far as its class and its parts tell."""
        cls = type(transformer)
        return (
            cls.__name__ == self.transformer
            and all(_arguments(getattr(cls, name, None)) == known for name, known in self.methods.items())
            and {name for name, _ in transformer.named_children()} == {*LISTS, *self.children}
            and rates_of(transformer.get_submodule(self.time_embedder), "cpu") is not None
        )

    def unsupported_reasons(self, transformer: nn.Module) -> list[str]:
        """Return every reason why this stock transformer cannot be rewritten."""
        found = {what for *_, block in blocks_of(transformer, LISTS) for what in self._unknown_parts(block)}
        return [
            said("its blocks have parts of code that is not known here: {part}", part=part) for part in sorted(found)
        ]

    def _unknown_parts(self, block: nn.Module) -> Iterator[str]:
        """Yield the class names of those parts of a stock block that are not what the rewritten one takes them for."""
        names, attends, feeds = self.block.names, self.block.attention_class, self.block.feed_forward_class
        children = dict(block.named_children())
        attention, feed_forward = (children.get(name, nn.Module()) for name in (names.attention, names.feed_forward))
        layers = dict(attention.named_children())
        needed = {names.attention, names.feed_forward, *names.norms}
        if {*children} - {*names.others} != needed or _arguments(type(block).forward) != self.block_arguments:
            yield type(block).__name__
        is_known = {*layers} == {*attends.taken} and hasattr(attention, attends.heads_name)
        if not is_known or _arguments(type(attention).forward) != self.attention_arguments:
            yield type(attention).__name__
        if {name for name, _ in feed_forward.named_children()} != {*feeds.taken}:
            yield type(feed_forward).__name__
        norms = (*(children.get(name) for name in names.norms), *(layers.get(name) for name in attends.norm_names))
        yield from (type(norm).__name__ for norm in norms if not isinstance(getattr(norm, "eps", None), float))


def _arguments(method: Callable[..., object] | None) -> tuple[str, ...]:
    return () if method is None else tuple(inspect.signature(method).parameters)
