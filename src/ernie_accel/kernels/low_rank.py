"""A product with a low-rank part beside it: what a LoRA adds to a layer that the kernels compute."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from ernie_accel.core.captured import comes_and_goes, version_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.library_hooks import NO_HOOKS, library_hooks
from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.kernels import ops
from ernie_accel.kernels.linear import Fp8Linear, Fp8Rows
from ernie_accel.kernels.spare_terms import KEPT_PART_OF_WEIGHT, KeptTerms, SpareTerm, Term, Wanted, computed

#: Ranks are padded with zeros to a multiple of this, as products want them.
RANK_MULTIPLE_OF = 16
#: Spare columns of float8 rows and weights are padded to a multiple of this: cuBLAS reads 128 columns at a time anyway,
#: and rows that start with lines of memory are read in fewer of them.
SPARE_MULTIPLE_OF = 128
_UPDATING = threading.Lock()


class Place(NamedTuple):
    """Where PEFT puts the adapters of a layer that is part of a product.

    Attributes:
        owner: The module that has the layer as a child.
        name: Its name there.
        start: First output feature of the layer within the product.
        features: Their number.
    """

    owner: nn.Module
    name: str
    start: int
    features: int

    @property
    def adapted(self) -> nn.Module | None:
        """PEFT's layer, if there is one now."""
        layer = self.owner._modules.get(self.name)
        return layer if layer is not None and "base_layer" in layer._modules else None


