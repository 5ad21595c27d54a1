"""Where each piece of the weights lies in one block of device memory that is smaller than all of them together.

Components take turns: prompts are enhanced and encoded, then pictures are denoised. So they may share memory, and
each piece keeps its one address, which captured graphs count on. A component that is larger than the block is streamed:
some of its pieces have a place of their own, the others take turns in a few slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

#: Slots in which streamed pieces take turns: one is computed with while the next arrives.
SLOTS = 2
#: What every piece's address is a multiple of, as torch's allocator has it.
ALIGNMENT = 512


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PieceSize:
    """A part of a component that is moved as one.

    Attributes:
        name: Component and path, "transformer.layers.3"; the component's name for what is in no repeated block.
        nbytes: Bytes on the device.
    """

    name: str
    nbytes: int


@dataclass(frozen=True)
class ComponentSize:
    """A component and its pieces, in the order in which they are used.

    Attributes:
        name: Of the component.
        pieces: The first is what lies outside of repeated blocks, and is there all the time while the component works.
        streams: Whether it can work while only some of its blocks are on the device.
    """

    name: str
    pieces: tuple[PieceSize, ...]
    streams: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(aligned(piece.nbytes) for piece in self.pieces)

    @property
    def least(self) -> int:
        """Bytes with which it can work."""
        if not self.streams:
            return self.nbytes
        first, *blocks = (aligned(piece.nbytes) for piece in self.pieces)
        largest = max(blocks, default=0)
        return first + min(sum(blocks), SLOTS * largest)


@dataclass(frozen=True)
class Layout:
    """Places on the device.

    Attributes:
        nbytes: Of the block that holds them.
        offsets: Of each piece, in bytes from the start of the block.
        sizes: Of each piece, aligned.
        streamed: Pieces that take turns in slots while their component works.
        components: The pieces of each component, in the order of use.
    """

    nbytes: int
    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    streamed: frozenset[str]
    components: Mapping[str, tuple[str, ...]]

    def overlapping(self, name: str) -> Iterator[str]:
        """Yield the pieces that cannot be on the device together with this one."""
        start, end = self.offsets[name], self.offsets[name] + self.sizes[name]
        for other, offset in self.offsets.items():
            if other != name and offset < end and start < offset + self.sizes[other]:
                yield other

    @property
    def moving(self) -> frozenset[str]:
        """The pieces that leave the device, because another one needs the place."""
        return frozenset(name for name in self.offsets if any(True for _ in self.overlapping(name)))

    def fetched(self, turns: Sequence[tuple[str, int]]) -> int:
        """Return the bytes that come from the host for one picture, once the first is drawn.

        Args:
            turns: (component, how often it runs), in the order in which they work.
        """
        there: dict[str, None] = {}
        total = 0
        for _ in range(2):  # the first picture brings everything; the second one counts
            total = 0
            for component, times in turns:
                for _ in range(times):
                    for name in self.components[component]:
                        if name not in there:
                            for other in self.overlapping(name):
                                there.pop(other, None)
                            there[name] = None
                            total += self.sizes[name]
        return total


def least_bytes(components: Sequence[ComponentSize]) -> int:
    """Return the bytes with which `lay_out` can do: everything that moves is streamed."""
    return max((component.least for component in components), default=0)


def lay_out(components: Sequence[ComponentSize], capacity: int) -> Layout:
    """Find places for all pieces in at most `capacity` bytes, with as little to fetch as there is room for.

    The last component, which works longest, lies at the bottom; the others end at the top, so that they cover as little
    of it, and of each other, as possible.

    Args:
        components: In the order in which they work.
        capacity: Bytes.

    Raises:
        ValueError: It is less than `least_bytes`.
    """
    least = least_bytes(components)
    if capacity < least:
        raise ValueError(f"capacity must be at least {least}, got {capacity}")
    offsets: dict[str, int] = {}
    streamed: set[str] = set()
    bottom, top = 0, min(sum(component.nbytes for component in components), capacity) // ALIGNMENT * ALIGNMENT
    for component in reversed(components):
        if component.nbytes > top:
            streamed |= _stream(component, top, offsets)
            bottom = top
        elif bottom + component.nbytes <= top:
            bottom = _stack(component.pieces, bottom, offsets)
        else:
            _stack(component.pieces, top - component.nbytes, offsets)
    sizes = {piece.name: aligned(piece.nbytes) for component in components for piece in component.pieces}
    return Layout(
        nbytes=max((offsets[name] + sizes[name] for name in offsets), default=0),
        offsets=offsets,
        sizes=sizes,
        streamed=frozenset(streamed),
        components={component.name: tuple(piece.name for piece in component.pieces) for component in components},
    )


def _stack(pieces: Sequence[PieceSize], offset: int, offsets: dict[str, int]) -> int:
    for piece in pieces:
        offsets[piece.name] = offset
        offset += aligned(piece.nbytes)
    return offset


def _stream(component: ComponentSize, top: int, offsets: dict[str, int]) -> set[str]:
    """Place a component that is larger than its room, and return which of its pieces take turns.

    The turns are spread evenly over the others, so that each has as long as any to arrive.
    """
    first, *blocks = component.pieces
    bottom = _stack([first], 0, offsets)
    usual = median_low(aligned(piece.nbytes) for piece in blocks)
    # A few that are larger than the rest (left in full precision, say) would make all slots larger: they stay.
    staying = {piece.name for piece in blocks if aligned(piece.nbytes) > usual}
    if bottom + sum(aligned(piece.nbytes) for piece in blocks if piece.name in staying) + SLOTS * usual > top:
        staying = set()
    others = [piece for piece in blocks if piece.name not in staying]
    slot = max(aligned(piece.nbytes) for piece in others)
    slots = range(top - SLOTS * slot, top, slot)
    room = slots[0] - bottom - sum(aligned(piece.nbytes) for piece in blocks if piece.name in staying)
    moving = len(others) - room // slot
    turns = {others[(2 * i + 1) * len(others) // (2 * moving)].name: i for i in range(moving)}
    for piece in blocks:
        if piece.name in turns:
            offsets[piece.name] = slots[turns[piece.name] % SLOTS]
        else:
            bottom = _stack([piece], bottom, offsets)
    return set(turns)
