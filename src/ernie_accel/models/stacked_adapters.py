"""LoRAs on compiled blocks: what is traced of PEFT's layers names no adapter, so that a swap compiles nothing.

PEFT's own forward looks adapters up by name. Traced, each name, scale and rank is a graph of its own. Here the active
adapters of a layer are stacked into one pair of matrices, zeros up to the same sum of ranks in all layers of a model,
and a traced layer reads those.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.common.notes import Note
from ernie_accel.core.captured import comes_and_goes, version_of
from ernie_accel.core.components import Pipeline
from ernie_accel.core.library_hooks import NO_HOOKS, library_hooks
from ernie_accel.core.undo import Undo
from ernie_accel.kernels.low_rank import RANK_MULTIPLE_OF, site_of
from ernie_accel.models.before_blocks import update_before_blocks
from ernie_accel.models.compile_cache import drop_old_graphs

#: Name of the child of PEFT's layer that has the matrices.
_STACKED = "stacked"
#: Attribute of the class of layers that run by it: their class in PEFT.
_OF = "_ernie_accel_kind"
_SEEN = Note("stacked_seen", list, "model", "what its layers of PEFT's were like when their adapters were stacked")
_UPDATING = threading.Lock()


class _Term(NamedTuple):
    """What one adapter adds to a layer: ``x @ down.T @ up.T * scale``."""

    down: Tensor
    up: Tensor
    scale: float


class _Mergeable(Protocol):
    def unmerge(self) -> None:
        """Take merged adapters out of the weight."""


class StackedAdapters(nn.Module):
    """What the active adapters of one of PEFT's layers add.

    Attributes:
        down: [R, K] in the dtype of the adapters, R being the same for all layers of a model; None: no layer has any.
        up: [N, R], with the scales of the adapters in it.
        serves: Whether they are all that the layer does beside its base; else PEFT's own forward runs.
    """

    down: Tensor | None
    up: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        # Buffers, so that they move with the layer; they are in no state dict.
        self.register_buffer("down", None, persistent=False)
        self.register_buffer("up", None, persistent=False)
        self.serves = False

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the base's result [..., N] with what the adapters make of its input [..., K], in its dtype."""
        if self.down is None or self.up is None:
            return out
        return (out + F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)).to(out.dtype)

    def write(self, terms: Sequence[_Term], shape: tuple[int, int, int], like: Tensor) -> None:
        """Stack `terms`, in place where the memory has the shape already.

        Args:
            terms: What the active adapters add.
            shape: Inputs and outputs of the layer, and the sum of ranks that there is room for, with zeros in the rest;
                0 for no matrices.
            like: A tensor with the dtype and device that the matrices have.
        """
        columns, rows, ranks = shape
        if not ranks:
            self.down = self.up = None
            return
        down, up = self.down, self.up
        fits = down is not None and (len(down), down.dtype, down.device) == (ranks, like.dtype, like.device)
        if down is None or up is None or not fits or comes_and_goes(down) or comes_and_goes(up):
            down, up = like.new_zeros(ranks, columns), like.new_zeros(rows, ranks)
            self.down, self.up = down, up
        at = 0
        for term in terms:
            rank = len(term.down)
            down[at : at + rank].copy_(term.down)
            up[:, at : at + rank].copy_(term.up.float() * term.scale)
            at += rank
        down[at:].zero_()
        up[:, at:].zero_()


def _empty(kind: type[nn.Module]) -> nn.Module:
    """Return a layer of this kind for a copy, which fills it."""
    return kind.__new__(kind)


