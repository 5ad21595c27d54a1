"""What rewritten blocks on fused kernels share, whatever the family: who attends, how rows are padded, installation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from ernie_accel.common.language import joined, said
from ernie_accel.core.undo import Undo
from ernie_accel.kernels.low_rank import takes_fp8
from ernie_accel.models.rewriting import RewrittenBlock, blocks_of
from ernie_accel.models.token_layout import LAYOUT, PaddingRule

#: With attention by lengths tokens are padded to a multiple of this: for each number of tokens a step is captured anew,
#: and cuDNN plans anew, which takes 35 to 65 ms on an H200. A product works on tiles of 128 rows, so the padding costs
#: nearly nothing.
TOKENS_MULTIPLE_OF = 64


class KernelBlock(RewrittenBlock):
    """A rewritten block with fused layers, computed by fused kernels; its children are that block's own.

    Each product may be bfloat16 or fp8 (`takes_fp8`); the kernel before it writes what it reads. A family's class
    derives from this one first, then from its rewritten block.

    Attributes:
        attends_in: Precision of attention by lengths, "fp8" (between two fp8 products) or "bf16"; None for torch's.
    """

    def __init__(self, block: RewrittenBlock, attends_in: str | None) -> None:
        nn.Module.__init__(self)
        self.attends_in = attends_in
        for name, child in block.named_children():
            setattr(self, name, child)

    @property
    def takes_lengths(self) -> bool:
        """Whether it needs no mask, as the attention backends are chosen now."""
        return self.has_fp8_attention or (self.attends_in is not None and is_unnamed(self.attention_part))

    @property
    def has_fp8_attention(self) -> bool:
        """Whether attention is in fp8, whichever backends are chosen."""
        return self.attends_in == "fp8" and takes_fp8(self.attention_part.last)


def is_unnamed(attention: nn.Module) -> bool:
    """Return whether nobody has chosen a backend for this attention, or by diffusers' defaults."""
    default = AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0])
    processor = getattr(attention, "processor", None)
    chosen = getattr(processor, "_attention_backend", None)  # processors of others may have no such name
    return chosen is None and default is AttentionBackendName.NATIVE


def padding_rule(blocks: tuple[nn.Module, ...]) -> PaddingRule:
    """Return how the rows of a transformer are padded, given all its blocks.

    To a multiple only where all blocks take lengths: others would need a mask, which is slow or refused.
    In fp8 attention takes no longer with lengths than without, so one graph, and one plan of cuDNN's, serves both. In
    bfloat16 cuDNN takes longer with them; the kernel for Hopper cards does not.
    """
    on_kernels = [block for block in blocks if isinstance(block, KernelBlock)]
    if len(on_kernels) < len(blocks) or not all(block.takes_lengths for block in on_kernels):
        return PaddingRule()
    always_lengths = any(block.has_fp8_attention for block in on_kernels)
    return PaddingRule(TOKENS_MULTIPLE_OF, "lengths", always_lengths=always_lengths)


def is_left_open(transformer: nn.Module, lists: tuple[str, ...], attention: str) -> bool:
    """Return whether nobody has chosen an attention backend for any block, stock or not, or by diffusers' defaults.

    `attention` is the path of the attention within a block.
    """
    return all(is_unnamed(block.get_submodule(attention)) for *_, block in blocks_of(transformer, lists))


def attends_by_lengths(transformer: nn.Module, lists: tuple[str, ...]) -> bool:
    """Return whether all blocks attend by lengths themselves now."""
    return padding_rule(tuple(block for *_, block in blocks_of(transformer, lists))).padding_input == "lengths"


def is_installed(transformer: nn.Module, lists: tuple[str, ...]) -> bool:
    """Return whether `install` has been here."""
    return any(isinstance(block, KernelBlock) for *_, block in blocks_of(transformer, lists))


def install(
    transformer: nn.Module,
    lists: tuple[str, ...],
    rewritten: type[RewrittenBlock],
    cls: type[KernelBlock],
    undo: Undo,
    attention: str | None,
) -> dict[str, str]:
    """Put the rewritten blocks of `transformer` on the kernels in place; return what could not be: path -> reason.

    Args:
        transformer: With rewritten blocks.
        lists: Attributes with its blocks.
        rewritten: Their class.
        cls: The class of the new ones.
        undo: Takes it back.
        attention: `KernelBlock.attends_in`.
    """
    model, skipped = cast(Any, transformer), {}
    for path, blocks, i, block in blocks_of(transformer, lists):
        if not isinstance(block, rewritten):
            skipped[f"transformer.{path}"] = said("it is no rewritten block")
            continue
        apart = [part for part in block.parts.values() if part.fused is None]
        if apart:
            skipped[f"transformer.{path}"] = joined(part.unfusible_reason() for part in apart)
            continue
        undo.push(partial(blocks.__setitem__, i, block))
        for part in block.parts.values():
            undo.setattr(part, "on_kernels", True)
        blocks[i] = cls(block, attention)
    if attention is not None:
        # These, not those in the lists at the time: caches put others in their place while a forward lasts.
        now = tuple(block for *_, block in blocks_of(transformer, lists))
        undo.setattr(LAYOUT.required(model), "padding_rule", partial(padding_rule, now))
    undo.setattr(model, "_repeated_blocks", [*model._repeated_blocks, cls.__name__])
    return skipped


@dataclass(frozen=True)
class KernelFamily:
    """A family's blocks on the kernels, as a `KernelModel`.

    Attributes:
        lists: Attributes of the transformer with its blocks.
        attention: Path of the attention within a block.
        rewritten: Class of the rewritten blocks.
        blocks: Class of those on the kernels.
    """

    lists: tuple[str, ...]
    attention: str
    rewritten: type[RewrittenBlock]
    blocks: type[KernelBlock]

    @property
    def TOKENS_MULTIPLE_OF(self) -> int:
        """What the tokens of a row are padded to a multiple of where attention takes lengths."""
        return TOKENS_MULTIPLE_OF

    def is_left_open(self, transformer: nn.Module) -> bool:
        """Return whether nobody has chosen an attention backend for any block, stock or not, or by defaults."""
        return is_left_open(transformer, self.lists, self.attention)

    def attends_by_lengths(self, transformer: nn.Module) -> bool:
        """Return whether all blocks attend by lengths themselves now."""
        return attends_by_lengths(transformer, self.lists)

    def is_installed(self, transformer: nn.Module) -> bool:
        """Return whether `install` has been here."""
        return is_installed(transformer, self.lists)

    def install(self, transformer: nn.Module, undo: Undo, attention: str | None = None) -> dict[str, str]:
        """Put the rewritten blocks on the kernels in place; return what could not be: path -> reason."""
        return install(transformer, self.lists, self.rewritten, self.blocks, undo, attention)
