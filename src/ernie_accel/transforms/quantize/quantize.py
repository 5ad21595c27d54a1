"""The transform that quantizes linear layers, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ernie_accel.core.components import Pipeline, absent_components, module_bytes, modules_of, pipe_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.text import human_bytes
from ernie_accel.core.transform import Applied, Effect, LayerReceipt, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of
from ernie_accel.transforms.dtype import DTYPES, CastDtype
from ernie_accel.transforms.quantize.backend import SCHEMES, plain_copy
from ernie_accel.transforms.quantize.choose import AUTO, AUTO_SCHEMES, BACKENDS, Choice, check_names, choose
from ernie_accel.transforms.quantize.guard import refuse_casts
from ernie_accel.transforms.quantize.layers import RECEIPT, LinearSite, linear_sites, sqnr_db
from ernie_accel.transforms.rewrite import RewriteBlocks, rewritten_blocks

#: Layers that the note of a plan names for each reason to leave some out; `Preview.skipped` has all.
NAMED = 2


@dataclass(frozen=True, repr=False)
class Quantize(Transform):
    """Quantize the linear layers of the repeated blocks; leave out what the family knows to break.

    Beside one for the transformer, the text encoder or the prompt enhancer can have one of their own.

    Pays:
        For memory, always. For speed, compiled and with a scheme that multiplies in its own dtype ("fp8" from
        capability 8.9, "int8" from 8.0), or for the prompt enhancer, which waits for its weights: "fp8-weight-only".

    Attributes:
        scheme: A key of `SCHEMES` ("fp8", "int8-weight-only", "nf4", "gguf-q8_0", ...); "auto" takes the fastest that
            this machine can run.
        backend: The library that does it; "auto" takes the first that has the scheme and can run it here. Ask
            `choose` what that is.
        components: Component names: the transformer, the text encoder, the prompt enhancer ("pe").
        exclude: Regular expressions of layers to leave out, matched from the start of the path within the component;
            None takes the family's list (for what no family knows: all outside repeated blocks, and modulation).
        device: Move the whole pipe there, quantizing layer by layer on the way: the device never holds more than the
            quantized pipe and one layer. None quantizes where the pipe is.
        keep_originals: Keep the unquantized weights in host memory, so that ``restore`` is exact.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZE
    slot: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY

    scheme: str
    backend: str = field(default=AUTO, kw_only=True)
    components: tuple[str, ...] = field(default=("transformer",), kw_only=True)
    exclude: tuple[str, ...] | None = field(default=None, kw_only=True)
    device: str | None = field(default=None, kw_only=True)
    keep_originals: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.scheme, self.backend)

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
        chosen = self.choose(context).chosen
        cast = context.planned_one(CastDtype)
        dtype = (
            DTYPES[cast.dtype]
            if cast
            else next(modules_of(pipe, self.components)[self.components[0]].parameters()).dtype
        )
        return None if chosen is None else BACKENDS[chosen.backend].breaks_graph(chosen.scheme, dtype)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        choice = self.choose(context)
        reasons = list(choice.reasons)
        if self.device is not None and torch.device(self.device).type != context.device:
            reasons.append(f"device={self.device!r} is not the device that was planned for, {context}")
        for other in context.planned:
            twice = [name for name in self.components if isinstance(other, Quantize) and name in other.components]
            reasons += [f"{name} is quantized by {other!r} in the same plan" for name in twice]
        absent = absent_components(pipe, self.components)
        if absent or choice.chosen is None:
            return reasons + absent
        work = _Work(self, pipe, context)
        return reasons + [reason for component in self.components for reason in work.problems(component)]

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        work = _Work(self, pipe, context)
        todo = work.todo
        if not todo:
            return Preview((), note=f"the layers are {work.name} already")
        saved = dict.fromkeys(self.components, 0)
        for site in todo:
            spec = site.spec(work.cast_to)
            plain = spec.numel * spec.dtype.itemsize + spec.bias_bytes
            saved[site.name.split(".")[0]] += plain - work.backend.stored_bytes(work.scheme, spec)
        sizes = []
        for component, module in modules_of(pipe, self.components).items():
            before = module_bytes(module) - work.saved_by_cast(component)
            sizes.append(f"{component} {human_bytes(before)} -> {human_bytes(before - saved[component])}")
        total = pipe_bytes(pipe) - work.saved_by_cast(None)
        where = f" on its way to {self.device}" if self.device else ""
        note = f"{work.name}{where}; {', '.join(sizes)}; {_tell_left_out(work.left_out, len(work.sites))}"
        remark = work.backend.remark(work.scheme, context.device)
        note += f"; {remark}" if remark else ""
        return Preview(tuple(site.name for site in todo), total - sum(saved.values()), note, work.left_out)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        work = _Work(self, pipe, context)
        receipts = []
        with Undo() as undo:
            if self.device is not None:
                _remember_places(pipe, undo)
            for site in work.todo:
                receipts.append(_replace(site, work, self.device, undo))
            refuse_casts(pipe, self.components, undo)
            if self.device is not None:
                pipe.to(self.device)
        worst = min(receipts, key=lambda receipt: receipt.sqnr_db)
        note = f"{work.name}; weights at {worst.sqnr_db:.1f} dB SQNR or better (least: {worst.name})"
        if self.keep_originals:
            kept = sum(receipt.bytes_before for receipt in receipts)
            note += f"; keeps {human_bytes(kept)} of originals in host memory for restore()"
        return Applied(
            tuple(receipt.name for receipt in receipts),
            undo=undo if self.keep_originals else None,
            no_undo=None if self.keep_originals else "keep_originals=False: the weights are gone",
            skipped=work.left_out,
            note=note,
            details=tuple(receipts),
        )


