"""The transform that quantizes linear layers, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ernie_accel.common.language import joined, said
from ernie_accel.common.text import human_bytes
from ernie_accel.core.arguments import check_patterns
from ernie_accel.core.captured import comes_and_goes, plain_tensors
from ernie_accel.core.components import (
    Pipeline,
    absent_components,
    is_device_name,
    module_bytes,
    modules_of,
    quantizing_device,
    staying_denoisers_note,
)
from ernie_accel.core.context import Context
from ernie_accel.core.originals import ORIGINAL, Original
from ernie_accel.core.planned import PlannedPipe, PlannedWeight
from ernie_accel.core.transform import Applied, Effect, LayerReceipt, Phase, Preview, Transform
from ernie_accel.core.undo import Undo, place_of
from ernie_accel.models.adapters import check_adapters
from ernie_accel.models.rewritten import rewritten_model
from ernie_accel.quantization.backend import SCHEMES, LinearSpec, QuantizationBackend, plain_copy
from ernie_accel.quantization.choose import (
    AUTO,
    AUTO_SCHEMES,
    BACKENDS,
    Choice,
    check_names,
    choose,
    register_quantization_backend,
)
from ernie_accel.quantization.correction import correction_bytes, dequantized, largest_rank, quantize_corrected
from ernie_accel.quantization.guard import refuse_casts
from ernie_accel.quantization.layers import (
    RECEIPT,
    LinearSite,
    excludable_paths,
    idle_patterns,
    linear_sites,
    sqnr_db,
    stored_name,
)
from ernie_accel.quantization.merging import bits_of, held_by
from ernie_accel.quantization.refusals import refuse_loras, refuse_other_weights, refuse_saving

#: Layers that the note of a plan names for each reason to leave some out; `Preview.skipped` has all.
NAMED = 2


@dataclass(frozen=True, repr=False)
class Quantize(Transform):
    """Quantize the linear layers of the repeated blocks; leave out those that the family keeps precise.

    The text encoder and the prompt enhancer can have a `Quantize` of their own beside the transformer's.

    Pays:
        For memory, always. For speed, if the pipe is compiled and the scheme multiplies in its own dtype ("fp8" from
        capability 8.9, "int8" from 8.0). The prompt enhancer is limited by reading its weights, so there
        "fp8-weight-only" is faster too.

    Attributes:
        scheme: A key of `SCHEMES` ("fp8", "int8-weight-only", "nf4", "gguf-q8_0", ...); "auto" takes the fastest that
            this machine can run.
        backend: The library that quantizes; "auto" takes the first that has the scheme and can run it here (see
            `choose`). A `QuantizationBackend` of your own is registered under its name.
        components: Component names: the transformer, the text encoder, the prompt enhancer ("pe").
        exclude: Regular expressions of layers to leave out, matched from the start of the path within the component;
            None takes the family's list (without a family: everything outside repeated blocks, and modulation).
        device: Move the whole pipe there, quantizing layer by layer on the way, so that the device never holds more
            than the quantized pipe and one layer. None quantizes on the pipe's present device.
        keep_originals: Keep the unquantized weights in host memory, so that ``restore`` is exact, and LoRAs can be
            merged.
        correction_rank: Add to each layer the low-rank product that its stored weight lacks, of this rank and in the
            layer's own dtype: 32 adds 64 bytes in bfloat16 for each input and output. None adds nothing.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZE
    slot: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY

    scheme: str
    backend: str = field(default=AUTO, kw_only=True, metadata={"also_takes": QuantizationBackend})
    components: tuple[str, ...] = field(default=("transformer",), kw_only=True)
    exclude: tuple[str, ...] | None = field(default=None, kw_only=True)
    device: str | None = field(default=None, kw_only=True)
    keep_originals: bool = field(default=True, kw_only=True)
    correction_rank: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.backend, QuantizationBackend):
            object.__setattr__(self, "backend", register_quantization_backend(self.backend).name)
        check_names(self.scheme, self.backend)
        check_patterns("exclude", self.exclude or ())
        if self.device is not None and not is_device_name(self.device):
            raise ValueError(f"device takes a name such as 'cuda' or 'cuda:1', got {self.device!r}")
        if self.correction_rank is not None and self.correction_rank < 1:
            none = "leave it out for no correction"
            raise ValueError(f"correction_rank takes a rank of at least 1, got {self.correction_rank}: {none}")

    @property
    def occupies(self) -> str:
        """The slot, for the transformer; else these components, which may have a scheme of their own."""
        return self.slot if "transformer" in self.components else f"{self.slot} {', '.join(sorted(self.components))}"

    @property
    def floor_db(self) -> float:
        """The scheme's promise (for "auto" the least of those it may choose); see `Scheme`."""
        return min(SCHEMES[name].floor_db for name in (AUTO_SCHEMES if self.scheme == AUTO else (self.scheme,)))

    @property
    def moves_to(self) -> str | None:
        """The device the pipe is quantized onto."""
        return self.device

    def choose(self, context: Context | None = None) -> Choice:
        """Say which scheme and backend would be taken on a machine (default: this one), and why; print it."""
        return choose(self.scheme, self.backend, context or Context.detect(device=self.device))

    def breaks_graph(self, pipe: Pipeline, context: Context) -> str | None:
        """Return why the layers it makes cannot be compiled without graph breaks, or None."""
        chosen, dtype = self.choose(context).chosen, context.planned(pipe).dtype_of(self.components[0])
        if chosen is None or dtype is None:
            return None
        return BACKENDS[chosen.backend].breaks_graph(chosen.scheme, dtype)

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return self.components

    def keeps_compiled(self, pipe: Pipeline, context: Context) -> bool:
        return self.breaks_graph(pipe, context) is None

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        choice = self.choose(context)
        reasons = list(choice.reasons)
        if self.device is not None and self.device.partition(":")[0] != context.torch_device:
            reasons.append(
                said(
                    "device={device!r} is not the device that was planned for, {machine}",
                    device=self.device,
                    machine=context.text,
                )
            )
        absent = absent_components(pipe, self.components)
        if absent or choice.chosen is None:
            return reasons + absent
        paths = [*excludable_paths(pipe, self.components), *_to_be_fused(pipe, context)]
        reasons += idle_patterns(self.exclude, paths)
        work = _Work(self, pipe, context)
        reasons += work.correction_problems()
        return reasons + [reason for component in self.components for reason in work.problems(component)]

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        work = _Work(self, pipe, context)
        todo = work.todo
        if not todo:
            return Preview((), note=said("the layers are {scheme} already", scheme=work.name))
        before, after = context.planned(pipe), work.planned()
        sizes = [
            f"{name} {human_bytes(before.bytes_of(name))} -> {human_bytes(after.bytes_of(name))}"
            for name in self.components
        ]
        where = said(" on its way to {device}", device=self.device) if self.device else ""
        how = said("{scheme}{where}", scheme=work.name, where=where)
        remark = work.backend.remark(work.scheme, context.device)
        stays = staying_denoisers_note(pipe, self.components)
        left = _describe_left_out(work.left_out, len(work.sites))
        note = joined((how, joined(sizes, "{first}, {second}"), left, remark, stays))
        return Preview(tuple(site.name for site in todo), note, work.left_out)

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned, why = _Work(self, pipe, context).planned(), self.breaks_graph(pipe, context)
        broken = (
            {}
            if why is None
            else dict.fromkeys(
                self.components, said("{transform} comes before, and {why}", transform=repr(self), why=why)
            )
        )
        device = planned.device if self.device is None else self.device.partition(":")[0]
        return replace(planned, device=device, breaks_graph={**planned.breaks_graph, **broken})

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        work = _Work(self, pipe, context)
        receipts = []
        first = modules_of(pipe)[self.components[0]]
        where = quantizing_device(first, context.torch_device) if self.device is None else torch.device(self.device)
        with Undo() as undo:
            if self.device is not None:
                _remember_places(pipe, undo)
            for site in work.todo:
                receipts.append(_replace(pipe, site, work, self.device, where, undo))
            refuse_casts(pipe, self.components, undo)
            refuse_saving(pipe, self.components, undo)
            refuse_loras(pipe, self.components, undo)
            for module in modules_of(pipe, self.components).values():
                check_adapters(module, undo)
            refuse_other_weights(pipe, self.components, undo)
            if self.device is not None:
                pipe.to(self.device)
        worst = min(receipts, key=lambda receipt: receipt.sqnr_db)
        plain = worst.uncorrected_db
        without = "" if plain is None else said("; {db:.1f} dB without the correction", db=plain)
        note = said(
            "{scheme}; weights at {db:.1f} dB SQNR or better (least: {layer}{without})",
            scheme=work.name,
            db=worst.sqnr_db,
            layer=worst.name,
            without=without,
        )
        if self.keep_originals:
            kept = human_bytes(sum(receipt.bytes_before for receipt in receipts))
            note = joined((note, said("keeps {size} of originals in host memory for restore()", size=kept)))
        return Applied(
            tuple(receipt.name for receipt in receipts),
            undo=undo if self.keep_originals else None,
            no_undo=None if self.keep_originals else said("keep_originals=False: the weights are gone"),
            skipped=work.left_out,
            note=note,
            details=tuple(receipts),
        )


