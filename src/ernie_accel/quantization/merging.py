"""Merge LoRAs into quantized layers: their originals are merged, and quantized anew in the same scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import nn

from ernie_accel.core.captured import comes_and_goes, plain_tensors
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.originals import ORIGINAL, MergedTerm, Original, log_made_anew
from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.kernels.low_rank import Merge, site_of
from ernie_accel.quantization.backend import plain_copy
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.correction import correction_of, dequantized, quantize_corrected
from ernie_accel.quantization.layers import RECEIPT, quantized_as, sqnr_db

_MERGING = ("merge", "unmerge")
_FUSE_ARGUMENTS = ("lora_scale", "safe_fusing", "adapter_names")


class _Half(Protocol):
    """One of the two matrices of an adapter."""

    weight: torch.Tensor


class LoraLayer(Protocol):
    """What is read of PEFT's layers (``peft.tuners.lora.LoraLayer``); other kinds have the first two alone."""

    active_adapters: list[str]
    adapter_layer_names: tuple[str, ...]
    scaling: dict[str, float]
    lora_A: Mapping[str, _Half]
    lora_B: Mapping[str, _Half]
    lora_bias: Mapping[str, bool]
    lora_variant: Mapping[str, object]


class Adapted(NamedTuple):
    """One of PEFT's layers around a quantized one, or around a part of it.

    Attributes:
        path: Of PEFT's layer within the model.
        module: PEFT's layer.
        quantized: What multiplies.
        start: First output feature of the layer within it.
    """

    path: str
    module: nn.Module
    quantized: nn.Module
    start: int

    @property
    def layer(self) -> LoraLayer:
        """PEFT's layer by what is read of it."""
        return cast(LoraLayer, self.module)

    @property
    def merged(self) -> list[str]:
        """The adapters that PEFT takes for merged; the list itself."""
        return cast("list[str]", vars(self.module).get("merged_adapters", []))

    @property
    def adapters(self) -> set[str]:
        """The adapters that the layer has, of whatever kind."""
        kinds = [self.module._modules.get(kind) for kind in self.layer.adapter_layer_names]
        return {name for kind in kinds if kind is not None for name in kind._modules}

    def to_merge(self, names: Sequence[str] | None) -> list[str]:
        """Return which of these adapters, or of the active ones, the layer has and has not merged."""
        wanted = self.layer.active_adapters if names is None else names
        return [name for name in wanted if name not in self.merged and name in self.adapters]


def adapted_layers(model: nn.Module) -> Iterator[Adapted]:
    """Yield PEFT's layers in `model` that are around quantized ones, or around parts of those."""
    for path, layer in model.named_modules():
        found = adapted(layer, path)
        if found is not None:
            yield found


def adapted(layer: nn.Module, path: str = "") -> Adapted | None:
    """Return what `layer` is if it is one of PEFT's around a quantized one, or around a part of one; else None."""
    base = layer._modules.get("base_layer")
    if base is None:
        return None
    site = site_of(layer)
    quantized, start = (base, 0) if site is None else (site.low_rank.product, site.place.start)
    return None if quantized_as(quantized) is None else Adapted(path, layer, quantized, start)


def stuck_reason(found: Adapted) -> str | None:
    """Return why what is merged into a quantized layer cannot be taken out of it; None if it can, or nothing is."""
    original = ORIGINAL.of(found.quantized)
    if not found.merged or (original is not None and original.has(found.start, found.merged)):
        return None
    return "its weight is quantized"


def _problem(found: Adapted, names: Sequence[str] = ()) -> str | None:
    """Return why a quantized layer cannot be made anew with these adapters in it, or without those it has; or None."""
    layer = found.layer
    if ORIGINAL.of(found.quantized) is None:
        return "what it was quantized from is gone"
    if stuck_reason(found) is not None:
        return "a LoRA was merged into it before it was quantized"
    held = [plain for tensor in held_by(found.quantized) for plain in plain_tensors(tensor)]
    if any(plain.is_meta or comes_and_goes(plain) for plain in held):
        return "its weight is kept elsewhere between calls"
    if "lora_A" not in found.module._modules:
        return f"it has a {type(layer).__name__}, which is no plain LoRA"
    for name in names:
        if name in getattr(layer, "lora_variant", ()):
            return f"{name!r} is a variant of LoRA, such as DoRA"
        if getattr(layer, "lora_bias", {}).get(name):
            return f"{name!r} has a bias"
        if not all(half[name].weight.isfinite().all() for half in (layer.lora_A, layer.lora_B)):
            return f"{name!r} has values that are not finite"
    return None


