"""Cast the weights to another dtype, as ``from_pretrained(torch_dtype=...)`` would have loaded them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from ernie_accel.core.components import FLOAT8_DTYPES, Pipeline, absent_components, modules_of, pipe_bytes, weights_of
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.text import human_bytes
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, repr=False)
class CastDtype(Transform):
    """Cast all floating-point weights of the pipe.

    Equal, bit for bit, to loading with ``torch_dtype``: non-persistent buffers (RoPE frequencies) and the modules a
    model declares to keep in float32 stay as they are.

    Attributes:
        dtype: "bfloat16", "float16" or "float32" (also "bf16", "fp16", "fp32").
        components: Component names; None for all.
        keep_originals: Keep weights that lose bits in host memory, so that ``restore`` is exact. Weights that survive
            the way there and back (a bfloat16 checkpoint loaded in float32) are never kept.
    """

    phase: ClassVar[Phase] = Phase.DTYPE
    slot: ClassVar[str] = "dtype"
    effect: ClassVar[Effect] = Effect.LOSSY

    dtype: str
    components: tuple[str, ...] | None = field(default=None, kw_only=True)
    keep_originals: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        name = _ALIASES.get(self.dtype, self.dtype)
        if name not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "dtype", name)

    @property
    def floor_db(self) -> float:
        """SQNR of the final latents against the other dtype, same seed; earned on the embedded model in bfloat16."""
        return 25.0

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = absent_components(pipe, self.components)
        if self.dtype == "bfloat16" and context.capability is not None and context.capability < (8, 0):
            have = "{}.{}".format(*context.capability)
            reasons.append(f"bfloat16 needs CUDA compute capability >= 8.0; this device has {have}: use 'float16'")
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        todo = dict(self._to_cast(pipe))
        if not todo:
            return Preview((), note=f"all weights are {self.dtype} already")
        size = DTYPES[self.dtype].itemsize
        saved = sum(t.numel() * (t.element_size() - size) for tensors in todo.values() for t in tensors)
        keeps = "keeps weights that lose bits in host memory for restore()" if self.keep_originals else ""
        return Preview(tuple(todo), pipe_bytes(pipe) - saved, keeps)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        todo = dict(self._to_cast(pipe))
        lossy_bytes = 0
        with Undo() as undo:
            for tensor in (tensor for tensors in todo.values() for tensor in tensors):
                cast = tensor.data.to(DTYPES[self.dtype])
                reversible = torch.equal(cast.to(tensor.dtype), tensor.data)
                if reversible or not self.keep_originals:
                    undo.push(partial(_cast_to, tensor, tensor.dtype))
                    tensor.data = cast
                else:
                    undo.set_data(tensor, cast, keep_on="cpu")
                lossy_bytes += 0 if reversible else tensor.numel() * tensor.element_size()
        if lossy_bytes and not self.keep_originals:
            return Applied(tuple(todo), no_undo="keep_originals=False: the bits that the cast dropped are gone")
        kept = f"keeps {human_bytes(lossy_bytes)} of originals in host memory for restore()" if lossy_bytes else ""
        return Applied(tuple(todo), undo=undo, note=kept)

    def _to_cast(self, pipe: Pipeline) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Yield (component, its tensors that are to be cast) for every component that has any."""
        for name, module in modules_of(pipe, self.components).items():
            stays = _float32_modules(module)
            tensors = [
                tensor
                for path, tensor in weights_of(module)
                if tensor.is_floating_point()
                and tensor.dtype != DTYPES[self.dtype]
                and tensor.dtype not in FLOAT8_DTYPES
                and not hasattr(tensor, "__tensor_flatten__")  # a quantized tensor keeps its storage
                and not stays.intersection(path.split("."))
            ]
            if tensors:
                yield name, tensors


def _float32_modules(module: torch.nn.Module) -> set[str]:
    """Return the module names that a diffusers or transformers model declares to keep in float32."""
    declared = (getattr(module, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    return {name for names in declared for name in names}


def _cast_to(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    tensor.data = tensor.data.to(dtype)
