"""The transform that quantizes linear layers, whatever the backend."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ernie_accel.core.components import Pipeline, absent_components, modules_of, pipe_bytes, tensor_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.text import human_bytes
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.transforms.dtype import CastDtype
from ernie_accel.transforms.quantize.backend import SCHEMES, Backend
from ernie_accel.transforms.quantize.torchao import TorchAO

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TorchAO(),)}


@dataclass(frozen=True, repr=False)
class Quantize(Transform):
    """Quantize the linear layers of the repeated blocks; leave out what the family knows to break.

    Attributes:
        scheme: "fp8" (dynamic per-row activations x per-row weights), "fp8-weight-only", "int8" (dynamic),
            "int8-weight-only".
        backend: The library that does it; "auto" takes the first that has the scheme.
        components: Component names.
        exclude: Regular expressions of layers to leave out, matched from the start of the path within the component;
            None takes the family's list (for a pipe of no known family: nothing outside repeated blocks).
        keep_originals: Keep the unquantized weights in host memory, so that ``restore`` is exact.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZE
    slot: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    extra: ClassVar[str | None] = "torchao"

    scheme: str
    backend: str = field(default="auto", kw_only=True)
    components: tuple[str, ...] = field(default=("transformer",), kw_only=True)
    exclude: tuple[str, ...] | None = field(default=None, kw_only=True)
    keep_originals: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UnknownNameError("scheme", self.scheme, SCHEMES)
        if self.backend not in ("auto", *BACKENDS):
            raise UnknownNameError("backend", self.backend, ("auto", *BACKENDS))

    @property
    def floor_db(self) -> float:
        """The scheme's promise; see `Scheme`."""
        return SCHEMES[self.scheme].floor_db

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = self._backend().unsupported(SCHEMES[self.scheme], context)
        absent = absent_components(pipe, self.components)
        if absent:
            return reasons + absent
        layers = dict(self._layers(pipe))
        if not any(reason is None for _, reason in layers.values()):
            reasons.append(f"{', '.join(self.components)}: no linear layer can be quantized")
        cast = context.planned_one(CastDtype)
        if self.scheme == "fp8" and cast is None:
            wrong = {str(linear.weight.dtype) for linear, why in layers.values() if why is None}
            wrong -= {"torch.bfloat16"}
            if wrong:
                reasons.append(f"fp8 starts from bfloat16 weights, found {', '.join(wrong)}: add CastDtype('bfloat16')")
        if self.scheme == "fp8" and cast is not None and cast.dtype != "bfloat16":
            reasons.append(f"fp8 starts from bfloat16 weights, and {cast!r} comes before: use CastDtype('bfloat16')")
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        layers = dict(self._layers(pipe))
        todo = {name: linear for name, (linear, why) in layers.items() if why is None}
        cast = context.planned_one(CastDtype)
        total = pipe_bytes(pipe) if cast is None else cast.preview(pipe, context).bytes_after or pipe_bytes(pipe)
        width = 2 if cast is not None and cast.dtype != "float32" else None
        now = sum(linear.weight.numel() * (width or linear.weight.element_size()) for linear in todo.values())
        scheme = SCHEMES[self.scheme]
        then = sum(int(x.weight.numel() * scheme.bytes_per_weight) + 4 * x.out_features for x in todo.values())
        left_out = len(layers) - len(todo)
        note = f"by {self._backend().name}; leaves {left_out} of {len(layers)} linear layers as they are"
        return Preview(tuple(todo), total - now + then, note)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        backend, scheme = self._backend(), SCHEMES[self.scheme]
        changed, skipped, kept_bytes = [], {}, 0
        with Undo() as undo:
            for name, (linear, why_not) in self._layers(pipe):
                if why_not is not None:
                    skipped[name] = why_not
                    continue
                undo.push(_putter_back(linear, self.keep_originals))
                kept_bytes += tensor_bytes(linear.weight)
                backend.quantize(scheme, linear)
                changed.append(name)
        if not self.keep_originals:
            return Applied(tuple(changed), no_undo="keep_originals=False: the weights are gone", skipped=skipped)
        note = f"keeps {human_bytes(kept_bytes)} of originals in host memory for restore()"
        return Applied(tuple(changed), undo=undo, skipped=skipped, note=note)

    def _backend(self) -> Backend:
        if self.backend != "auto":
            return BACKENDS[self.backend]
        return next(backend for backend in BACKENDS.values() if self.scheme in backend.schemes)

    def _layers(self, pipe: Pipeline) -> Iterator[tuple[str, tuple[torch.nn.Linear, str | None]]]:
        """Yield (path, (layer, why it is left out or None)) for every linear layer of the components."""
        from ernie_accel.families import family_of

        family = family_of(pipe)
        backend, scheme = self._backend(), SCHEMES[self.scheme]
        for component, module in modules_of(pipe, self.components).items():
            exclude, why = self.exclude, "excluded"
            if exclude is None and family is not None and component in family.keep_precise:
                exclude, why = family.keep_precise[component], f"kept precise in {family.name}"
            for path, part in module.named_modules():
                if isinstance(part, torch.nn.Linear):
                    out = why if any(re.match(pattern, path) for pattern in exclude or ()) else None
                    yield f"{component}.{path}", (part, out or backend.layer_problem(scheme, part))


def _putter_back(linear: torch.nn.Linear, keep: bool) -> Callable[[], None]:
    original = linear.weight
    data = original.data.cpu() if keep else original.data

    def put_back() -> None:
        original.data = data.to(linear.weight.device)
        linear.weight = original

    return put_back
