"""Cast the weights to another dtype, as ``from_pretrained(torch_dtype=...)`` would have loaded them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from ernie_accel.common.language import said
from ernie_accel.common.text import human_bytes
from ernie_accel.core.components import (
    Pipeline,
    Weight,
    alignment_of,
    is_float8,
    modules_of,
    weights_of,
    with_alignment,
)
from ernie_accel.core.context import Context
from ernie_accel.core.dtypes import DTYPES, dtype_name, unsupported_cast_reasons
from ernie_accel.core.errors import RestoreWarning
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of
from ernie_accel.quantization.backend import defined_in
from ernie_accel.quantization.layers import quantized_as


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
        """SQNR of the final latents against the other dtype, same seed; tested on the embedded model in bfloat16."""
        return 25.0

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = unsupported_cast_reasons(pipe, context, self.dtype, self.components)
        return reasons or [*self._vae_reasons(pipe, context), *self._quantized_component_reasons(pipe, context)]

    def _vae_reasons(self, pipe: Pipeline, context: Context) -> Iterator[str]:
        """Yield why the VAE cannot be cast: calls of this pipeline give it pictures in another dtype."""
        needs = family_of(pipe).vae_dtypes.get(type(pipe).__name__, self.dtype)
        if needs != self.dtype and "vae" in dict(self._weights_to_cast(pipe, context)):
            yield said(
                "calls of {pipe} give the VAE pictures in {needs}, whatever its weights are in: leave it out with "
                "components={others!r}",
                pipe=type(pipe).__name__,
                needs=needs,
                others=tuple(name for name in modules_of(pipe, self.components) if name != "vae"),
            )

    def _quantized_component_reasons(self, pipe: Pipeline, context: Context) -> Iterator[str]:
        """Yield why components cannot be cast: their quantized layers would stay, and take another dtype."""
        for name, _ in self._weights_to_cast(pipe, context):
            stored = ((path, quantized_as(part)) for path, part in modules_of(pipe)[name].named_modules())
            path, how = next(((path, how) for path, how in stored if how is not None), ("", None))
            if how is not None:
                others = tuple(other for other in modules_of(pipe, self.components) if other != name)
                yield (
                    said(
                        "{name} is quantized ({path} as {how}), and its layers would still compute in the dtype they "
                        "were made for: load it with that dtype, or leave it out with components={others!r}",
                        name=name,
                        path=path,
                        how=how,
                        others=others,
                    )
                )

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        todo = dict(self._weights_to_cast(pipe, context))
        if not todo:
            return Preview((), note=said("all weights are {dtype} already", dtype=self.dtype))
        keeps = said("keeps weights that lose bits in host memory for restore()") if self.keep_originals else ""
        return Preview(tuple(todo), keeps)

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned = context.planned(pipe)
        for component, pairs in self._weights_to_cast(pipe, context):
            for dtype in {dtype for _, dtype in pairs}:
                names = {f"{component}.{weight.path}" for weight, to in pairs if to == dtype}
                planned = planned.cast(dtype, names.__contains__)
        return planned

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        todo = dict(self._weights_to_cast(pipe, context))
        lossy_bytes = 0
        with Undo() as undo:
            for name, pairs in todo.items():  # first, so that it is undone last
                undo.push(
                    partial(_follow, pipe, name, getattr(pipe, name), DTYPES[self.dtype], pairs[0][0].tensor.dtype)
                )
            every = [pair for pairs in todo.values() for pair in pairs]
            for twin, first, dtype in _held_twice(every):
                original = twin.tensor.data.to("cpu") if self.keep_originals else None
                undo.push(partial(_cast_back_apart, twin, first, dtype, twin.tensor.dtype, original))
            for weight, dtype in every:
                tensor = weight.tensor
                cast = tensor.data.to(dtype)
                reversible = torch.equal(cast.to(tensor.dtype), tensor.data)
                lossy_bytes += 0 if reversible else tensor.numel() * tensor.element_size()
                if not reversible and self.keep_originals:
                    undo.set_data(weight, cast, keep_on="cpu")
                    continue
                if not reversible:
                    undo.give_up(said("keep_originals=False: the bits that the cast dropped are gone"))
                undo.push(partial(_cast_back, weight, dtype, tensor.dtype, alignment_of(tensor)))
                tensor.data = cast
        if undo.no_way_back is not None:
            return Applied(tuple(todo), no_undo=undo.no_way_back)
        kept = (
            said("keeps {size} of originals in host memory for restore()", size=human_bytes(lossy_bytes))
            if lossy_bytes
            else ""
        )
        return Applied(tuple(todo), undo=undo, note=kept)

    def _weights_to_cast(
        self, pipe: Pipeline, context: Context
    ) -> Iterator[tuple[str, list[tuple[Weight, torch.dtype]]]]:
        """Yield (component, [(weight that is of another dtype, its new one)]) for every component that has any."""
        planned = context.planned(pipe).weights
        for name, module in modules_of(pipe, self.components).items():
            stays = _keeps_float32(module, DTYPES[self.dtype])
            weights = [
                (weight, dtype)
                for weight in weights_of(module)
                if weight.tensor.is_floating_point()
                and (now := planned.get(f"{name}.{weight.path}")) is not None
                and now.dtype != (dtype := torch.float32 if stays(weight.path) else DTYPES[self.dtype])
                and now.stored_as is None
                and not is_float8(weight.tensor.dtype)
            ]
            if weights:
                yield name, weights


def _keeps_float32(module: torch.nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return which weights (by path) ``from_pretrained`` loads in float32, even if half precision is requested.

    Diffusers matches the names of modules (``load_model_dict_into_meta``), and transformers matches patterns anywhere.
    Patterns that are not "strict" apply to float16 only (``PreTrainedModel._get_dtype_plan``): the ``wo`` of T5
    overflows in float16, not in bfloat16.
    """
    plain, strict = (
        set(getattr(module, name, None) or ()) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    )
    if not defined_in(module, "transformers"):
        return lambda path: not plain.isdisjoint(path.split("."))
    patterns = (strict | plain if dtype == torch.float16 else strict) if dtype != torch.float32 else set()
    return lambda path: any(re.search(pattern.replace("*", ".*"), path) for pattern in patterns)