class _Work:
    """What a `Quantize` means for one pipe on one machine; preview and apply share it, so that they agree."""

    def __init__(self, request: Quantize, pipe: Pipeline, context: Context) -> None:
        chosen = request.choose(context).chosen
        if chosen is None:
            raise ValueError(f"{request!r} cannot run here; unsupported() says why")
        self.scheme, self.backend = chosen.scheme, BACKENDS[chosen.backend]
        self.rank = request.correction_rank or 0
        self.name = stored_name(chosen.scheme, chosen.backend, self.rank)
        self.sites = linear_sites(pipe, request.components, request.exclude, _to_be_fused(pipe, context))
        self._before = context.planned(pipe)
        #: Whether the originals stay for ``restore``.
        self.keeps = request.keep_originals
        plain = [site for site in self.sites if self._stored_as(site) is None]
        #: Why layers stay as they are, by name.
        self.left_out = {site.name: why for site in plain if (why := self._left_out_reason(site)) is not None}
        #: The layers to quantize.
        self.todo = [site for site in plain if site.name not in self.left_out]

    def _left_out_reason(self, site: LinearSite) -> str | None:
        if site.left_out is not None:
            return site.left_out
        return self.backend.layer_problem(self.scheme, self._spec(site))

    def _stored_as(self, site: LinearSite) -> str | None:
        """Return how the layer is stored, or will be by then."""
        weight = self._before.weights.get(f"{site.name}.weight")
        return site.stored_as or (weight.stored_as if weight is not None else None)

    def _spec(self, site: LinearSite) -> LinearSpec:
        """Describe a plain layer as it will be."""
        weight, bias = (self._before.weights.get(f"{site.name}.{kind}") for kind in ("weight", "bias"))
        if weight is None:
            raise LookupError(f"no weight of {site.name} is planned")
        return LinearSpec(weight.shape[0], weight.shape[1], weight.dtype, 0 if bias is None else bias.nbytes)

    def planned(self) -> PlannedPipe:
        """Return what the pipe will be once the layers are quantized."""
        new, gone = {}, set()
        for site in self.todo:
            spec = self._spec(site)
            name = f"{site.name}.weight"
            gone |= {name, f"{site.name}.bias"}
            nbytes = self.backend.stored_bytes(self.scheme, spec) + correction_bytes(spec, self.rank)
            shape = (spec.out_features, spec.in_features)
            new[name] = PlannedWeight(shape, spec.dtype, nbytes, stored_as=self.name, is_fresh=True)
        before = self._before.keeping(gone & self._before.weights.keys()) if self.keeps else self._before
        return before.with_weights(new, frozenset(gone))

    def correction_problems(self) -> list[str]:
        """Return why the layers cannot be corrected; empty if they can, or are not to be."""
        if not self.rank or not self.todo:
            return []
        asked = f"correction_rank={self.rank}"
        if not self.backend.takes_correction:
            able = [name for name, backend in BACKENDS.items() if backend.takes_correction]
            return [
                said(
                    "{asked}: a layer of {backend} cannot carry one; leave it out, or use {able}",
                    asked=asked,
                    backend=self.backend.name,
                    able=", ".join(able),
                )
            ]
        specs = {site.name: self._spec(site) for site in self.todo}
        ranks = {n: largest_rank(spec, self.backend.stored_bytes(self.scheme, spec)) for n, spec in specs.items()}
        name = min(ranks, key=lambda name: ranks[name])
        if self.rank <= ranks[name]:
            return []
        shape = f"{specs[name].out_features} x {specs[name].in_features}"
        fix = (
            said("choose at most {most}, or exclude it", most=ranks[name])
            if ranks[name]
            else said("leave it out, or exclude the layer")
        )
        return [
            said(
                "{asked}: {layer} ({shape}) in {scheme} would take as much as unquantized, or more; {fix}",
                asked=asked,
                layer=name,
                shape=shape,
                scheme=self.name,
                fix=fix,
            )
        ]

    def quantize(self, linear: torch.nn.Linear) -> tuple[torch.nn.Module, float | None]:
        """Return the layer that replaces `linear`, and if it is corrected, the SQNR in dB that it has otherwise."""
        if not self.rank:
            return self.backend.quantize(self.scheme, linear), None
        plain = self.backend.dequantize(self.backend.quantize(self.scheme, linear))
        before = sqnr_db(linear.weight.detach(), plain)
        return quantize_corrected(self.backend, self.scheme, linear, self.rank), round(before, 3)

    def problems(self, component: str) -> list[str]:
        """Return why this component cannot be quantized; empty if it can, or is so already."""
        mine = [site for site in self.sites if site.name.startswith(f"{component}.")]
        todo = [site for site in self.todo if site.name.startswith(f"{component}.")]
        done = [site for site in mine if self._stored_as(site) is not None]
        in_this_plan = [site for site in done if site.stored_as is None]
        if in_this_plan:
            stored_as = self._stored_as(in_this_plan[0])
            return [
                said(
                    "{component} is quantized in the same plan already ({name} as {stored_as})",
                    component=component,
                    name=in_this_plan[0].name,
                    stored_as=stored_as,
                )
            ]
        other = [site for site in done if todo or site.stored_as != self.name or site.left_out is not None]
        if other:
            return [
                said(
                    "{component} is quantized already ({count} layers, {name} as {stored_as}): restore(pipe) first, or "
                    "load the pipe unquantized",
                    component=component,
                    count=len(done),
                    name=other[0].name,
                    stored_as=other[0].stored_as,
                )
            ]
        if todo or done:
            return []
        return [
            said(
                "{component}: no linear layer can be quantized: {left}",
                component=component,
                left=_describe_left_out(self.left_out, len(mine), component),
            )
        ]