@functools.cache
def _by_stacked(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of PEFT's layers of one kind that run by their `StackedAdapters`.

    A class, because ``torch.compile`` shares no graph between modules that have a forward of their own. It passes for
    the kind itself, which copies and pickles are of.
    """

    def forward(self: nn.Module, x: Tensor, *args: object, **kwargs: object) -> object:
        stacked = cast(StackedAdapters, self.stacked)
        if not stacked.serves or torch.is_grad_enabled():  # PEFT's adapters can be trained
            return kind.forward(self, x, *args, **kwargs)
        return stacked(x, cast(nn.Module, self.base_layer)(x, *args, **kwargs))

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> tuple[object, ...]:
        *_, state = cast(tuple[Any, ...], kind.__reduce_ex__(self, protocol))[:3]
        children = {name: child for name, child in state["_modules"].items() if name != _STACKED}
        return _empty, (kind,), {**state, "_modules": children}

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "forward": forward, "__reduce_ex__": __reduce_ex__, _OF: kind})


def stack_in_place_of_names(pipe: Pipeline, model: nn.Module, undo: Undo) -> None:
    """Let PEFT's layers in compiled blocks of `model`, a part of `pipe`, run by `StackedAdapters`, in place.

    Later ones, too.
    """
    undo.push(partial(_unstack, model))
    update_before_blocks(pipe, model, update_stacked, undo)


def update_stacked(model: nn.Module, *_: object) -> None:
    """Bring what is stacked up to date, outside of what is compiled; see `update_before_blocks`."""
    from ernie_accel.models.outside_graphs import outside_graphs

    outside_graphs(partial(stack, model))


def forget_stacked(model: nn.Module) -> None:
    """Stack everything anew before the next forward: values were written where torch does not count."""
    _SEEN.drop(model)


def stack(model: nn.Module) -> None:
    """Stack the active adapters of PEFT's layers within compiled blocks, in place, where something changed."""
    layers: list[nn.Module] = []
    others: list[nn.Module] = []
    compiled: set[type[nn.Module]] = set()
    for layer, is_compiled in _peft_layers(model, compiled):
        site = site_of(layer)
        if not is_compiled and _STACKED in layer._modules:  # its block was compiled
            _unstack_layer(layer)
        if is_compiled and (site is None or site.is_whole):
            layers.append(layer)
        else:  # or the block calls the product that it is a part of
            others.append(layer)
    # Before adapters are read: what another thread changes meanwhile is seen at the next forward.
    seen: list[object] = [_look_at(layer) for layer in (*layers, *others)]
    if _SEEN.of(model) == [*seen, *map(_memory_of, layers)] and all(_STACKED in layer._modules for layer in layers):
        return
    drop_old_graphs(compiled)
    _SEEN.drop(model)  # until all is written
    # Not of inference mode, or nobody could write into them later.
    with _UPDATING, torch.inference_mode(False), torch.no_grad():
        _write(layers)
    _SEEN.put(model, [*seen, *map(_memory_of, layers)])


def _write(layers: list[nn.Module]) -> None:
    found: list[tuple[nn.Module, StackedAdapters, list[_Term]]] = []
    for layer in layers:
        stacked, state = _stacked_of(layer), vars(layer)
        if state["_disable_adapters"] and state["merged_adapters"]:
            cast(_Mergeable, layer).unmerge()  # as PEFT does when the layer is called
        stacked.serves = _is_plain(layer)
        found.append((layer, stacked, list(_terms_of(layer)) if stacked.serves else []))
    ranks = max((sum(len(term.down) for term in terms) for *_, terms in found), default=0)
    room = 0 if not ranks else max(RANK_MULTIPLE_OF, 1 << (ranks - 1).bit_length())
    some = [term for *_, terms in found for term in terms][:1]
    for layer, stacked, terms in found:
        state = vars(layer)
        shape = (state["in_features"], state["out_features"], room) if stacked.serves else (0, 0, 0)
        stacked.write(terms, shape, _like(layer, terms, some))


def _like(layer: nn.Module, terms: Sequence[_Term], others: Sequence[_Term]) -> Tensor:
    """Return an empty tensor with the dtype of what is stacked, where the layer is; without `terms`, as `others`."""
    counted = terms or others
    if not counted:
        return torch.empty(0)
    dtype = counted[0].down.dtype
    for term in counted:
        dtype = torch.promote_types(dtype, torch.promote_types(term.down.dtype, term.up.dtype))
    held = (term.down for term in terms) if terms else (*layer.parameters(), *layer.buffers())
    return torch.empty(0, dtype=dtype, device=next(iter(held), counted[0].down).device)


def _stacked_of(layer: nn.Module) -> StackedAdapters:
    """Return what stacks the adapters of a layer, which is made to run by it, in place."""
    found = layer._modules.get(_STACKED)
    if not isinstance(found, StackedAdapters):
        found = StackedAdapters()
        layer._modules[_STACKED] = found
        layer.__class__ = _by_stacked(cast(Hashable, type(layer)))
    return found


def _unstack(model: nn.Module) -> None:
    for layer, _ in _peft_layers(model, set()):
        _unstack_layer(layer)
    _SEEN.drop(model)


def _unstack_layer(layer: nn.Module) -> None:
    kind = vars(type(layer)).get(_OF)
    if kind is not None:
        layer.__class__ = kind
    layer._modules.pop(_STACKED, None)


def _peft_layers(model: nn.Module, compiled: set[type[nn.Module]]) -> Iterator[tuple[nn.Module, bool]]:
    """Yield PEFT's layers within `model`, and whether each is in something that is compiled and has its weights there.

    Args:
        model: It may be compiled itself.
        compiled: Gets the classes of what is.
    """
    todo: list[tuple[nn.Module, bool, bool]] = [(model, False, True)]
    while todo:
        part, is_compiled, stays = todo.pop()
        children = part._modules
        if "base_layer" in children and "_active_adapter" in vars(part):
            yield part, is_compiled and stays
            continue
        if part._compiled_call_impl is not None:
            is_compiled = True
            compiled.add(type(part))
        # Until such a block runs, its weights are elsewhere, or hold nothing.
        stays = stays and not library_hooks(part).named("group_offloading")
        todo += [(child, is_compiled, stays) for child in children.values() if child is not None]


def _look_at(layer: nn.Module) -> list[object]:
    """Return what of a layer of PEFT's decides what is stacked, as plain data; it is asked for before each forward."""
    state = layer.__dict__
    active, scaling, modules = state["_active_adapter"], state.get("scaling", {}), state["_modules"]
    seen: list[object] = [id(layer), state["training"], state["_disable_adapters"], tuple(state["merged_adapters"])]
    if modules.get("lora_A") is None or modules.get("lora_B") is None:
        return seen
    downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
    for adapter in (active,) if isinstance(active, str) else active:
        if adapter in downs and adapter in ups:
            seen += (adapter, scaling.get(adapter), adapter in state.get("lora_variant", ()))
            for half in (downs[adapter], ups[adapter]):
                weight = half._parameters.get("weight")
                if weight is not None:
                    seen += (weight.data_ptr(), version_of(weight), weight.device, comes_and_goes(weight))
    return seen


def _memory_of(layer: nn.Module) -> object:
    """Return where the matrices of a layer are, as plain data; None if it has none."""
    stacked = layer._modules.get(_STACKED)
    down = None if stacked is None else stacked._buffers["down"]
    return None if down is None else (down.device, down.dtype, comes_and_goes(down))


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer of PEFT's adds nothing but the products of plain matrices that are where they belong."""
    state, modules = vars(layer), layer._modules
    downs, ups = modules.get("lora_A"), modules.get("lora_B")
    if not type(layer).__module__.startswith("peft.tuners.lora.") or downs is None or ups is None:
        return False
    if state.get("lora_variant") or "in_features" not in state or library_hooks(layer) is not NO_HOOKS:
        return False
    dropouts = modules.get("lora_dropout")
    if layer.training and any(type(each) is not nn.Identity for each in getattr(dropouts, "_modules", {}).values()):
        return False
    for half in (*downs._modules.values(), *ups._modules.values()):
        if type(half) is not nn.Linear or half.bias is not None or library_hooks(half) is not NO_HOOKS:
            return False
        if comes_and_goes(half.weight) or half.weight.is_meta or not half.weight.dtype.itemsize > 1:
            return False
    return downs._modules.keys() == ups._modules.keys()


def _terms_of(layer: nn.Module) -> Iterator[_Term]:
    """Yield what the active adapters of a layer add; merged ones are in its weight."""
    state = vars(layer)
    if state["_disable_adapters"] or state["merged_adapters"]:
        return
    active, downs, ups = state["_active_adapter"], layer._modules["lora_A"], layer._modules["lora_B"]
    for name in (active,) if isinstance(active, str) else active:
        if downs is not None and ups is not None and name in downs._modules:
            pair = [cast(nn.Linear, each._modules[name]).weight for each in (downs, ups)]
            yield _Term(pair[0], pair[1], float(state["scaling"][name]))
