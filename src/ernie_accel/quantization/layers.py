"""Find the linear layers of a pipe, say which are left out and why, and measure the error of each."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ernie_accel.common.language import said
from ernie_accel.common.notes import Note
from ernie_accel.core.components import Pipeline, is_skeleton, modules_of
from ernie_accel.core.transform import LayerReceipt
from ernie_accel.quantization.backend import QuantizationBackend
from ernie_accel.quantization.choose import BACKENDS

#: Left out of a component that no family knows: everything outside numbered blocks, and inside them what modulates,
#: embeds or predicts. Quantizing these costs the most accuracy and saves the least (see docs/quantization.md).
GENERIC_EXCLUDE = (r"(?!.*\.\d+\.)", r"(?i).*(norm|adaln|modulation|emb)", r"lm_head\b")
_ADAPTERS = frozenset({"lora_A", "lora_B"})


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of a pipe, and its place.

    Attributes:
        name: Component and path, "transformer.layers.1.mlp.up_proj".
        parent: The module that has it as a child.
        child: Its name there.
        layer: The layer, quantized or not.
        left_out: Why it must not be quantized; None if it may be.
        stored_as: "scheme by backend" of a layer that is quantized already; else None.
        parts: For a layer that does not exist yet, the linear layers that will be concatenated into it; `layer` is the
            first of them.
    """

    name: str
    parent: torch.nn.Module
    child: str
    layer: torch.nn.Module
    left_out: str | None
    stored_as: str | None
    parts: tuple[torch.nn.Linear, ...] = ()

    @property
    def linear(self) -> torch.nn.Linear:
        """The layer, for one that is not quantized."""
        if not isinstance(self.layer, torch.nn.Linear):
            raise TypeError(f"{self.name} is a {type(self.layer).__name__}, not an nn.Linear")
        return self.layer


