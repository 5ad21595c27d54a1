"""Cut the weights of a pipe into pieces, each of which moves as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ernie_accel.common.language import listed
from ernie_accel.core.captured import plain_tensors
from ernie_accel.core.components import (
    DENOISERS,
    PROMPT_COMPONENTS,
    Pipeline,
    alignment_of,
    denoisers_of,
    modules_of,
    with_alignment,
)
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.families import family_of
from ernie_accel.models.language.layers import pass_on
from ernie_accel.residency.layout import ComponentSize, PieceSize, aligned


@dataclass(eq=False)
class Held:
    """One plain tensor of a piece, and where it lies within.

    Attributes:
        tensor: Parameter, buffer, or part of a quantized weight; the object stays the same, its data move.
        offset: Bytes from the start of the piece.
        nbytes: Bytes it takes there.
    """

    tensor: Tensor
    offset: int
    nbytes: int
    size: torch.Size = field(init=False)
    stride: tuple[int, ...] = field(init=False)
    alignment: int = field(init=False)

    def __post_init__(self) -> None:
        self.size, self.stride = self.tensor.size(), self.tensor.stride()
        self.alignment = alignment_of(self.tensor)

    def within(self, flat: Tensor) -> Tensor:
        """Return this tensor's place in the bytes of its piece."""
        return flat[self.offset : self.offset + self.nbytes].view(self.tensor.dtype).as_strided(self.size, self.stride)

    def give_back(self, values: Tensor) -> None:
        """Make the tensor hold `values`, aligned as what it held at first."""
        self.tensor.data = with_alignment(values, self.alignment)


@dataclass(eq=False)
class Piece:
    """Some tensors that move as one."""

    name: str
    held: list[Held]
    nbytes: int


@dataclass(frozen=True)
class Component:
    """A component of the pipe, in pieces.

    Attributes:
        name: Of the component.
        module: It.
        blocks: Its repeated blocks by the name of their piece, in the order in which they run.
        pieces: All pieces; the first one holds what is in no block.
        moves: Whether it leaves the device while others work.
        streams: Whether it can work while only some of its blocks are on the device.
        unused: Parts whose weights stay on the host, because a call of this pipe never runs them.
    """

    name: str
    module: nn.Module
    blocks: Mapping[str, nn.Module]
    pieces: tuple[Piece, ...]
    moves: bool
    streams: bool
    unused: tuple[nn.Module, ...]

    @property
    def size(self) -> ComponentSize:
        """What a layout needs to know."""
        return ComponentSize(self.name, tuple(PieceSize(p.name, p.nbytes) for p in self.pieces), self.streams)


def components_of(pipe: Pipeline) -> tuple[Component, ...]:
    """Cut all components of a pipe into pieces, in the order in which they work."""
    modules = modules_of(pipe)
    order = [name for name in ("pe", *PROMPT_COMPONENTS) if name in modules]
    order = list(dict.fromkeys(order))
    last = [name for name in denoisers_of(pipe) if name not in order]
    others = [name for name in modules if name not in order and name not in last]
    seen: set[int] = set()
    return tuple(_component(pipe, name, modules[name], seen) for name in (*others, *order, *last))


def shared_weights(pipe: Pipeline) -> list[str]:
    """Return the pairs of components that have weights in common, "text_encoder and pe"; their turns differ."""
    owners: dict[int, str] = {}
    pairs: dict[str, None] = {}
    for name, module in modules_of(pipe).items():
        for tensor in _tensors_of(module.modules()):
            owner = owners.setdefault(id(tensor), name)
            if owner != name:
                pairs[listed((owner, name))] = None
    return list(pairs)