class MergesQuantized(StandInMethod):
    """`fuse_lora` of a model with quantized layers, which asks all of them before it changes one."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Merge the active adapters, or those that are named, into the weights.

        Raises:
            ErnieAccelError: A quantized layer cannot be made anew with them; nothing was changed.
        """
        model = cast(nn.Module, self.owner)
        given = dict(zip(_FUSE_ARGUMENTS, args, strict=False)) | kwargs
        names = cast("list[str] | None", given.get("adapter_names"))
        found = [(each, each.to_merge(names)) for each in adapted_layers(model)]
        found = [(each, wanted) for each, wanted in found if wanted]
        problems = {each.path: why for each, wanted in found if (why := _problem(each, wanted)) is not None}
        if problems:
            path, why = next(iter(problems.items()))
            raise ErnieAccelError(
                f"{type(model).__name__}: cannot merge a LoRA into quantized weights; nothing was changed "
                f"({len(problems)} of {len(found)} layers, {path}: {why}). Unmerged, it works. To merge it, quantize "
                "with Quantize(..., keep_originals=True), or merge it before optimizing."
            )
        bind_merging(model)
        before = [(each, _state_of(each)) for each, _ in found]
        originals = {each.quantized: ORIGINAL.required(each.quantized) for each, _ in found}
        begun: list[nn.Module] = []
        try:
            for original in originals.values():
                original.waits = True
            result = self.call_inner(*args, **kwargs)
            for layer, original in originals.items():
                begun.append(layer)
                _make_anew(layer, original, original.terms)
        except BaseException:
            _take_back(before, begun)
            raise
        finally:
            for original in originals.values():
                original.waits = False
        log_made_anew(self.name, "quantized", [o.sqnr_db for o in originals.values() if o.sqnr_db is not None])
        return result


class _State(NamedTuple):
    """What a merge changes of a layer of PEFT's around a quantized one, beside the quantized weight."""

    terms: tuple[MergedTerm, ...]
    merged: list[str]
    scaling: dict[str, float]


def _state_of(found: Adapted) -> _State:
    return _State(ORIGINAL.required(found.quantized).terms, [*found.merged], dict(found.layer.scaling))


def _put_state(found: Adapted, state: _State) -> None:
    ORIGINAL.required(found.quantized).terms = state.terms
    found.merged[:] = state.merged
    found.layer.scaling.update(state.scaling)


def _take_back(before: Sequence[tuple[Adapted, _State]], begun: Sequence[nn.Module]) -> None:
    """Give layers the state they had before a merge that failed, in place.

    Where the failure comes again, as with too little memory, the others stay merged: no layer says that it has what it
    lacks.

    Args:
        before: The layers, and their states.
        begun: Quantized layers that were made anew; the last one perhaps in part.
    """
    for each, state in before:
        if each.quantized not in begun[:-1]:
            _put_state(each, state)
    for layer in reversed(begun):
        states = [(each, state) for each, state in before if each.quantized is layer]
        _make_anew(layer, ORIGINAL.required(layer), states[0][1].terms)
        for each, state in states:
            _put_state(each, state)


