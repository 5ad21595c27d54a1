"""Cast the weights to another dtype, as ``from_pretrained(torch_dtype=...)`` would have loaded them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from ernie_accel.common.text import human_bytes
from ernie_accel.core.components import (
    Pipeline,
    Weight,
    is_float8,
    modules_of,
    weights_of,
)
from ernie_accel.core.context import Context
from ernie_accel.core.dtypes import DTYPES, dtype_name, unsupported_cast_reasons
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo


@dataclass(frozen=True, repr=False)
class CastDtype(Transform):
    """Cast all floating-point weights of the pipe.

    The result equals loading with ``torch_dtype``, bit for bit. Non-persistent buffers (RoPE frequencies) and modules
    that a model declares to keep in float32 are not cast.

    Pays:
        For a float32 pipe on any device with matrix units: it halves the memory, and the fast kernels need it. A
        checkpoint that was loaded in bfloat16 gains nothing. CPUs with bfloat16 units (avx512_bf16, amx) can be
        faster: ``ernie-accel demo`` measures yours.

    Attributes:
        dtype: "bfloat16", "float16" or "float32" (also "bf16", "fp16", "fp32").
        components: Component names; None for all.
        keep_originals: Keep weights that lose bits in host memory, so that ``restore`` is exact. Weights that survive
            the round trip (of a bfloat16 checkpoint loaded in float32) are never kept.
    """

    phase: ClassVar[Phase] = Phase.DTYPE
    slot: ClassVar[str] = "dtype"
    effect: ClassVar[Effect] = Effect.LOSSY

    dtype: str
    components: tuple[str, ...] | None = field(default=None, kw_only=True)
    keep_originals: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @property
    def floor_db(self) -> float:
        """SQNR of the final latents against the other dtype, same seed; earned on the embedded model in bfloat16."""
        return 25.0

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return unsupported_cast_reasons(pipe, context, self.dtype, self.components)

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        todo = dict(self._weights_to_cast(pipe, context))
        if not todo:
            return Preview((), note=f"all weights are {self.dtype} already")
        keeps = "keeps weights that lose bits in host memory for restore()" if self.keep_originals else ""
        return Preview(tuple(todo), keeps)

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        todo = self._weights_to_cast(pipe, context)
        names = {f"{component}.{weight.path}" for component, weights in todo for weight in weights}
        return context.planned(pipe).cast(DTYPES[self.dtype], names.__contains__)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        todo = dict(self._weights_to_cast(pipe, context))
        lossy_bytes = 0
        with Undo() as undo:
            for weight in (weight for weights in todo.values() for weight in weights):
                tensor = weight.tensor
                cast = tensor.data.to(DTYPES[self.dtype])
                reversible = torch.equal(cast.to(tensor.dtype), tensor.data)
                lossy_bytes += 0 if reversible else tensor.numel() * tensor.element_size()
                if not reversible and self.keep_originals:
                    undo.set_data(weight, cast, keep_on="cpu")
                    continue
                if not reversible:
                    undo.give_up("keep_originals=False: the bits that the cast dropped are gone")
                undo.push(partial(_cast_to, weight, tensor.dtype))
                tensor.data = cast
        if undo.no_way_back is not None:
            return Applied(tuple(todo), no_undo=undo.no_way_back)
        kept = f"keeps {human_bytes(lossy_bytes)} of originals in host memory for restore()" if lossy_bytes else ""
        return Applied(tuple(todo), undo=undo, note=kept)

    def _weights_to_cast(self, pipe: Pipeline, context: Context) -> Iterator[tuple[str, list[Weight]]]:
        """Yield (component, its weights that will be of another dtype then) for every component that has any."""
        planned = context.planned(pipe).weights
        for name, module in modules_of(pipe, self.components).items():
            stays = _float32_modules(module)
            weights = [
                weight
                for weight in weights_of(module)
                if weight.tensor.is_floating_point()
                and (now := planned.get(f"{name}.{weight.path}")) is not None
                and now.dtype != DTYPES[self.dtype]
                and now.stored_as is None
                and not is_float8(weight.tensor.dtype)
                and not stays.intersection(weight.path.split("."))
            ]
            if weights:
                yield name, weights


def _float32_modules(module: torch.nn.Module) -> set[str]:
    """Return the module names that a diffusers or transformers model declares to keep in float32."""
    declared = (getattr(module, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    return {name for names in declared for name in names}


def _cast_to(weight: Weight, dtype: torch.dtype) -> None:
    weight.tensor.data = weight.tensor.data.to(dtype)