def _to_be_fused(pipe: Pipeline, context: Context) -> Mapping[str, tuple[str, ...]]:
    """Return the layers that will have been concatenated by then: path of the new one -> of its parts."""
    blocks = rewritten_model(pipe)
    if blocks is None or not context.planned(pipe).concatenates_linears or blocks.is_rewritten(pipe.transformer):
        return {}
    return blocks.to_be_fused(pipe.transformer)


def _replace(
    pipe: Pipeline, site: LinearSite, work: _Work, device: str | None, where: torch.device, undo: Undo
) -> LayerReceipt:
    """Put the quantized layer into the place of one linear; the original ends up in host memory.

    It is quantized on `where`, and stays there if `device` says so, else it goes back to where the linear is.
    """
    linear = site.linear
    here = linear.weight.device
    elsewhere = here.type != where.type
    source = plain_copy(linear, linear.weight.detach().to(where)) if device is not None or elsewhere else linear
    if source is not linear and source.bias is not None:
        source.bias.data = source.bias.data.to(where)
    layer, uncorrected_db = work.quantize(source)
    ratio = sqnr_db(source.weight.detach(), dequantized(work.backend, layer))
    if device is None and elsewhere:
        layer = layer.to(here)
    receipt = LayerReceipt(
        name=site.name,
        scheme=work.scheme,
        backend=work.backend.name,
        dtype=str(linear.weight.dtype).removeprefix("torch."),
        shape=(linear.weight.shape[0], linear.weight.shape[1]),
        bytes_before=module_bytes(linear),
        bytes_after=module_bytes(layer),
        sqnr_db=round(ratio, 3),
        correction_rank=work.rank,
        uncorrected_db=uncorrected_db,
    )
    RECEIPT.put(layer, receipt)
    component, _, path = site.name.partition(".")
    root = modules_of(pipe)[component]
    undo.object_if(_Unchanged(layer, root, path))
    undo.put_module(root, path, layer, _undo_of(linear, stays_put=device is not None))
    if device is None:
        linear.to("cpu")
    if work.keeps:
        ORIGINAL.put(layer, Original(linear, where))
    return receipt