class _Work:
    """What a `Quantize` means for one pipe on one machine; the same for preview and apply, so that they agree."""

    def __init__(self, wish: Quantize, pipe: Pipeline, context: Context) -> None:
        chosen = wish.choose(context).chosen
        if chosen is None:
            raise ValueError(f"{wish!r} cannot run here; unsupported() says why")
        self.scheme, self.backend = chosen.scheme, BACKENDS[chosen.backend]
        self.name = f"{chosen.scheme} by {chosen.backend}"
        self.sites = linear_sites(pipe, wish.components, wish.exclude, _to_be_fused(pipe, context))
        self._pipe, self._context = pipe, context
        cast = context.planned_one(CastDtype)
        self._cast = cast
        self.cast_to = None if cast is None else DTYPES[cast.dtype]
        plain = [site for site in self.sites if site.stored_as is None]
        #: Why layers stay as they are, by name.
        self.left_out = {site.name: why for site in plain if (why := self._why_not(site)) is not None}
        #: The layers to quantize.
        self.todo = [site for site in plain if site.name not in self.left_out]

    def _why_not(self, site: LinearSite) -> str | None:
        if site.left_out is not None:
            return site.left_out
        return self.backend.layer_problem(self.scheme, site.spec(self._cast_of(site)))

    def _cast_of(self, site: LinearSite) -> torch.dtype | None:
        components = self._cast.components if self._cast else None
        return self.cast_to if components is None or site.name.split(".")[0] in components else None

    def problems(self, component: str) -> list[str]:
        """Return why this component cannot be quantized; empty if it can, or is so already."""
        mine = [site for site in self.sites if site.name.startswith(f"{component}.")]
        todo = [site for site in self.todo if site.name.startswith(f"{component}.")]
        done = [site for site in mine if site.stored_as is not None]
        other = [site for site in done if todo or site.stored_as != self.name or site.left_out is not None]
        if other:
            return [
                f"{component} is quantized already ({len(done)} layers, {other[0].name} as {other[0].stored_as}): "
                "restore(pipe) first, or load the pipe unquantized"
            ]
        if todo or done:
            return []
        return [f"{component}: no linear layer can be quantized: {_tell_left_out(self.left_out, len(mine), component)}"]

    def saved_by_cast(self, component: str | None) -> int:
        """Return the bytes that a planned cast will have saved in this component, or in all."""
        if self._cast is None:
            return 0
        wish = self._cast if component is None else replace(self._cast, components=(component,))
        covered = component is None or self._cast.components is None or component in self._cast.components
        after = wish.preview(self._pipe, self._context).bytes_after if covered else None
        return 0 if after is None else pipe_bytes(self._pipe) - after


def _to_be_fused(pipe: Pipeline, context: Context) -> Mapping[str, tuple[str, ...]]:
    """Return the layers that a planned `RewriteBlocks` will have concatenated: path of the new one -> of its parts."""
    family, rewrite = family_of(pipe), context.planned_one(RewriteBlocks)
    if rewrite is None or not rewrite.fuse or family is None or family.rewritten is None:
        return {}
    blocks = rewritten_blocks(pipe)
    found: Mapping[str, tuple[str, ...]] = (
        {} if blocks.is_rewritten(pipe.transformer) else blocks.to_be_fused(pipe.transformer)
    )
    return found


def _replace(site: LinearSite, work: _Work, device: str | None, undo: Undo) -> LayerReceipt:
    """Put the quantized layer into the place of one linear; the original ends up in host memory."""
    linear = site.linear
    source = linear if device is None else plain_copy(linear, linear.weight.detach().to(device))
    if device is not None and source.bias is not None:
        source.bias.data = source.bias.data.to(device)
    layer = work.backend.quantize(work.scheme, source)
    receipt = LayerReceipt(
        name=site.name,
        scheme=work.scheme,
        backend=work.backend.name,
        dtype=str(linear.weight.dtype).removeprefix("torch."),
        shape=(linear.weight.shape[0], linear.weight.shape[1]),
        bytes_before=module_bytes(linear),
        bytes_after=module_bytes(layer),
        sqnr_db=round(sqnr_db(source.weight.detach(), work.backend.dequantize(layer)), 3),
    )
    setattr(layer, RECEIPT, receipt)
    undo.push(_putter_back(site, stays_put=device is not None))
    site.parent._modules[site.child] = layer
    if device is None:
        linear.to("cpu")
    return receipt


def _putter_back(site: LinearSite, *, stays_put: bool) -> Callable[[], None]:
    """Return the way back: the original in its place, on the device that the pipe has moved to since."""

    def put_back() -> None:
        layer = site.parent._modules[site.child]
        tensors = [] if layer is None else [*layer.parameters(), *layer.buffers()]
        if not stays_put and tensors:
            site.layer.to(tensors[0].device)
        site.parent._modules[site.child] = site.layer

    return put_back


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


def _tell_left_out(left_out: dict[str, str], total: int, component: str | None = None) -> str:
    """Say how many of `total` layers are left out, by reason, and name the first of each."""
    by_reason: dict[str, list[str]] = {}
    for name, why in left_out.items():
        if component is None or name.startswith(f"{component}."):
            by_reason.setdefault(why, []).append(name)
    reasons = []
    for why, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        reasons.append(f"{len(names)} {why}: {', '.join(names[:NAMED])}{more}")
    told = f" ({'; '.join(reasons)})" if reasons else ""
    return f"leaves {sum(map(len, by_reason.values()))} of {total} linear layers as they are{told}"