class MergeQuantized(Merge):
    """`merge` or `unmerge` of PEFT's layer around a quantized one, or around a part of one."""

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Make the quantized weight anew, from the original with other adapters in it.

        Raises:
            ErnieAccelError: It cannot be; nothing was changed.
        """
        found = adapted(cast(nn.Module, self.owner))
        merges = self.name == "merge"
        if found is None or (not merges and not found.merged):  # which PEFT says
            super().__call__(*args, **kwargs)
            return
        given = dict(zip(("safe_merge", "adapter_names"), args, strict=False)) | kwargs
        wanted = cast("list[str] | None", given.get("adapter_names"))
        names = found.to_merge(_named_by_peft(found.module, wanted)) if merges else []
        if merges and not names:
            return
        why = _problem(found, names)
        if why is not None:
            raise ErnieAccelError(
                f"{self.name}: cannot change a quantized weight with which a LoRA is or would be merged: {why}"
            )
        original = ORIGINAL.required(found.quantized)
        terms = original.settled(found.start, found.merged)
        if merges:
            terms += tuple(_term(found, name) for name in names)
            if original.waits:
                original.terms = terms
            else:
                _make_anew(found.quantized, original, terms)
            found.merged.extend(names)
        else:
            out = {name for name in found.merged if name in found.adapters}
            terms = tuple(term for term in terms if term.start != found.start or term.name not in out)
            _make_anew(found.quantized, original, terms)
            found.merged.clear()


def _named_by_peft(layer: nn.Module, names: list[str] | None) -> list[str]:
    """Return which adapters are to be merged; PEFT warns of those that are."""
    from peft.tuners.tuners_utils import check_adapters_to_merge

    found: list[str] = check_adapters_to_merge(layer, names)
    return found


def _term(found: Adapted, name: str) -> MergedTerm:
    down, up = (half[name].weight.detach().to("cpu", copy=True) for half in (found.layer.lora_A, found.layer.lora_B))
    return MergedTerm(found.start, name, down, up, float(found.layer.scaling[name]))


def _make_anew(layer: nn.Module, original: Original, terms: tuple[MergedTerm, ...]) -> None:
    """Let a quantized layer hold its original with these terms, in the same memory, and remember them."""
    receipt, before = RECEIPT.required(layer), original.terms
    backend, scheme = BACKENDS[receipt.backend], receipt.scheme
    with torch.no_grad(), torch.inference_mode(False):
        original.terms = terms
        try:
            weight = original.merged()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if original.bias is not None:
                linear.bias = nn.Parameter(original.bias.to(original.where), requires_grad=False)
            linear = plain_copy(linear, weight).train(layer.training)
            if receipt.correction_rank:
                made = quantize_corrected(backend, scheme, linear, receipt.correction_rank)
            else:
                made = backend.quantize(scheme, linear)
            ratio = sqnr_db(weight, dequantized(backend, made))
            here = held_by(layer)[0].device
            if here.type != original.where.type:
                made = made.to(here)
            new, held = (backend.tensors(each) | correction_of(each) for each in (made, layer))
        except BaseException:
            original.terms = before
            raise
        for name, tensor in held.items():
            tensor.copy_(new[name])
        original.sqnr_db, original.bits = ratio, bits_of(layer)


def bind_merging(model: nn.Module) -> None:
    """Let PEFT's layers around quantized ones merge into those, in place; a no-op for those that do."""
    for found in adapted_layers(model):
        for name in _MERGING:
            if hasattr(found.module, name) and not isinstance(vars(found.module).get(name), MergeQuantized):
                setattr(found.module, name, MergeQuantized(found.module, name))


def unbind_merging(model: nn.Module) -> None:
    """Undo `bind_merging`, in place."""
    for layer in model.modules():
        for name in _MERGING:
            bound = vars(layer).get(name)
            if isinstance(bound, MergeQuantized):
                if bound.inner is None:
                    delattr(layer, name)
                else:
                    setattr(layer, name, bound.inner)


def held_by(layer: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of a layer."""
    return [*layer.parameters(), *layer.buffers()]


def bits_of(layer: nn.Module) -> tuple[str, int]:
    """Return the device of a layer's tensors, where some backends pack them in their own way, and a sum of all bits."""
    held = held_by(layer)
    return held[0].device.type if held else "", sum(map(_sum_of_bits, held))


def _sum_of_bits(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(map(_sum_of_bits, plain_tensors(tensor)))
    if tensor.device.type == "meta":
        return 0
    raw = tensor.detach().as_subclass(torch.Tensor).contiguous().reshape(-1).view(torch.uint8)
    whole = len(raw) // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())
