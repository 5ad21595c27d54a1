"""Compute in half precision without casting the weights: torch's autocast around every call of the pipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from ernie_accel.common.language import listed, said
from ernie_accel.core.components import Pipeline, device_of, modules_of
from ernie_accel.core.context import Context
from ernie_accel.core.dtypes import DTYPES, unsupported_cast_reasons
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.stand_in import Bound
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import Arguments, Call, wrap_call

#: Classes of models that do not run under autocast -> why.
_BREAKS = {
    "ZImageControlNetModel": said("writes its float32 padding tokens into results of autocast, of another dtype")
}
HALF = tuple(name for name in DTYPES if name != "float32")


@dataclass(frozen=True, repr=False)
class Autocast(Transform):
    """Run every call of the pipe under ``torch.autocast``: matrix products and convolutions in half precision.

    Weights, norms, RoPE angles and the scheduler's arithmetic stay in float32. Undoing needs no copies. Once a script
    has cast all weights to half precision, calls run as stock's do.

    Pays:
        For a float32 pipe whose weights have to stay in float32, for example while it is being trained. Otherwise
        ``CastDtype`` is better: it needs half the memory, and casts once instead of in every call.

    Attributes:
        dtype: "bfloat16" or "float16".
    """

    phase: ClassVar[Phase] = Phase.CALL
    slot: ClassVar[str] = "autocast"
    effect: ClassVar[Effect] = Effect.LOSSY

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in HALF:
            raise UnknownNameError("dtype of autocast", self.dtype, HALF)

    @property
    def floor_db(self) -> float:
        """SQNR of the final latents against float32, same seed."""
        return 25.0

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = unsupported_cast_reasons(pipe, context, self.dtype)
        for name, module in modules_of(pipe).items():
            kind = type(module).__name__
            if kind in _BREAKS:
                reasons.append(
                    said(
                        "{name} is a {kind}, which {breaks}: use CastDtype({dtype!r})",
                        name=name,
                        kind=kind,
                        breaks=_BREAKS[kind],
                        dtype=self.dtype,
                    )
                )
        planned = context.planned(pipe)
        found = {planned.dtype_of(name) for name, module in modules_of(pipe).items() if hasattr(module, "dtype")}
        dtypes = {str(dtype).removeprefix("torch.") for dtype in found - {None}}
        if dtypes and "float32" not in dtypes:
            reasons.append(
                said("the weights are {dtypes}: autocast is for float32 weights", dtypes=listed(sorted(dtypes)))
            )
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return Preview(self._changes())

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), autocast=self.dtype)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        with Undo() as undo:
            wrap_call(pipe, "autocast", Bound(partial(_autocast, dtype=DTYPES[self.dtype]), pipe), undo)
        return Applied(self._changes(), undo=undo)

    def _changes(self) -> tuple[str, ...]:
        return (said("products float32 -> {dtype}", dtype=self.dtype),)


def _autocast(pipe: Pipeline, call: Call, arguments: Arguments, *, dtype: torch.dtype) -> object:
    """Call under autocast, on the device where the pipe is by now; without it once a script has cast the weights.

    Torch's kernels for a norm in bfloat16 refuse weights in float16, and what is in half precision needs no autocast.
    """
    if not any(weight.dtype is torch.float32 for module in modules_of(pipe).values() for weight in module.parameters()):
        return call(arguments)
    with torch.autocast(device_of(pipe).type, dtype):
        return call(arguments)
