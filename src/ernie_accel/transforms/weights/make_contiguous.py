"""Lay the weights out as kernels need them: contiguous, and aligned for vector loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline, Weight, absent_components, modules_of, weights_of
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo

#: Kernels load 16 bytes at a time; safetensors files are mapped into memory at any offset.
ALIGNMENT_BYTES = 16


@dataclass(frozen=True, repr=False)
class MakeContiguous(Transform):
    """Copy weights and buffers that are not contiguous, or do not start on a 16-byte boundary; leave the others.

    On CPUs, how a product of one row (a prompt of one token) rounds depends on where its weight begins in memory.

    Pays:
        Once, after loading mapped safetensors files; some int8 CPU kernels even crash on unaligned weights.
        Channels-last weights pay only in a VAE that is compiled: decoding 1024x1024 takes 85 ms unchanged, 35 ms with
        channels-last weights and compiling, and 130 ms with channels-last weights alone.

    Attributes:
        components: Component names; None for all.
        channels_last: Components whose convolutions (4-d weights) get the channels-last layout. It selects other
            convolution kernels, which round differently.
    """

    phase: ClassVar[Phase] = Phase.LAYOUT
    slot: ClassVar[str] = "layout"
    effect: ClassVar[Effect] = Effect.ROUNDING

    components: tuple[str, ...] | None = field(default=None, kw_only=True)
    channels_last: tuple[str, ...] = field(default=(), kw_only=True)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = absent_components(pipe, self.components) + absent_components(pipe, self.channels_last)
        if self.components is not None:
            reasons += [
                said(
                    "channels_last names {name!r}, which is not among components={components!r}",
                    name=name,
                    components=self.components,
                )
                for name in self.channels_last
                if name not in self.components
            ]
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        planned = context.planned(pipe).weights
        changes = tuple(
            name
            for name, weight, layout in self._with_other_layout(pipe)
            if (then := planned.get(name)) is not None  # one that is concatenated by then is laid out anew
            and then.stored_as is None
            # What is cast gets new, aligned memory, with the strides it had.
            and not (then.is_fresh and weight.tensor.is_contiguous(memory_format=layout))
        )
        return Preview(
            changes, note=self._note() if changes else said("all weights have this layout and alignment already")
        )

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        misplaced = list(self._with_other_layout(pipe))
        with Undo() as undo:
            for _, weight, layout in misplaced:
                undo.set_data(weight, weight.tensor.data.clone(memory_format=layout))
        return Applied(tuple(name for name, *_ in misplaced), undo=undo, note=self._note())

    def _note(self) -> str:
        if not self.channels_last:
            return ""
        names = ", ".join(self.channels_last)
        return said("{names}: channels-last weights pay only in a compiled model, and slow down any other", names=names)

    def _with_other_layout(self, pipe: Pipeline) -> Iterator[tuple[str, Weight, torch.memory_format]]:
        """Yield (name, weight, the layout it should have) of every weight with another layout."""
        for component, module in modules_of(pipe, self.components).items():
            for weight in weights_of(module, all_buffers=True):
                last = component in self.channels_last and weight.tensor.ndim == 4
                layout = torch.channels_last if last else torch.contiguous_format
                if _has_other_layout(weight.tensor, layout):
                    yield f"{component}.{weight.path}", weight, layout


def _has_other_layout(tensor: torch.Tensor, layout: torch.memory_format) -> bool:
    if hasattr(tensor, "__tensor_flatten__") or tensor.layout != torch.strided or tensor.device.type == "meta":
        return False  # quantized tensors lay themselves out
    return not tensor.is_contiguous(memory_format=layout) or tensor.data_ptr() % ALIGNMENT_BYTES != 0
