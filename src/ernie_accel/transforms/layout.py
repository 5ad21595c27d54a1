"""Lay the weights out as kernels like them: contiguous, and aligned for vector loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ernie_accel.core.components import Pipeline, absent_components, modules_of
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo

#: Kernels load 16 bytes at a time; safetensors files are mapped into memory at any offset.
ALIGNMENT_BYTES = 16


@dataclass(frozen=True, repr=False)
class MakeContiguous(Transform):
    """Copy weights and buffers that are not contiguous, or do not start on a 16-byte boundary; leave the others.

    Attributes:
        components: Component names; None for all.
    """

    phase: ClassVar[Phase] = Phase.LAYOUT
    slot: ClassVar[str] = "layout"
    effect: ClassVar[Effect] = Effect.EXACT

    components: tuple[str, ...] | None = field(default=None, kw_only=True)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return absent_components(pipe, self.components)

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        changes = tuple(name for name, _ in self._awkward(pipe))
        return Preview(changes, note="" if changes else "all weights are contiguous and aligned already")

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        awkward = dict(self._awkward(pipe))
        with Undo() as undo:
            for tensor in awkward.values():
                undo.set_data(tensor, tensor.data.clone(memory_format=torch.contiguous_format))
        return Applied(tuple(awkward), undo=undo)

    def _awkward(self, pipe: Pipeline) -> Iterator[tuple[str, torch.Tensor]]:
        seen: set[int] = set()
        for component, module in modules_of(pipe, self.components).items():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if id(tensor) not in seen and _is_awkward(tensor):
                    seen.add(id(tensor))
                    yield f"{component}.{name}", tensor


def _is_awkward(tensor: torch.Tensor) -> bool:
    if hasattr(tensor, "__tensor_flatten__") or tensor.layout != torch.strided or tensor.device.type == "meta":
        return False  # quantized tensors lay themselves out
    return not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT_BYTES != 0