def _undo_of(linear: torch.nn.Linear, *, stays_put: bool) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Return what gives the original back, on the device that the pipe has moved to since."""

    def give_back(layer: torch.nn.Module) -> torch.nn.Module:
        original = ORIGINAL.of(layer)
        if original is not None:
            original.give_back(linear)
        tensors = [*layer.parameters(), *layer.buffers()]
        if not stays_put and tensors:
            linear.to(tensors[0].device)
        return linear

    return give_back


class _Unchanged:
    """Ask whether what was fused into a quantized layer since would be lost with it."""

    def __init__(self, layer: torch.nn.Module, root: torch.nn.Module, path: str) -> None:
        self._layer, self._root, self._path = layer, root, path
        self._made = bits_of(layer)
        self._merged = _merged_in(root.get_submodule(path.rpartition(".")[0]))  # the original has these, too

    def __call__(self) -> str | None:
        """Return why the original cannot take the layer's place now, or None."""
        place = place_of(self._layer, self._root, self._path)
        if place is None:
            return None
        original = ORIGINAL.of(self._layer)
        merged = _merged_in(place[0]) - self._merged
        if merged and (original is None or not original.has(0, merged)):
            return said("a LoRA is fused into {path}; unload or unfuse it first (pipe.unfuse_lora())", path=self._path)
        if any(comes_and_goes(plain) for held in held_by(self._layer) for plain in plain_tensors(held)):
            return None  # while they are kept elsewhere, nothing can write to them
        now, made = bits_of(self._layer), self._made if original is None else original.bits or self._made
        if hasattr(place[0], "lora_A") or now[0] != made[0] or now == made:
            return None
        return said(
            "the quantized weight of {path} was changed since (a LoRA fused into it?), and would be lost",
            path=self._path,
        )


