"""What a family's rewritten model and its kernels must offer, and how they are found.

A `Family` names them (``rewritten``, ``kernels``) as a module, or gives an object. `RewriteBlocks`, `FuseKernels`,
`CaptureGraphs` and `Quantize` use nothing beyond what is declared here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias, cast

from torch import Tensor, nn

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.undo import Undo
from ernie_accel.families import families, family_of
from ernie_accel.families.family import Family

#: (transformer, rows, width, height, tokens) -> arguments of its forward, without values.
ForwardInputs: TypeAlias = Callable[[nn.Module, int, int, int, int], dict[str, object]]


class PreparedPositions(Protocol):
    """Where the tokens of a batch are, as a rewritten forward takes it."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is made of, in one order."""

    def clone(self) -> PreparedPositions:
        """Return a copy that shares no memory."""


class RewrittenModel(Protocol):
    """A denoiser's blocks, rewritten: the same numbers from fewer operations."""

    @property
    def BLOCKS(self) -> tuple[str, ...]:
        """Attributes of the transformer with the lists of blocks that are rewritten ("layers",)."""

    @property
    def FUSED_LAYERS(self) -> tuple[str, ...]:
        """Paths, within a block, of linear layers that replace several with the same input."""

    @property
    def STEP_INPUTS(self) -> tuple[str, ...]:
        """Arguments that may be other tensors at every step, one, a list or a mapping of them; those given count."""

    @property
    def PICTURE_INPUT(self) -> str:
        """The one that is the same tensor, or has the same tensors, at all steps of a picture: its encoded prompt."""

    def fits(self, transformer: nn.Module) -> bool:
        """Return whether `transformer` is of the implementation that is rewritten; a family may have others."""

    def is_rewritten(self, transformer: nn.Module) -> bool:
        """Return whether `rewrite` was applied to `transformer`."""

    def unsupported_reasons(self, transformer: nn.Module) -> list[str]:
        """Return every reason why this stock transformer cannot be rewritten; empty if it can."""

    def to_be_fused(self, transformer: nn.Module, *, beneath_loras: bool = False) -> Mapping[str, tuple[str, ...]]:
        """Return which linear layers `rewrite` would make one: path of the new one -> paths of its parts.

        With `beneath_loras`, also those that `FuseKernels` would: beneath a LoRA's layers, and of rewritten blocks.
        """

    def rewrite(self, pipe: Pipeline, undo: Undo, fuse: bool) -> dict[str, str]:
        """Rewrite the transformer of `pipe` in place; return what could not be fused: path -> reason."""

    def token_count(self, transformer: nn.Module, arguments: Mapping[str, object]) -> int:
        """Return the image tokens of all pictures of a batch, given the arguments of a forward."""

    def serves(self, arguments: Mapping[str, object]) -> bool:
        """Return whether `prepare`, and a captured forward, can serve these arguments of a forward."""

    def host_facts(self, arguments: Mapping[str, object]) -> tuple[int, ...]:
        """Return what `prepare` depends on besides shapes, as known on the host: prompt lengths, for example."""

    def prepare(self, transformer: nn.Module, arguments: Mapping[str, object]) -> tuple[Tensor, PreparedPositions]:
        """Return encoded prompt and positions, which the forward takes as ``at=``."""

    def as_output(self, sample: Tensor, arguments: Mapping[str, object]) -> object:
        """Return `sample` in the form that the caller of the forward asked for."""


class KernelModel(Protocol):
    """Rewritten blocks on fused kernels."""

    @property
    def TOKENS_MULTIPLE_OF(self) -> int:
        """What the tokens of a row are padded to a multiple of where attention takes lengths."""

    def is_installed(self, transformer: nn.Module) -> bool:
        """Return whether `install` was applied to `transformer`."""

    def install(self, transformer: nn.Module, undo: Undo, attention: str | None = None) -> dict[str, str]:
        """Put the rewritten blocks on the kernels in place; return what could not be: path -> reason.

        Args:
            transformer: With rewritten blocks.
            undo: Takes it back.
            attention: "fp8" or "bf16" for attention of the kernels, which takes lengths; None leaves it to torch.
        """

    def is_left_open(self, transformer: nn.Module) -> bool:
        """Return whether nobody has chosen an attention backend for any block."""

    def attends_by_lengths(self, transformer: nn.Module) -> bool:
        """Return whether all blocks attend by lengths themselves now."""


def rewritten_model(pipe: Pipeline) -> RewrittenModel | None:
    """Return the rewritten model of the pipe's family; None where there is none for its transformer."""
    rewritten = family_of(pipe).rewritten
    model = None if rewritten is None else cast(RewrittenModel, named_object(rewritten))
    return model if model is not None and model.fits(pipe.transformer) else None


def kernel_model(pipe: Pipeline) -> KernelModel | None:
    """Return the fused kernels of the pipe's family; None where there are none for its transformer."""
    kernels = family_of(pipe).kernels
    return None if kernels is None or rewritten_model(pipe) is None else cast(KernelModel, named_object(kernels))


def whose(pipe: Pipeline) -> str:
    """Return the end of "there are no rewritten blocks ...": for whom there are none."""
    family = family_of(pipe)
    # Of a class that is not the one that was rewritten, `family` is what is known of other code.
    some = any(each.rewritten is not None for each in (family, *families()) if each.name == family.name)
    return said("for {model}", model=type(pipe.transformer).__name__) if some else said("yet")


def rewritten_blocks(pipe: Pipeline) -> RewrittenModel:
    """Return the rewritten model of the pipe's family, which must have one."""
    found = rewritten_model(pipe)
    if found is None:
        raise LookupError(f"{type(pipe).__name__} has no rewritten blocks")
    return found


def kernels_of(pipe: Pipeline) -> KernelModel:
    """Return the fused kernels of the pipe's family, which must have some."""
    found = kernel_model(pipe)
    if found is None:
        raise LookupError(f"{type(pipe).__name__} has no blocks on fused kernels")
    return found


def block_paths(pipe: Pipeline) -> tuple[str, ...]:
    """Return the paths of the blocks that are rewritten ("transformer.layers.0")."""
    names = rewritten_blocks(pipe).BLOCKS
    return tuple(f"transformer.{name}.{i}" for name in names for i in range(len(getattr(pipe.transformer, name))))


def attends_by_lengths(pipe: Pipeline, context: Context) -> bool:
    """Return whether all blocks attend by lengths themselves, or will by then."""
    kernels = kernel_model(pipe)
    if kernels is None:
        return False
    return context.planned(pipe).takes_lengths or kernels.attends_by_lengths(pipe.transformer)


def inputs_of(family: Family) -> ForwardInputs | None:
    """Return what makes arguments for a transformer of the family; None where that is not known."""
    named = family.forward_inputs
    return None if named is None else cast(ForwardInputs, named_object(named))


def named_object(named: object) -> object:
    """Return the object itself, or the module of that name, or "module:attribute"."""
    if not isinstance(named, str):
        return named
    module, _, attribute = named.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
