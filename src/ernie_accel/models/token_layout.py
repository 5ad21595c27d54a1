"""How the tokens of a rewritten transformer's batches lie: padding, positions, and the lengths of prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from ernie_accel.common.notes import Note
from ernie_accel.core.captured import version_of

P = TypeVar("P", bound="Prepared")


class PaddingRule(NamedTuple):
    """How a transformer pads its rows of tokens, and how its blocks learn which tokens are padding.

    Attributes:
        multiple_of: The number of tokens is rounded up to a multiple of this.
        padding_input: "mask" gives the blocks a mask and the lengths; "lengths" gives only the lengths, for models
            in which every block uses these.
        always_lengths: Pass lengths even if nothing is padded, so that padded and unpadded batches share a graph.
    """

    multiple_of: int = 1
    padding_input: Literal["mask", "lengths"] = "mask"
    always_lengths: bool = False


@dataclass(frozen=True)
class Prepared:
    """What a forward needs to know of where tokens are; subclasses have fields that are tensors or None."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them that there are."""
        return tuple(tensor for tensor in vars(self).values() if tensor is not None)

    def clone(self: P) -> P:
        """Return a copy that shares no memory."""
        changes: Any = {
            each.name: value.clone() for each in fields(self) if (value := getattr(self, each.name)) is not None
        }
        return replace(self, **changes)


class Positions:
    """Positions of the last few image sizes and prompt lengths, so that a picture's steps share one computation."""

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._known: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], P]) -> P:
        """Return what was made for `key`, or make it.

        Args:
            key: All that it depends on.
            make: Makes it.
        """
        found: P | None = self._known.pop(key, None)  # another thread may draw: each look is one operation
        if found is None:
            found = make()
        self._known[key] = found  # the last one used is the last
        if len(self._known) > self._keep:
            self._known.popitem(last=False)
        return found


class TokenLayout:
    """How a rewritten transformer lays out the tokens of a batch.

    Attributes:
        positions: Those of the last batches.
        padding_rule: Returns the rule for the attention that the blocks use now; by default, that of stock.
    """

    def __init__(self) -> None:
        self.positions = Positions()
        self.padding_rule: Callable[[], PaddingRule] = PaddingRule


LAYOUT = Note("token_layout", TokenLayout, "transformer", "positions and padding of its batches, once it is rewritten")


class PromptLengths(NamedTuple):
    """The values of a tensor of prompt lengths, on the host.

    Attributes:
        version: Of the tensor, when it had these (see `version_of`).
        lengths: Its values.
    """

    version: int | None
    lengths: tuple[int, ...]


PROMPT_LENGTHS = Note("prompt_lengths", PromptLengths, "tensor", "its values, as they are on the host")


def prompt_lengths(
    text_lens: Tensor, read: Callable[[Tensor], tuple[int, ...]] = lambda lens: tuple(lens.tolist())
) -> tuple[int, ...]:
    """Return the prompt lengths [B] on the host, reading the device at most once per tensor.

    What was read is kept on the tensor, so a picture costs one synchronisation, and none at all if the pipeline's
    ``_pad_text``, which knows the lengths, has called `remember_lengths`.
    """
    known = PROMPT_LENGTHS.of(text_lens)
    if known is None or known.version != version_of(text_lens):
        known = remember_lengths(text_lens, read(text_lens))
    return known.lengths


def remember_lengths(text_lens: Tensor, lengths: tuple[int, ...]) -> PromptLengths:
    """Keep the values of `text_lens` [B], as they are on the host, on the tensor itself; return what is kept."""
    kept = PromptLengths(version_of(text_lens), lengths)
    PROMPT_LENGTHS.put(text_lens, kept)
    return kept