def _cast_back(weight: Weight, cast: torch.dtype, before: torch.dtype, alignment: int) -> None:
    """Give a weight that was `cast` its dtype `before`; one that other code has cast since keeps that code's dtype."""
    now = getattr(weight.owner, weight.name, None)  # ``module.to`` replaces buffers
    if isinstance(now, torch.Tensor) and not now.is_meta and now.dtype == cast:
        now.data = with_alignment(now.data.to(before), alignment)


def _held_twice(weights: list[tuple[Weight, torch.dtype]]) -> Iterator[tuple[Weight, Weight, torch.dtype]]:
    """Yield the other places of tensors that several modules hold, each with the first place and the new dtype.

    A ControlNet of Z-Image has the padding tokens of the transformer.
    """
    first: dict[int, Weight] = {}
    for weight, dtype in weights:
        place = first.setdefault(id(weight.tensor), weight)
        if place.owner is not weight.owner:
            yield weight, place, dtype


def _cast_back_apart(
    twin: Weight, first: Weight, cast: torch.dtype, before: torch.dtype, kept: torch.Tensor | None
) -> None:
    """Give a tensor that was held in two places its dtype and values back where a script has parted the two."""
    now = getattr(twin.owner, twin.name, None)
    if not isinstance(now, torch.Tensor) or now is getattr(first.owner, first.name, None):
        return
    if now.is_meta or now.dtype != cast:
        return
    unchanged = kept is not None and torch.equal(kept.to(now.device, cast), now.data)
    now.data = kept.to(now.device) if kept is not None and unchanged else now.data.to(before)


def _follow(pipe: Pipeline, name: str, cast: torch.nn.Module, dtype: torch.dtype, before: torch.dtype) -> None:
    """Give what a script made of a component that was `cast` to `dtype` the dtype `before`, in which the rest computes.

    That is another component in its place, in the dtype that the pipe had, or layerwise casting that computes in it.
    """
    now = getattr(pipe, name, None)
    if not isinstance(now, torch.nn.Module):
        return
    for part in now.modules():
        for hook in library_hooks(part).named("layerwise_casting"):
            if hook.compute_dtype == dtype:
                hook.compute_dtype = before
                part.to(hook.storage_dtype)
    stays = _keeps_float32(now, dtype)
    given = {
        weight.tensor.dtype
        for weight in weights_of(now)
        if weight.tensor.is_floating_point() and not stays(weight.path)
    }
    if now is not cast and given == {dtype}:
        now.to(before)
        warnings.warn(
            f"restore cast {name} to {before}, as the rest of the pipe: it was replaced after `optimize`",
            RestoreWarning,
            stacklevel=2,
        )
