"""What `RewriteBlocks` asks of a transformer with the blocks of this kind, whatever the family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ernie_accel.core.components import Pipeline
from ernie_accel.core.undo import Undo
from ernie_accel.models import rewriting
from ernie_accel.models.next_dit.blocks import RewrittenNextBlock
from ernie_accel.models.rewriting import RewrittenForward, blocks_of

#: Attributes of the transformer with the blocks.
LISTS = ("noise_refiner", "context_refiner", "layers")


@dataclass(frozen=True)
class NextRewriting:
    """That half of a `RewrittenModel` which changes the transformer; a family's module has its methods as functions.

    Attributes:
        transformer: The class whose forward is rewritten.
        block: Class of the rewritten blocks.
        forward: Class of the rewritten forward.
        processors: Classes of attention processors that do what the rewritten attention does.
    """

    transformer: type[nn.Module]
    block: type[RewrittenNextBlock]
    forward: type[RewrittenForward]
    processors: tuple[type, ...]

    @property
    def fused_layers(self) -> tuple[str, ...]:
        """The layers of a block that are one product where their parts are fused, by path within the block."""
        names, fused = self.block.names, self.block.feed_forward_class.fused_name
        return (f"{names.attention}.{rewriting.SelfAttention.fused_name}", f"{names.feed_forward}.{fused}")

    def fits(self, transformer: nn.Module) -> bool:
        """Return whether this is the implementation that is rewritten: its forward is diffusers' own, as known here."""
        stock = type(transformer).forward
        return stock is self.transformer.forward and rewriting.takes_all_of(self.forward.function, stock)

    def is_rewritten(self, transformer: nn.Module) -> bool:
        """Return whether `rewrite` has been here."""
        return any(isinstance(block, self.block) for *_, block in blocks_of(transformer, LISTS[-1:]))

    def unsupported_reasons(self, transformer: nn.Module) -> list[str]:
        """Return every reason why this stock transformer cannot be rewritten."""
        return rewriting.unsupported_reasons(transformer, LISTS, self.block.names.attention, self.processors)

    def to_be_fused(self, transformer: nn.Module, *, beneath_loras: bool = False) -> dict[str, tuple[str, ...]]:
        """Return which layers `rewrite` would make one: path of the one -> paths of its parts.

        With `beneath_loras`, also those that `FuseKernels` would.
        """
        return rewriting.to_be_fused(transformer, LISTS, self.block, beneath_loras=beneath_loras)

    def rewrite(self, pipe: Pipeline, undo: Undo, fuse: bool) -> dict[str, str]:
        """Rewrite the transformer of `pipe` in place and return what could not be fused: path -> reason."""
        return rewriting.rewrite(pipe.transformer, LISTS, self.block, self.forward, undo, fuse)