def _merged_in(layer: torch.nn.Module) -> set[str]:
    """Return the adapters that PEFT's layer has merged into the weight beneath it; none if it is no such layer."""
    return set(getattr(layer, "merged_adapters", ()))


def _remember_places(pipe: Pipeline, undo: Undo) -> None:
    """Have the undo move each component back to the device it is on now."""
    for module in modules_of(pipe).values():
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
        if device is not None:
            undo.push(_mover(module, device))


def _mover(module: torch.nn.Module, device: torch.device) -> Callable[[], None]:
    def move() -> None:
        module.to(device)

    return move


def _describe_left_out(left_out: dict[str, str], total: int, component: str | None = None) -> str:
    """Say how many of `total` layers are left out, by reason, and name the first of each."""
    by_reason: dict[str, list[str]] = {}
    for name, why in left_out.items():
        if component is None or name.startswith(f"{component}."):
            by_reason.setdefault(why, []).append(name)
    reasons = []
    for why, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        more = said(" and {count} more", count=len(names) - NAMED) if len(names) > NAMED else ""
        named = ", ".join(names[:NAMED])
        reasons.append(said("{count} {why}: {names}{more}", count=len(names), why=why, names=named, more=more))
    because = said(" ({reasons})", reasons=joined(reasons)) if reasons else ""
    count = sum(map(len, by_reason.values()))
    template = "leaves {count} of {total} linear layers as they are{because}"
    return said(template, count=count, total=total, because=because)