class LowRankProduct(nn.Module):
    """``product(x) + x @ down.T @ up.T``, with the adapters that PEFT has at some places stacked into one pair.

    All that read the same input share one ``down``; each has its rows of ``up``, which is zero elsewhere. Both are
    brought up to date before each call. A change that keeps the sum of the ranks is written into the same memory, so
    that captured graphs go on with it. Without active adapters it is the product alone, bit for bit.

    A float8 product has them in spare columns: ``wide`` is its weight followed by ``up``, and the rows that it
    multiplies are followed by ``x @ down.T``. So one product adds both, and reads and writes no result twice. The
    weight within is unchanged; meanwhile the product's own is a view of it. What spare columns must hold is
    ``x @ down.T * factor`` and ``up / factor``, in units of the rows' and the weight's scales, with a factor for each
    rank that keeps both within float8.

    Elsewhere ``up`` is added to the result, in the dtype of the product: in bfloat16, where weights come and go or are
    kept together by others, and for an adapter that is too large for spare columns.
    """

    down: Tensor | None
    up: Tensor | None
    factor: Tensor | None

    def __init__(self, product: nn.Module, places: tuple[Place, ...]) -> None:
        super().__init__()
        self.product = product
        self.places = places  # a tuple: torch must not see their owners
        self.register_buffer("down", None, persistent=False)
        self.register_buffer("up", None, persistent=False)
        self.register_buffer("factor", None, persistent=False)
        #: A plain attribute: whoever moves, counts or keeps buffers has the weight within it already.
        self.wide: Tensor | None = None
        #: What was seen of the weight and of PEFT's layers when they were last taken over.
        self._seen: tuple[list[object], list[object]] | None = None
        #: (start, features, rank) of the terms in spare columns, and where each of their parts is; elsewhere are zeros.
        self._layout: tuple[tuple[int, int, int], ...] | None = None
        self._slots: list[Tensor] = []
        #: What a swap back to the last adapters needs; a plain attribute, too, and in no copy or pickle.
        self._kept = KeptTerms()
        self._register_state_dict_hook(_name_as_parts)  # type: ignore[no-untyped-call]
        #: SQNR in dB of the float8 weight of the last merge, against the merged one; None: there was none.
        self.merged_db: float | None = None

    @property
    def weight(self) -> Tensor:
        """The product's."""
        weight: Tensor = self.product.weight  # type: ignore[assignment]
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """That of what is added to its results: of the weight, or where that is packed, what it was packed from."""
        if isinstance(self.product, Fp8Linear):
            return torch.bfloat16
        stored = self.weight.dtype
        if stored.is_floating_point and stored.itemsize > 1:
            return stored
        casts = library_hooks(self.product).named("layerwise_casting")
        found = (getattr(each, name, None) for each in (*casts, self.product) for name in ("compute_dtype", "dtype"))
        return next((each for each in found if isinstance(each, torch.dtype)), torch.float32)

    @property
    def spare(self) -> int:
        """Columns that should follow float8 rows for it: without them, it copies the rows."""
        return 0 if self.wide is None else self.wide.shape[1] - int(cast(Any, self.product).in_features)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """Return the product [..., N] with what the adapters add."""
        if not torch.compiler.is_compiling():
            self.update()
        if self.wide is not None:
            out: Tensor = ops.linear_fp8(*self._wide_rows(x), *self._wide_weight)
            return out
        x = self._without_spare(x)
        out = self.product(x)
        down, up = self.down, self.up
        if down is None or up is None:
            return out
        if isinstance(x, Fp8Rows):
            low: Tensor = ops.low_rank_fp8(x.values, x.scale, down)
        else:
            low = x.flatten(0, -2) @ down.t().to(x.dtype)
        out.view(-1, out.shape[-1]).addmm_(low.to(out.dtype), up.t().to(out.dtype))  # autocast may have chosen another
        return out

    def gated(self, x: Tensor | Fp8Rows, spare: int, *, silu: bool) -> Fp8Rows | None:
        """Return the second half of its result [..., N / 2], gated by the first: see `ops.gated_linear_fp8`.

        None: the result has to be there, because a LoRA is added to it or a hook sees it, or is not float8's.
        """
        self.update()
        product = self.product
        if type(product) is not Fp8Linear or not self._is_bare or (self.wide is None and self.down is not None):
            return None
        if self.wide is None:
            return product.gated(self._without_spare(x), spare, silu=silu)
        wide, scale, terms = self._wide_weight
        return Fp8Rows(*ops.gated_linear_fp8(*self._wide_rows(x), wide, scale, silu, spare, terms))

    def _without_spare(self, x: Tensor | Fp8Rows) -> Tensor | Fp8Rows:
        """Return rows without columns for adapters that went since they were made."""
        columns = self.weight.shape[1]
        if isinstance(x, Fp8Rows) and x.values.shape[-1] > columns:
            return Fp8Rows(x.values[..., :columns].contiguous(), x.scale)
        return x

    @property
    def _wide_weight(self) -> tuple[Tensor, Tensor, int]:
        """The weight with spare columns, the scales of its features, and how many of its columns are in use."""
        product = cast(Fp8Linear, self.product)
        wide, down = cast(Tensor, self.wide), cast(Tensor, self.down)
        return wide, product.weight_scale, product.in_features + len(down)

    def _wide_rows(self, x: Tensor | Fp8Rows) -> Fp8Rows:
        """Return rows with what the adapters make of them in spare columns."""
        product, wide, down, factor = cast(Fp8Linear, self.product), self.wide, self.down, self.factor
        if wide is None or down is None or factor is None:
            raise RuntimeError("a product with spare columns has nothing to write there")
        columns, spare = product.in_features, self.spare
        values, scale = x if isinstance(x, Fp8Rows) else ops.quantize_rows(x, spare)
        if values.shape[-1] == columns:
            values, scale = ops.with_low_rank(values, scale, down, factor, spare)
        else:
            if values.shape[-1] != wide.shape[1]:  # adapters of other ranks came since it was made
                made = values.new_empty(*values.shape[:-1], wide.shape[1])
                made[..., :columns] = values[..., :columns]
                values = made
            ops.low_rank_into(values, down, factor)
        return Fp8Rows(values, scale)

    def update(self) -> None:
        """Take over what PEFT's layers have now, if that changed."""
        update_all((self,))

    def alone(self) -> nn.Module:
        """Return the product as it was given, for whoever takes it back, in place."""
        self._narrow()
        return self.product

    @property
    def _can_be_wide(self) -> bool:
        product = self.product
        if type(product) is not Fp8Linear or not self._is_bare or comes_and_goes(product.weight):
            return False
        weight, wide = product.weight, self.wide
        is_ours = wide is not None and wide.data_ptr() == weight.data_ptr()
        # A whole weight within a larger storage is one of many that somebody keeps together.
        held = weight.is_contiguous() and weight.untyped_storage().nbytes() > weight.nbytes
        return not weight.is_meta and (is_ours or not held)

    @property
    def _is_bare(self) -> bool:
        return is_bare(self.product)

    def _look_at_weight(self) -> list[object]:
        """Return all that the low-rank part depends on of the weight, as plain data."""
        weight, down, wide = self.weight, self._buffers["down"], self.wide
        seen: list[object] = [weight.device, down is not None and comes_and_goes(down)]
        if wide is not None:  # so what it was made of has to be what it was
            scale = cast(Fp8Linear, self.product).weight_scale
            seen += (wide.data_ptr() == weight.data_ptr(), scale.data_ptr(), version_of(scale), self._is_bare)
        return seen

    def _look_at_layers(self) -> list[object]:
        """Return all that it depends on of PEFT's layers, as plain data; it is asked for before each product."""
        seen: list[object] = []
        for owner, name, *_ in self.places:
            layer = owner._modules.get(name)
            if layer is None or "base_layer" not in layer._modules:
                continue
            state = layer.__dict__
            active, scaling = state["_active_adapter"], state["scaling"]
            seen += (id(layer), state["_disable_adapters"], tuple(state["merged_adapters"]))
            modules = state["_modules"]
            downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
            for adapter in (active,) if isinstance(active, str) else active:
                if adapter in downs:
                    down, up = downs[adapter]._parameters["weight"], ups[adapter]._parameters["weight"]
                    seen += (
                        adapter,
                        scaling[adapter],
                        down.data_ptr(),
                        version_of(down),
                        up.data_ptr(),
                        version_of(up),
                    )
        return seen

    def forget(self) -> None:
        """Take over everything anew at the next update: values were written where torch does not count."""
        self._seen = None
        self._kept.clear()

    def look_again(self) -> None:
        """Take over everything at the next update; terms that are kept count, because they know their very tensors."""
        self._seen = None

    @property
    def unmergeable_reason(self) -> str | None:
        """Why no adapter can be merged into the weight; None if it can."""
        if isinstance(self.product, Fp8Linear):
            return "its weight is float8, and the original is gone" if self.product.kept is None else None
        weight = self.product.weight if isinstance(self.product, nn.Linear) else None
        plain = type(weight) is nn.Parameter and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
        return None if plain else "its weight is quantized"

    def merge(self, place: Place, change: Callable[[], object], *, merges: bool) -> None:
        """Let PEFT merge adapters into the weight at `place`, or take them out again, in place.

        A float8 weight is made anew from the original, which is kept merged.

        Args:
            place: One of `places`.
            change: Has PEFT's layer merge into its base layer, for which it gets the true weight, or unmerge.
            merges: Whether it merges.

        Raises:
            ErnieAccelError: Nothing can be merged into the weight; it was not changed.
        """
        layer: Any = place.adapted
        site, product, rows = (
            layer._modules["base_layer"],
            self.product,
            slice(place.start, place.start + place.features),
        )
        if not merges and not vars(layer)["merged_adapters"]:
            change()  # nothing is merged, which PEFT says
            return
        if self.unmergeable_reason is not None:
            raise ErnieAccelError(
                f"{place.name}: cannot change the weight, with which a LoRA is or would be merged: "
                f"{self.unmergeable_reason}. Optimize with FuseKernels(..., keep_originals=True)"
            )
        base = nn.Linear(site.in_features, site.out_features, bias=False, device="meta")
        with torch.no_grad(), torch.inference_mode(False):
            if isinstance(product, Fp8Linear) and product.kept is not None:
                weight = product.kept.weight[rows].to(product.weight.device)
            else:
                weight = self.weight[rows].detach().clone()
            base.weight = nn.Parameter(weight, requires_grad=False)
            try:
                layer._modules["base_layer"] = base
                change()
            finally:
                layer._modules["base_layer"] = site
            if isinstance(product, Fp8Linear):
                product.requantize(place.start, base.weight.detach())
                made = product.weight[rows].float() * product.weight_scale[0, rows, None]
                error = (made - base.weight.float()).norm()
                self.merged_db = 20 * math.log10(float(base.weight.float().norm() / error)) if error else None
            else:
                self.weight[rows].copy_(base.weight)

    def _unmerge_disabled(self) -> None:
        """Take merged adapters out where all are disabled, as PEFT's layers do when they are called."""
        for place in self.places:
            layer: Any = place.adapted
            if layer is not None and vars(layer)["_disable_adapters"] and vars(layer)["merged_adapters"]:
                layer.unmerge()

    def _slots_for(self, layout: tuple[tuple[int, int, int], ...]) -> list[Tensor]:
        """Make room for adapters in spare columns, in place; return where down, factor and up of each belong."""
        weight, columns = self.weight, int(cast(Any, self.product).in_features)
        ranks = sum(rank for *_, rank in layout)
        wide, down, factor = self._wide_of(weight, -(-ranks // RANK_MULTIPLE_OF) * RANK_MULTIPLE_OF, columns)
        if self._layout != layout:
            wide_bytes, down_bytes = wide.view(torch.uint8), down.view(torch.uint8)
            down_bytes[ranks:].zero_()
            wide_bytes[:, columns:].zero_()
            self._layout, self._slots, at = layout, [], 0
            for start, features, rank in layout:
                up = wide_bytes[start : start + features, columns + at : columns + at + rank]
                self._slots += [down_bytes[at : at + rank], factor[at : at + rank], up]
                at += rank
        return self._slots

    def _wide_of(self, weight: Tensor, ranks: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (wide, down, factor), as they are if they fit, with the weight within."""
        wide, down, factor = self.wide, self.down, self.factor
        spare = -(-ranks // SPARE_MULTIPLE_OF) * SPARE_MULTIPLE_OF
        if wide is not None and down is not None and factor is not None:
            is_here = wide.data_ptr() == weight.data_ptr() and down.device == factor.device == weight.device
            moves = comes_and_goes(wide) or comes_and_goes(down) or comes_and_goes(factor)
            if is_here and not moves and (len(down), wide.shape[1]) == (ranks, columns + spare):
                return wide, down, factor
        self._layout, self._slots = None, []
        wide = weight.new_empty(len(weight), columns + spare)
        wide.view(torch.uint8)[:, :columns].copy_(weight.view(torch.uint8))
        self.product.register_buffer("weight", wide[:, :columns])
        self.wide, self.up = wide, None
        self.down = weight.new_empty(ranks, columns)
        self.factor = torch.zeros(ranks, device=weight.device)
        return wide, self.down, self.factor

    def _narrow(self) -> None:
        """Give the product its weight by itself again, in place, and keep nothing for spare columns."""
        self._leave_wide()
        self._kept.clear()

    def _leave_wide(self) -> None:
        wide, product = self.wide, self.product
        if wide is not None:
            weight = self.weight
            if weight.data_ptr() == wide.data_ptr():
                product.register_buffer("weight", weight.contiguous())
            self.wide = self.down = self.factor = self._layout = self._seen = None
            self._slots = []

    def _apply(self, *args: object, **kwargs: object) -> object:
        """Move or cast everything, as `nn.Module` does; a weight that was moved has no spare columns."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.wide is None or self.wide.data_ptr() != self.weight.data_ptr():
            self._narrow()
        return self

    def _stack(self, terms: tuple[Term, ...]) -> None:
        """Have the adapters added to the result, in place."""
        self._leave_wide()
        ranks, device = sum(len(term.down) for term in terms), self.weight.device
        if not ranks:
            self.down = self.up = None
            return
        padded = -(-ranks // RANK_MULTIPLE_OF) * RANK_MULTIPLE_OF
        columns, rows = terms[0].down.shape[1], max(place.start + place.features for place in self.places)
        down, up = self.down, self.up
        kept = down is not None and up is not None and not comes_and_goes(down) and not comes_and_goes(up)
        if (
            not kept
            or down is None
            or up is None
            or (len(down), down.device, down.dtype) != (padded, device, self.dtype)
        ):
            down = torch.zeros(padded, columns, device=device, dtype=self.dtype)
            up = torch.zeros(rows, padded, device=device, dtype=self.dtype)
            self.down, self.up = down, up
        else:
            down[ranks:].zero_()
            up.zero_()
        at = 0
        for term in terms:
            rank = len(term.down)
            down[at : at + rank].copy_(term.down)
            up[term.start : term.start + len(term.up), at : at + rank].copy_(term.up.float() * term.scale)
            at += rank

    def __getstate__(self) -> dict[str, object]:
        # What it knows tensors by are addresses; and what is made of the adapters is made again.
        made = {"down": None, "up": None, "factor": None}
        others: dict[str, object] = {"wide": None, "_seen": None, "_layout": None, "_slots": [], "_kept": KeptTerms()}
        return {**vars(self), **others, "_buffers": {**self._buffers, **made}}

    def extra_repr(self) -> str:
        return f"rank={0 if self.down is None else len(self.down)}"


def update_all(products: Sequence[LowRankProduct], *, early: bool = False) -> None:
    """Have products take over what PEFT's layers have now, where that changed; terms are computed together.

    Args:
        products: In place.
        early: It is not their turn yet: adapters whose values are elsewhere until then have to wait.
    """
    stale = []
    for product in products:
        # Before adapters are read: what another thread changes meanwhile is seen at the next update.
        layers = product._look_at_layers()
        if product._seen != (product._look_at_weight(), layers):
            stale.append((product, layers))
    if stale:
        # Not of inference mode, or nobody could write into them later.
        with _UPDATING, torch.inference_mode(False), torch.no_grad():
            _take_over(stale, early)


def _take_over(stale: list[tuple[LowRankProduct, list[object]]], early: bool) -> None:
    wide, written = [], []
    for product, layers in stale:
        terms = tuple(terms_of(product.places))
        if early and any(comes_and_goes(term.down) or comes_and_goes(term.up) for term in terms):
            continue
        product._unmerge_disabled()
        product._seen = None  # until all is written
        written.append((product, layers))
        if terms and product._can_be_wide:
            wide.append((product, terms))
        else:
            product._narrow()
            product._stack(terms)
    slots: list[Tensor] = []
    values: list[Tensor] = []
    for (product, terms), made in zip(wide, _in_float8(wide), strict=True):
        fitting = [each for each in made if each is not None]
        if len(fitting) == len(terms):
            slots += product._slots_for(tuple((term.start, *term.up.shape) for term in terms))
            values += itertools.chain.from_iterable(fitting)
        else:
            product._stack(terms)
    _copy_all(slots, values)
    for product, layers in written:
        product._seen = product._look_at_weight(), layers


def _in_float8(wide: list[tuple[LowRankProduct, tuple[Term, ...]]]) -> Iterator[list[SpareTerm | None]]:
    """Yield the terms of each product as spare columns hold them; None: too large. What is not kept is computed."""
    wanted = [
        [Wanted(term, cast(Fp8Linear, product.product).weight_scale) for term in terms] for product, terms in wide
    ]
    kept = [[product._kept.find(each) for each in its] for (product, _), its in zip(wide, wanted, strict=True)]
    pairs = [(each, old) for its, olds in zip(wanted, kept, strict=True) for each, old in zip(its, olds, strict=True)]
    new = iter(computed([each for each, old in pairs if old is None]))
    for (product, _), its, olds in zip(wide, wanted, kept, strict=True):
        made = [next(new) if old is None else old.made for old in olds]
        for each, old, one in zip(its, olds, made, strict=True):
            if old is None:
                product._kept.keep(each, one)
        product._kept.changed(product.weight.nbytes * KEPT_PART_OF_WEIGHT)
        yield made


def _copy_all(slots: list[Tensor], values: list[Tensor]) -> None:
    """Copy `values` into `slots`, in as few launches as torch needs."""
    groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for slot, value in zip(slots, values, strict=True):
        into, what = groups.setdefault((slot.device, slot.dtype, slot.is_contiguous()), ([], []))
        into.append(slot)
        what.append(value)
    for into, what in groups.values():
        torch._foreach_copy_(into, what)


def terms_of(places: tuple[Place, ...]) -> Iterator[Term]:
    """Yield what the active adapters at these places add, as PEFT's own layers would; merged ones are not active."""
    for place in places:
        layer: Any = place.adapted
        if layer is None:
            continue
        state = vars(layer)
        if state["_disable_adapters"] or state["merged_adapters"]:
            continue
        active, downs, ups = state["_active_adapter"], layer._modules["lora_A"], layer._modules["lora_B"]
        for name in (active,) if isinstance(active, str) else active:
            if name in downs._modules:
                down, up = downs._modules[name]._parameters["weight"], ups._modules[name]._parameters["weight"]
                yield Term(down, up, float(state["scaling"][name]), place.start)


class Merge(StandInMethod):
    """`merge` or `unmerge` of PEFT's layer around a site, which has no weight."""

    def __call__(self, *args: object, **kwargs: object) -> None:
        site = site_of(cast(nn.Module, self.owner))
        if site is None:
            self.call_inner(*args, **kwargs)
        else:
            change = partial(self.call_inner, *args, **kwargs)
            site.low_rank.merge(site.place, change, merges=self.name == "merge")


_MERGING = ("merge", "unmerge")


def bind(layer: nn.Module) -> None:
    """Let PEFT's layer around a site merge into the product, in place."""
    for name in _MERGING:
        if not isinstance(vars(layer).get(name), Merge):
            setattr(layer, name, Merge(layer, name))


def unbind(layer: nn.Module) -> None:
    """Undo `bind`, in place."""
    for name in _MERGING:
        if isinstance(vars(layer).get(name), Merge):
            delattr(layer, name)


class Site(nn.Linear):
    """A layer that is part of a product, as PEFT sees it: its shape, dtype and device, and no weight of its own."""

    _ernie_accel_adapted_elsewhere = True  # `captured.ADAPTED_ELSEWHERE`

    def __init__(self, product: LowRankProduct, place: Place, columns: int, *, whole: bool) -> None:
        """Stand for the features of `place`; if they are the `whole` product, it is kept in here."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = columns, place.features
        self.register_parameter("bias", None)
        self.place = place
        self._of = (product,)
        if whole:
            self.product = product
            self._register_state_dict_hook(_name_as_own)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_take_as_own)  # type: ignore[no-untyped-call]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the product."""
        return "product" in self._modules

    @property
    def low_rank(self) -> LowRankProduct:
        """The product that it is a part of."""
        return self._of[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A weight of the layer's shape that takes no memory, with no meaningful values."""
        of = self.low_rank
        return torch.empty(1, 1, dtype=of.dtype, device=of.weight.device).expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer gives without adapters; PEFT's layer around it calls this.

        Raises:
            RuntimeError: It is one of several layers of a product, which is computed as a whole.
        """
        if not self.is_whole:
            raise RuntimeError("the layers of a fused product are computed together")
        out: Tensor = self.low_rank.product(x)
        return out


def _name_as_parts(product: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give the rows of a fused weight the names that they have on a stock model with the same adapters."""
    owner = prefix[: prefix[:-1].rfind(".") + 1]
    for place in cast(LowRankProduct, product).places:
        found = state_dict.pop(f"{prefix}{place.name}.weight", None)
        if found is not None:
            beneath = "" if place.adapted is None else ".base_layer"
            state_dict[f"{owner}{place.name}{beneath}.weight"] = found


def _name_as_own(site: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give what a whole layer has the names that it has on a stock model, if it is a plain one."""
    _rename(site, state_dict, f"{prefix}product.product.", prefix)


def _take_as_own(site: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Load what `_name_as_own` has named; see `nn.Module.register_load_state_dict_pre_hook`."""
    _rename(site, state_dict, prefix, f"{prefix}product.product.")


def _rename(site: nn.Module, state_dict: dict[str, Tensor], old: str, new: str) -> None:
    product = cast(Site, site).low_rank.product
    if type(product) is nn.Linear:
        for name in product._parameters:
            found = state_dict.pop(f"{old}{name}", None)
            if found is not None:
                state_dict[f"{new}{name}"] = found


def site_of(layer: nn.Module) -> Site | None:
    """Return the site that `layer` is, or that PEFT's layer is around; None if there is none."""
    base = layer._modules.get("base_layer", layer)
    return base if isinstance(base, Site) else None


def product_of(layer: nn.Module) -> nn.Module:
    """Return what the kernels call for `layer`: the product with its low-rank part, if PEFT's layer is around it."""
    site = site_of(layer)
    return layer if site is None else site.low_rank


def spare_columns(layer: nn.Module) -> int:
    """Return how many columns should follow the float8 rows that the product of `layer` takes."""
    if not isinstance(layer, LowRankProduct):
        return 0
    if not torch.compiler.is_compiling():
        layer.update()  # it may have been moved since the forward began
    return layer.spare


def gated(layer: nn.Module, rows: Tensor | Fp8Rows, spare: int, *, silu: bool) -> Fp8Rows | None:
    """Return what `layer` gives [..., N / 2], its second half gated by the first, in float8 with `spare` columns.

    None: the layer has to be called, and another kernel gates. That is so where the product cannot do it, and where
    somebody has to see it: a hook, or an adapter that is added to it.
    """
    values = rows.values if isinstance(rows, Fp8Rows) else rows
    if not isinstance(layer, (Fp8Linear, LowRankProduct)) or not ops.gates_in_product(values) or not is_bare(layer):
        return None
    return layer.gated(rows, spare, silu=silu)


def is_bare(module: nn.Module) -> bool:
    """Return whether calling `module` is nothing more than its class's forward: no hooks, nothing compiled."""
    hooked = module._forward_pre_hooks or module._forward_hooks or library_hooks(module) is not NO_HOOKS
    hooked = hooked or hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks
    return not hooked and "forward" not in vars(module) and module._compiled_call_impl is None


def takes_fp8(layer: nn.Module | None) -> bool:
    """Return whether the product of `layer`, or of what PEFT has put around it, takes `Fp8Rows`."""
    if layer is None:
        return False
    found = product_of(layer)
    return isinstance(found.product if isinstance(found, LowRankProduct) else found, Fp8Linear)