def sizes_of(pipe: Pipeline, planned: PlannedPipe) -> list[tuple[ComponentSize, bool]]:
    """Return what the components of a pipe will need on the device, from a plan, and whether each moves."""
    found = []
    for component in components_of(pipe):
        unused = {id(part) for root in component.unused for part in root.modules()}
        parts = component.module.named_modules(prefix=component.name)
        left_out = tuple(f"{path}." for path, part in parts if id(part) in unused)
        sizes = dict.fromkeys((piece.name for piece in component.pieces), 0)
        for name, weight in planned.weights.items():
            if name.startswith(f"{component.name}.") and not name.startswith(left_out):
                sizes[_block_of(name, component)] += aligned(weight.nbytes)
        pieces = tuple(PieceSize(*item) for item in sizes.items())
        found.append((ComponentSize(component.name, pieces, component.streams), component.moves))
    return found


def _block_of(name: str, component: Component) -> str:
    """Return the outermost block that a weight is in, or the component."""
    end = name.find(".")
    while end > 0:
        if name[:end] in component.blocks:
            return name[:end]
        end = name.find(".", end + 1)
    return component.name


def _component(pipe: Pipeline, name: str, module: nn.Module, seen: set[int]) -> Component:
    moves = name in PROMPT_COMPONENTS or name in DENOISERS
    unused = tuple(unused_parts(pipe, name, module))
    left_out = {id(part) for root in unused for part in root.modules()}
    blocks = {f"{name}.{path}": block for path, block in repeated_blocks(module) if id(block) not in left_out}
    in_blocks = {id(part) for block in blocks.values() for part in block.modules()}
    rest = [part for part in module.modules() if id(part) not in in_blocks and id(part) not in left_out]
    inside = [list(_tensors_of(block.modules())) for block in blocks.values()]
    of_how_many = Counter(identity for tensors in inside for identity in set(map(id, tensors)))
    shared = [tensor for tensors in inside for tensor in tensors if of_how_many[id(tensor)] > 1]
    pieces = [_piece(name, (*_tensors_of(rest), *shared), seen)]  # what several blocks read is there for all of them
    pieces += [_piece(path, tensors, seen) for path, tensors in zip(blocks, inside, strict=True)]
    # ERNIE-Image's text encoder and enhancer are rewritten as graphs, which read weights without calling the blocks.
    encoding = family_of(pipe).prompt_encoding
    streams = bool(blocks) and (name in DENOISERS or encoding is None or bool(encoding.methods))
    return Component(name, module, blocks, tuple(pieces), moves, streams, unused)


def repeated_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and block of the longest list of blocks in a module, and of every other list of the same blocks."""
    lists = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        return
    sizes = {path: sum(p.numel() for p in part.parameters()) for path, part in lists}
    largest = max(lists, key=lambda entry: (sizes[entry[0]], -len(entry[0])))
    kind = type(largest[1][0])
    chosen: list[str] = []
    for path, part in lists:
        inside = any(path.startswith(f"{outer}.") for outer in chosen)
        if not inside and (part is largest[1] or all(type(block) is kind for block in part)):
            chosen.append(path)
            for i, block in enumerate(part):
                yield f"{path}.{i}", block


def unused_parts(pipe: Pipeline, name: str, module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a component that a call never runs: a vision tower, a layer whose forward is skipped."""
    encoding = family_of(pipe).prompt_encoding
    if name == "text_encoder" and encoding is not None:
        for path in encoding.unused:
            part: object = module
            for step in path.split("."):
                part = getattr(part, step, None)
            if isinstance(part, nn.Module):
                yield part
        yield from (part for part in module.modules() if vars(part).get("forward") is pass_on)


def _piece(name: str, tensors: Iterable[Tensor], seen: set[int]) -> Piece:
    held: list[Held] = []
    offset = 0
    for tensor in tensors:
        if id(tensor) in seen or tensor.numel() == 0:
            continue
        seen.add(id(tensor))
        held.append(Held(tensor, offset, stored_bytes(tensor)))
        offset += aligned(held[-1].nbytes)
    return Piece(name, held, offset)


def _tensors_of(parts: Iterable[nn.Module]) -> Iterator[Tensor]:
    for part in parts:
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                yield from plain_tensors(tensor)


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes from the first to the last value of a tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
