"""LoRAs on layers that are computed as a part of a product: where PEFT finds them, and who brings them up to date.

PEFT puts its layers around the linear layers of a model, by name. Rewritten blocks make one product of several of them,
and fused kernels may have quantized it. When a LoRA comes, such a block shows PEFT a `Site` for each layer, and its
products take what PEFT's layers have beside their own weights (`LowRankProduct`). When the last one goes, the block is
as it was.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ernie_accel.common.collecting import without_collecting
from ernie_accel.common.language import said
from ernie_accel.common.notes import Note
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.originals import ORIGINAL, log_made_anew
from ernie_accel.core.peft_layers import config_problems, layer_problem, unchanged_if_it_fails
from ernie_accel.core.stand_in import StandInMethod, method_standing_in
from ernie_accel.core.undo import Undo
from ernie_accel.kernels.linear import Fp8Linear
from ernie_accel.kernels.low_rank import LowRankProduct, Place, Site, bind, site_of, unbind, update_all

_log = logging.getLogger(__name__)
#: Products of a transformer with sites.
PRODUCTS = Note("low_rank_products", list, "transformer", "its products that take LoRAs beside their weights")
#: What names a tensor of an adapter, after the path of its layer.
_OF_ADAPTERS = (".lora_", ".lokr_", ".lora.", ".loha_", ".hada_", ".alpha", ".dora_scale", ".diff", ".oft_")


#: Arguments of ``load_lora_adapter`` that say where the weights are.
_FETCHING = (
    "weight_name",
    "use_safetensors",
    "local_files_only",
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "subfolder",
    "metadata",
)


#: Place of the argument ``hotswap`` of ``load_lora_adapter``.
_HOTSWAP_AT = 2


class Adaptable(nn.Module, ABC):
    """A module that may compute several of its layers as one product, on kernels or quantized."""

    fusible: tuple[str, ...] = ()
    fused_name: str = ""
    #: Output features of each fusible layer, once they are fused.
    fused_sizes: tuple[int, ...] = ()
    #: Whether its products are on fused kernels, so that its layers must not be split for a LoRA.
    on_kernels = False

    @property
    def _joined(self) -> nn.Module | None:
        """The product of several layers, if they are fused."""
        return self._modules.get(self.fused_name) if self.fusible else None

    @property
    def products(self) -> list[LowRankProduct]:
        """Its products that take LoRAs."""
        others = (site_of(cast(nn.Module, owner._modules[name])) for owner, name in self._others())
        found = [self._joined, *others]
        given = [each.low_rank if isinstance(each, Site) else each for each in found]
        return [each for each in given if isinstance(each, LowRankProduct)]

    def open_sites(self) -> None:
        """Show PEFT a site for each linear layer, in place; those that it has wrapped already stay wrapped."""
        fused = self._joined
        if fused is not None and not isinstance(fused, LowRankProduct):
            columns, at, places = int(cast(Any, fused).in_features), 0, []
            for name, size in zip(self.fusible, self.fused_sizes, strict=True):
                places.append(Place(self, name, at, size))
                at += size
            product = LowRankProduct(fused, tuple(places))
            self._modules[self.fused_name] = product
            for place in places:
                self._modules[place.name] = Site(product, place, columns, whole=False)
        for owner, name in self._others():
            layer = owner._modules[name]
            base: Any = layer if layer is None else layer._modules.get("base_layer", layer)
            if type(base) in (nn.Linear, Fp8Linear):
                place = Place(owner, name, 0, base.out_features)
                site = Site(LowRankProduct(base, (place,)), place, base.in_features, whole=True)
                _put_base(owner, name, site)

    def close_sites(self, *, only_if_unused: bool = False) -> None:
        """Put the products back in place of sites; a layer that PEFT has wrapped keeps its wrapper.

        Layers of a fused product that PEFT has wrapped must stand alone then: they are split.

        Args:
            only_if_unused: Leave sites that PEFT has wrapped.
        """
        for owner, name in self._others():
            site = site_of(cast(nn.Module, owner._modules[name]))
            if site is not None and not (only_if_unused and owner._modules[name] is not site):
                _put_base(owner, name, site.low_rank.alone())
        product = self._joined
        if not isinstance(product, LowRankProduct):
            return
        wrapped = {place.name: place.adapted for place in product.places if place.adapted is not None}
        if wrapped and only_if_unused:
            return
        children = {name: child for name, child in self._modules.items() if name not in self.fusible}
        children[self.fused_name] = product.alone()
        vars(self)["_modules"] = type(self._modules)(children)
        if wrapped:
            self.split()
            for name, layer in wrapped.items():
                base = self._modules[name]
                self._modules[name] = layer
                _put_base(self, name, cast(nn.Module, base))

    @abstractmethod
    def fuse_again(self) -> None:
        """Fuse the layers that were split for a LoRA, in place, if they are plain ones again."""

    @abstractmethod
    def unfusible_reason(self) -> str | None:
        """Return why the linear layers cannot be fused, or None."""

    @abstractmethod
    def fuse(self) -> None:
        """Replace the fusible layers by one, in place."""

    @property
    @abstractmethod
    def can_be_split(self) -> bool:
        """Whether `split` can do its work: nothing is fused, or its weight is not quantized."""

    @abstractmethod
    def split(self) -> None:
        """Replace the fused layer by the layers it is made of, in place."""

    def wrapped(self) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """Yield (owner, name, PEFT's layer) of all linear layers that PEFT has wrapped."""
        names = [(cast(nn.Module, self), name) for name in self.fusible if name in self._modules]
        for owner, name in [*names, *self._others()]:
            layer = owner._modules[name]
            if layer is not None and "base_layer" in layer._modules:
                yield owner, name, layer

    def _others(self) -> list[tuple[nn.Module, str]]:
        """Return the places of linear layers that are a product of their own, wrapped or not."""
        owners = [cast(nn.Module, self), *(child for child in self._modules.values() if type(child) is nn.ModuleList)]
        joined = (self.fused_name, *self.fusible) if self.fusible else ()
        found = []
        for owner in owners:
            for name, child in owner._modules.items():
                is_other = child is not None and name not in joined
                if is_other and isinstance(cast(nn.Module, child)._modules.get("base_layer", child), _LAYERS):
                    found.append((owner, name))
        return found


_LAYERS = (nn.Linear, Fp8Linear)


def _put_base(owner: nn.Module, name: str, base: nn.Module) -> None:
    """Put a layer where `owner` has one of this name, or beneath PEFT's layer that is around it."""
    layer = owner._modules[name]
    if layer is not None and "base_layer" in layer._modules:
        layer._modules["base_layer"] = base
        if not isinstance(base, Site):
            unbind(layer)
    else:
        owner._modules[name] = base


def adaptables(transformer: nn.Module) -> list[Adaptable]:
    """Return the modules of `transformer` that may compute layers as one product."""
    return [part for part in transformer.modules() if isinstance(part, Adaptable)]


def layer_paths(transformer: nn.Module) -> list[str]:
    """Return the paths of all modules of a transformer, those of layers that are fused into one among them."""
    paths = []
    for path, module in transformer.named_modules():
        paths.append(path.replace(".base_layer", ""))
        if isinstance(module, Adaptable):
            paths += [f"{path}.{name}" for name in module.fusible if name not in module._modules]
    return paths


class Lifted(NamedTuple):
    """A layer of PEFT's that was taken away from around a linear layer, and its place."""

    owner: nn.Module
    name: str
    layer: nn.Module


def lift(transformer: nn.Module, lifted: list[Lifted]) -> None:
    """Take PEFT's layers away from around the linear layers of rewritten blocks, and fuse what they kept apart.

    In place; what is taken away is added to `lifted`.
    """
    for part in adaptables(transformer):
        for owner, name, layer in list(part.wrapped()):
            lifted.append(Lifted(owner, name, layer))
            owner._modules[name] = layer._modules["base_layer"]
        is_lifted = any(each.owner is part for each in lifted)
        if is_lifted and part.fused_name not in part._modules and part.unfusible_reason() is None:
            part.fuse()


def put_back(lifted: list[Lifted]) -> None:
    """Put lifted layers of PEFT's around what is in their place now, in place; `lifted` is empty then.

    Fused layers without sites are split for it.
    """
    while lifted:
        owner, name, layer = lifted[-1]
        if name not in owner._modules:
            cast(Adaptable, owner).split()
        if owner._modules.get(name) is not layer:
            layer._modules["base_layer"] = owner._modules[name]
            owner._modules[name] = layer
        lifted.pop()


def open_sites(transformer: nn.Module, parts: Iterable[Adaptable]) -> None:
    """Let these parts of `transformer` show PEFT a site for each linear layer, in place."""
    for part in parts:
        part.open_sites()
    PRODUCTS.put(transformer, [product for part in adaptables(transformer) for product in part.products])


def bind_layers(transformer: nn.Module, *, forgetting: bool = True) -> None:
    """Let PEFT's layers around sites merge into the products, and take over all that they have, in place.

    Args:
        transformer: With the products.
        forgetting: Values may have been written where torch does not count: drop what was kept, too.
    """
    for product in PRODUCTS.of(transformer) or ():
        for place in product.places:
            layer = place.adapted
            if layer is not None:
                bind(layer)
        if forgetting:
            product.forget()
        else:  # an adapter may lie where a deleted one of its name lay
            product.look_again()


def close_sites(transformer: nn.Module, *, only_if_unused: bool = False) -> None:
    """Undo `open_sites`, in place; see `Adaptable.close_sites`."""
    for part in adaptables(transformer):
        part.close_sites(only_if_unused=only_if_unused)
    left = [product for part in adaptables(transformer) for product in part.products]
    if left:
        PRODUCTS.put(transformer, left)
    else:
        PRODUCTS.drop(transformer)


def narrow_products(transformer: nn.Module) -> None:
    """Give the weights of all products memory of their own, in place, for whoever takes them: no spare columns."""
    for product in PRODUCTS.of(transformer) or ():
        product.alone()


def update_products(transformer: nn.Module, *_: object) -> None:
    """Bring the low-rank parts of all products up to date, for what replays or compiles the forward."""
    products = PRODUCTS.of(transformer)
    if products:
        from ernie_accel.models.outside_graphs import outside_graphs

        outside_graphs(partial(update_all, products, early=True))


class ChecksAdapters(StandInMethod):
    """`load_lora_adapter` of a model that takes adapters as it is, which refuses one that does not match it."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Load an adapter.

        Raises:
            ErnieAccelError: Some of its tensors match no layer; nothing was changed.
        """
        model = cast(nn.Module, self.owner)
        args, kwargs = self._checked(model, args, kwargs, on_kernels=False)
        return self._loaded(model, args, kwargs)

    def _loaded(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Load an adapter by the method underneath; where PEFT cannot, nothing is changed."""
        with unchanged_if_it_fails(model):
            return self.call_inner(*args, **kwargs)

    def _checked(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, on_kernels: bool
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return the arguments, with weights in place of a path to them.

        Raises:
            ErnieAccelError: An adapter that the kernels cannot take, or for another model.
        """
        if self.name == "add_adapter":
            config = args[0] if args else kwargs.get("adapter_config")
            problems = config_problems(config) if on_kernels else []
        else:
            source = args[0] if args else kwargs.pop("pretrained_model_name_or_path_or_dict")
            args = args[1:]
            weights, kwargs = fetched(source, kwargs)
            prefix = args[0] if args else kwargs.get("prefix", "transformer")
            problems = adapter_problems_of(model, weights, prefix, kwargs.get("_pipeline"), on_kernels=on_kernels)
            args = (weights, *args)
        if problems:
            raise refusal(self.name, problems)
        return args, kwargs


class TakesAdapters(ChecksAdapters):
    """A method of a transformer that adds adapters by the names of the stock layers.

    Fused layers are split for it, or, on kernels and where they are quantized, shown as sites. What cannot be done is
    refused before anything is changed.
    """

    @without_collecting()  # among the many objects that PEFT makes; with it a load takes up to twice as long
    def __call__(self, *args: object, **kwargs: object) -> Any:
        model = cast(nn.Module, self.owner)
        hot_swap = bool(kwargs.get("hotswap", args[_HOTSWAP_AT] if len(args) > _HOTSWAP_AT else False))
        parts = adaptables(model)
        to_open = [part for part in parts if part.on_kernels or not part.can_be_split]
        to_split = [part for part in parts if part not in to_open]
        fused = [part for part in to_split if part.fused_name in part._modules]
        known = set(vars(model).get("peft_config") or {})
        if to_open:
            open_sites(model, to_open)
        try:
            args, kwargs = self._checked(model, args, kwargs, on_kernels=bool(to_open))
            for part in to_split:
                part.split()
            result = self._loaded(model, args, kwargs)
            problems = problems_of(model)
            if problems:
                added = [name for name in cast(Any, model).peft_config if name not in known]
                cast(Any, model).delete_adapters(added)
                raise refusal(self.name, problems)
        except BaseException:
            for part in fused:
                part.fuse_again()
            raise
        finally:
            if to_open:
                if not known and not vars(model).get("peft_config"):
                    _unwrap_empty(model)
                close_sites(model, only_if_unused=True)
        bind_layers(model, forgetting=hot_swap)
        update_all(PRODUCTS.of(model) or (), early=True)  # so that a first swap to what was loaded is like any other
        return result


def check_adapters(model: nn.Module, undo: Undo) -> None:
    """Make `model` refuse a LoRA of which some tensors match no layer, in place; a no-op if it does."""
    checks = method_standing_in(model, "load_lora_adapter", ChecksAdapters)  # others may be on top of it
    if hasattr(model, "load_lora_adapter") and checks is None:
        undo.setattr(model, "load_lora_adapter", ChecksAdapters(model, "load_lora_adapter"))


def fetched(
    source: object, kwargs: dict[str, object], *, allow_pickle: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of an adapter, and the arguments that are left for who loads them."""
    if isinstance(source, dict):
        return source, kwargs
    from diffusers.loaders.lora_base import _fetch_state_dict

    given = {name: kwargs.get(name) for name in _FETCHING}
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    weights, metadata = _fetch_state_dict(
        pretrained_model_name_or_path_or_dict=source, user_agent=agent, allow_pickle=allow_pickle, **given
    )
    return weights, {**{k: v for k, v in kwargs.items() if k not in _FETCHING}, "metadata": metadata}


def adapter_problems_of(
    model: nn.Module, weights: Mapping[str, Tensor], prefix: str | None, pipe: object, *, on_kernels: bool
) -> list[str]:
    """Return why `model` cannot take its part of an adapter; empty if it can, or if all is for other components.

    Tensors for components for which the pipe loads no LoRA are counted in a warning.

    Args:
        model: What the adapter is for.
        weights: All that there is of it.
        prefix: Before the names of the model's part.
        pipe: Where it is loaded into all components; None if into the model alone.
        on_kernels: Whether its layers are on fused kernels.
    """
    left_out = _for_other_components(weights, prefix, pipe)
    if pipe is not None and len(left_out) == len(weights):
        return []
    return weight_problems(model, weights, prefix, on_kernels=on_kernels)


def weight_problems(
    model: nn.Module, weights: Mapping[str, Tensor], prefix: str | None, *, on_kernels: bool
) -> list[str]:
    """Return why `model` cannot take the weights of an adapter; empty if it can."""
    start = "" if prefix is None else f"{prefix}."
    ours = {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}
    if weights and not ours:
        return [f"none of its {len(weights)} tensors begins with {start!r}: it has {next(iter(weights))}, for example"]
    problems: list[str] = []
    if on_kernels:
        unmatched, known = [], dict(zip(ours, ours, strict=True))
        modules, paths = dict(model.named_modules()), set(layer_paths(model))
        for name, tensor in ours.items():
            path, kind = _split(name)
            layer = modules.get(path)
            if layer is None:
                if path not in paths:  # else it is fused, and split once all is known to fit
                    unmatched.append(name)
                continue
            site = site_of(layer)
            if site is None:
                if isinstance(layer, LowRankProduct):
                    unmatched.append(name)
                continue
            problem = _tensor_problem(path, kind, tensor, site)
            if problem is not None:
                problems.append(problem)
    else:
        unmatched, known = _unmatched(model, list(ours))
    lost = set(unmatched)
    problems += _shape_problems(model, {known[name]: tensor for name, tensor in ours.items() if name not in lost})
    if unmatched:
        shown = ", ".join(unmatched[:3]) + (", ..." if len(unmatched) > 3 else "")
        problems.insert(
            0, f"{len(unmatched)} of its {len(ours)} tensors match no layer of {type(model).__name__}: {shown}"
        )
    problems = list(dict.fromkeys(problems))
    if len(problems) > 5:
        problems = [*problems[:4], f"and {len(problems) - 4} more"]
    return problems


def _shape_problems(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Return which layers a LoRA has one half for, or halves of other shapes than the layer's, all but kernels' sites.

    Without its second half PEFT leaves whatever is in the memory, and other shapes raise half-way.

    Args:
        model: What the LoRA is for.
        weights: Its tensors by PEFT's names.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        for half in ("A", "B"):
            if name.endswith(f".lora_{half}.weight"):
                halves.setdefault(name.removesuffix(f".lora_{half}.weight"), {})[half] = tensor
    sizes, problems = _layer_sizes(model), _missing(halves, weights)
    for path, pair in halves.items():
        if len(pair) == 1:
            there = next(iter(pair))
            problems.append(f"{path} has lora_{there}, and no lora_{'B' if there == 'A' else 'A'}")
            continue
        down, up = pair["A"], pair["B"]
        if down.ndim != 2 or up.ndim != 2 or path not in sizes:
            continue
        columns, rows = sizes[path]
        if down.shape[0] != up.shape[1]:
            problems.append(f"the halves of {path} have ranks {down.shape[0]} and {up.shape[1]}")
        elif down.shape[1] != columns:
            problems.append(f"{path} has {columns} inputs, and its LoRA {down.shape[1]}")
        elif up.shape[0] != rows:
            problems.append(f"{path} has {rows} outputs, and its LoRA {up.shape[0]}")
    return problems


def _missing(layers: Collection[str], weights: Mapping[str, Tensor]) -> list[str]:
    """Return what only some layers of a LoRA have: PEFT makes it for all, and leaves the others without values."""
    problems = []
    for what, mark in (("a bias", ".lora_B.bias"), ("a DoRA's magnitudes", ".lora_magnitude_vector")):
        having = {name[: name.index(mark)] for name in weights if mark in name} & set(layers)
        if 0 < len(having) < len(layers):
            first = next(path for path in layers if path not in having)
            problems.append(
                f"{len(having)} of its {len(layers)} layers have {what}, and {first}, for example, has none"
            )
    return problems


def _layer_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the linear layers of `model`, those that are fused into one among them."""
    found = {}
    for path, module in model.named_modules():
        columns, rows = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(columns, int) and isinstance(rows, int):
            found[path.replace(".base_layer", "")] = columns, rows
        fused = module._modules.get(module.fused_name) if isinstance(module, Adaptable) else None
        columns = getattr(fused, "in_features", None)  # a `LowRankProduct` has sites that say it
        if isinstance(module, Adaptable) and isinstance(columns, int):
            found |= {f"{path}.{n}": (columns, r) for n, r in zip(module.fusible, module.fused_sizes, strict=True)}
    return found


def _unmatched(model: nn.Module, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return those of an adapter's tensors that belong to no layer, and all names as PEFT's.

    PEFT would load the others: diffusers' log names the rest, and the picture is that of a part of the adapter.
    """
    known = dict(zip(names, names, strict=True))
    is_lokr = any(".lokr_" in name for name in names)
    if names and not is_lokr and "lora_A" not in names[0]:  # as `load_lora_adapter` decides it
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

        known = {name: new for new, name in convert_unet_state_dict_to_peft(known).items()}
    paths = set(layer_paths(model))
    lost = [name for name, new in known.items() if _split(new)[0] not in paths]
    if len(lost) == len(names) and not (is_lokr and any(_is_fused_for_lokr(name, paths) for name in names)):
        return lost, known
    if is_lokr or "lora_controlnet" in known:  # converted by rules of their own, for several layers at once
        return [], known
    return [name for name in lost if any(mark in known[name] for mark in _OF_ADAPTERS)], known


def _is_fused_for_lokr(name: str, paths: set[str]) -> bool:
    """Return whether diffusers makes the layer of a LoKr by fusing others, where the model can."""
    owner, _, layer = _split(name)[0].rpartition(".")
    return layer in ("to_qkv", "to_added_qkv") and owner in paths


def _for_other_components(weights: Mapping[str, Tensor], prefix: str | None, pipe: object) -> list[str]:
    """Return those of a LoRA's tensors that are for other components of a pipe; warn of those it loads none for."""
    if pipe is None or prefix is None:
        return []
    others = [name for name in weights if not name.startswith(f"{prefix}.")]
    loadable = set(getattr(pipe, "_lora_loadable_modules", ()))
    elsewhere = [name for name in others if name.partition(".")[0] in loadable]
    lost = len(others) - len(elsewhere)
    if 0 < lost < len(weights):
        first = next(name for name in others if name.partition(".")[0] not in loadable)
        _log.warning(
            "%s loads LoRAs of %s only: %d of %d tensors are left out, such as %s",
            type(pipe).__name__,
            ", ".join(sorted(loadable)),
            lost,
            len(weights),
            first,
        )
    return elsewhere


def _split(name: str) -> tuple[str, str]:
    """Return the path of the layer that a tensor of an adapter belongs to, and the rest of its name."""
    found = [at for each in _OF_ADAPTERS if (at := name.find(each)) > 0]
    at = min(found, default=len(name))
    return name[:at], name[at + 1 :]


def _tensor_problem(path: str, kind: str, tensor: Tensor, site: Site) -> str | None:
    if kind.startswith("lokr_"):
        return f"{path} gets a LoKr, and the kernels add LoRAs only"
    if kind.startswith("lora_magnitude_vector") or kind == "dora_scale":
        return f"{path} gets a DoRA, which scales by the norm of the weight that the kernels have not"
    if kind.endswith(".bias"):
        return f"{path} gets a LoRA with a bias, which the kernels do not add"
    is_down, is_up = kind.startswith(("lora_A", "lora.down")), kind.startswith(("lora_B", "lora.up"))
    if is_down and (tensor.ndim != 2 or tensor.shape[1] != site.in_features):
        return f"{path} has {site.in_features} inputs, and its LoRA {tuple(tensor.shape)[-1]}"
    if is_up and (tensor.ndim != 2 or tensor.shape[0] != site.out_features):
        return f"{path} has {site.out_features} outputs, and its LoRA {tensor.shape[0]}"
    return None if is_down or is_up or kind == "alpha" else f"{path} gets {kind}, which the kernels do not know"


def problems_of(model: nn.Module) -> list[str]:
    """Return what the adapters of a transformer have that its products would leave out; empty if nothing."""
    problems = []
    for part in adaptables(model):
        for _, name, layer in part.wrapped():
            if site_of(layer) is not None and (problem := layer_problem(layer)) is not None:
                problems.append(f"{name}: {problem}")
    return sorted(set(problems))


def adapter_problems(transformer: nn.Module, lists: tuple[str, ...]) -> list[str]:
    """Return why the adapters that are on the blocks in these lists cannot go on kernels; empty if they can."""
    problems: dict[str, str] = {}
    for name in lists:
        for path, layer in transformer.get_submodule(name).named_modules():
            if "base_layer" in layer._modules and (problem := layer_problem(layer)) is not None:
                problems.setdefault(problem, f"{name}.{path}")
    return [
        said("an adapter is loaded that the kernels cannot take: {path}: {why}", path=path, why=why)
        for why, path in problems.items()
    ]


def _unwrap_empty(model: nn.Module) -> None:
    """Remove layers of PEFT's that a failed loading has left, in place."""
    for part in adaptables(model):
        for owner, name, layer in list(part.wrapped()):
            if not cast(nn.Module, layer._modules["lora_A"])._modules:
                owner._modules[name] = layer._modules["base_layer"]


def refusal(name: str, problems: list[str]) -> ErnieAccelError:
    """Return the error that says why an adapter cannot be loaded by the method `name`."""
    text = "\n".join(f"  - {problem}" for problem in problems)
    return ErnieAccelError(f"{name}: cannot load this adapter; nothing was changed.\n{text}")


class ThenTidy(StandInMethod):
    """A method of a transformer that removes adapters; sites that nobody uses go, and split layers are fused again."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        result = self.call_inner(*args, **kwargs)
        model = cast(nn.Module, self.owner)
        close_sites(model, only_if_unused=True)
        for part in adaptables(model):
            part.fuse_again()
        return result


class Merges(StandInMethod):
    """`fuse_lora` of a transformer, which asks all layers before it changes one."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Merge the active adapters into the weights.

        Raises:
            ErnieAccelError: The weight of a layer cannot be merged into; none was.
        """
        products = PRODUCTS.of(self.owner) or ()
        adapted = [product for product in products if any(place.adapted is not None for place in product.places)]
        adapted = [product for product in adapted if ORIGINAL.of(product.product) is None]  # these are asked before
        reasons = {reason for product in adapted if (reason := product.unmergeable_reason) is not None}
        if reasons:
            raise ErnieAccelError(
                f"{self.name}: cannot merge a LoRA into the weights of {type(self.owner).__name__}; nothing was "
                f"changed ({'; '.join(sorted(reasons))}). Unmerged, it works. To merge it, use "
                "FuseKernels(..., keep_originals=True), or merge it before optimizing."
            )
        result = self.call_inner(*args, **kwargs)
        log_made_anew(self.name, "float8", [each.merged_db for each in adapted if each.merged_db is not None])
        return result


def take_adapters(transformer: nn.Module, undo: Undo) -> None:
    """Make a rewritten transformer load and unload LoRAs, in place."""
    for name in ("load_lora_adapter", "add_adapter"):
        if hasattr(transformer, name):  # a module that is none of diffusers' has neither
            undo.setattr(transformer, name, TakesAdapters(transformer, name))
    if hasattr(transformer, "unload_lora"):
        undo.setattr(transformer, "unload_lora", ThenTidy(transformer, "unload_lora"))
    if hasattr(transformer, "fuse_lora"):
        undo.setattr(transformer, "fuse_lora", Merges(transformer, "fuse_lora"))