def linear_sites(
    pipe: Pipeline,
    components: tuple[str, ...],
    exclude: tuple[str, ...] | None,
    fused: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> list[LinearSite]:
    """Return all linear layers of the components, in the pipe's order, whether they can be quantized or not.

    Args:
        pipe: The pipeline.
        components: Component names.
        exclude: Regular expressions matched from the start of the path within the component; None takes the
            family's, or `GENERIC_EXCLUDE` where no family knows the component. A layer that is made of several is
            left out if one of them is.
        fused: Layers of the transformer that will be concatenated before: path of the new one -> paths of its parts.
    """
    from ernie_accel.families import family_of

    family = family_of(pipe)
    sites = []
    for component, module in modules_of(pipe, components).items():
        patterns, why = exclude, said("excluded")
        if patterns is None:
            known = family.keep_precise.get(component)
            patterns = GENERIC_EXCLUDE if known is None else known
            outside = said("kept precise: outside blocks, or modulates")
            why = said("kept precise in {family}", family=family.name) if known else outside
        shared = _shared_parameters(module)
        to_come = fused if component == "transformer" else {}
        gone = {path for paths in to_come.values() for path in paths}
        found = []
        for path, layer in module.named_modules():
            stored_as = quantized_as(layer)
            if path in gone or (not isinstance(layer, torch.nn.Linear) and stored_as is None):
                continue
            parent, _, child = path.rpartition(".")
            beside = tuple(f"{parent}.{name}" for name in getattr(layer, "part_names", ()))
            left_out = why if _matches(patterns, (path, *beside)) else _obstacle(path, layer, shared)
            found.append(
                LinearSite(f"{component}.{path}", module.get_submodule(parent), child, layer, left_out, stored_as)
            )
        for path, paths in to_come.items():
            site = _to_come(module, component, path, paths, patterns, why, shared)
            within = site.name.removesuffix(site.child)
            last = max((i for i, other in enumerate(found) if other.name.startswith(within)), default=len(found) - 1)
            found.insert(last + 1, site)  # a new child is its parent's last
        sites += found
    return sites


def idle_patterns(exclude: tuple[str, ...] | None, paths: Collection[str]) -> list[str]:
    """Return one reason for each pattern of `exclude` that matches none of the `paths` of modules."""
    idle = [pattern for pattern in exclude or () if not any(re.match(pattern, path) for path in paths)]
    return [
        said("exclude: {pattern!r} matches no layer{meant}", pattern=pattern, meant=_meant(pattern, paths))
        for pattern in idle
    ]


def excludable_paths(pipe: Pipeline, components: Iterable[str]) -> Iterator[str]:
    """Yield what patterns of layers to leave out are matched with: each module's path, and those it was made of."""
    for module in modules_of(pipe, components).values():
        for path, layer in module.named_modules():
            yield path
            parent = path.rpartition(".")[0]
            yield from (f"{parent}.{name}" for name in getattr(layer, "part_names", ()))


def _meant(pattern: str, paths: Collection[str]) -> str:
    within = next((path for path in paths if re.search(pattern, path)), None)
    if within is None:
        return said(": leave it out, or look for the paths in named_modules()")
    return said(" from the start of its path, as {within!r}: write {pattern!r}", within=within, pattern=f".*{pattern}")


def _matches(patterns: tuple[str, ...], paths: tuple[str, ...]) -> bool:
    return any(re.match(pattern, path) for pattern in patterns for path in paths)


def _to_come(
    module: torch.nn.Module,
    component: str,
    path: str,
    paths: tuple[str, ...],
    patterns: tuple[str, ...],
    why: str,
    shared: set[int],
) -> LinearSite:
    """Return the site of a layer that will be made of those at `paths`."""
    parent, _, child = path.rpartition(".")
    parts = tuple(part for p in paths if isinstance(part := module.get_submodule(p), torch.nn.Linear))
    obstacles = (_obstacle(p, part, shared) for p, part in zip(paths, parts, strict=True))
    left_out = why if _matches(patterns, (path, *paths)) else next(filter(None, obstacles), None)
    return LinearSite(f"{component}.{path}", module.get_submodule(parent), child, parts[0], left_out, None, parts)


def quantized_as(layer: torch.nn.Module) -> str | None:
    """Return "scheme by backend" for a layer that anyone has quantized, else None."""
    receipt = RECEIPT.of(layer)
    if receipt is not None:
        return stored_name(receipt.scheme, receipt.backend, receipt.correction_rank)
    backend = holder_of(layer)
    return said("another scheme by {backend}", backend=backend.name) if backend is not None else None


def stored_name(scheme: str, backend: str, correction_rank: int | None) -> str:
    """Return how plans and errors call what a layer is stored as."""
    corrected = said(" with a correction of rank {rank}", rank=correction_rank) if correction_rank else ""
    return said("{scheme} by {backend}{corrected}", scheme=scheme, backend=backend, corrected=corrected)


def holder_of(layer: torch.nn.Module) -> QuantizationBackend | None:
    """Return the backend whose layer this is, or None for an ordinary one."""
    return next((backend for backend in BACKENDS.values() if backend.holds(layer)), None)


RECEIPT = Note("receipt", LayerReceipt, "linear layer", "in which scheme it was quantized, and by which backend")


def sqnr_db(original: torch.Tensor, approximation: torch.Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB, in float64 sums over a few rows at a time.

    Args:
        original: Any shape, floating.
        approximation: The same shape, any floating dtype.

    Returns:
        10 log10(sum x^2 / sum (x - y)^2); infinite for equal tensors.
    """
    signal = noise = 0.0
    rows = max(1, 2**22 // max(1, original[0].numel())) if original.ndim > 1 else len(original)
    for start in range(0, len(original), rows):
        x = original[start : start + rows].float()
        y = approximation[start : start + rows].float()
        signal += x.square().sum(dtype=torch.float64).item()
        noise += (x - y).square().sum(dtype=torch.float64).item()
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _obstacle(path: str, layer: torch.nn.Module, shared: set[int]) -> str | None:
    """Return why this layer cannot be replaced in any scheme; None if it can."""
    if _ADAPTERS & set(path.split(".")):
        return said("a LoRA adapter")
    if not isinstance(layer, torch.nn.Linear) or quantized_as(layer) is not None:
        return None
    if type(layer).forward is not torch.nn.Linear.forward or isinstance(layer, NonDynamicallyQuantizableLinear):
        return said("it is a {layer}, whose owner may read the weight itself", layer=type(layer).__name__)
    if id(layer.weight) in shared:
        return said("it shares its weight with another layer")
    if layer.weight.device.type == "meta" and not is_skeleton(layer):
        return said("its weight is not loaded (meta device): quantize before offloading")
    if not layer.weight.is_floating_point():
        return said("its weight is {dtype}", dtype=str(layer.weight.dtype).removeprefix("torch."))
    return None


def _shared_parameters(module: torch.nn.Module) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice
