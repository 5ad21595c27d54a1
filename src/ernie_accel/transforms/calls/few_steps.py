"""Draw in a few steps with a LoRA that was distilled for it: the adapter, and the steps and guidance it is made for."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, cast

import torch

from ernie_accel.common.language import listed, said
from ernie_accel.core.components import DENOISERS, Pipeline, is_compiled_wrapper, modules_of
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.planned import PlannedPipe, PlannedWeight
from ernie_accel.core.stand_in import Bound, StandInMethod
from ernie_accel.core.transform import MACHINE_LOCAL, Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import Defaults, add_layer, new_defaults
from ernie_accel.models.adapters import layer_paths
from ernie_accel.models.lora_keys import as_diffusers, is_foreign
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import excludable_paths

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

#: A tensor of a LoRA, as pipelines of diffusers read each format: component, path of the layer, and which of the two.
_TENSOR = re.compile(r"(\w+)\.(.+)\.lora_([AB])\.weight")


@dataclass
class _LoraLayer:
    """What a LoRA holds for one layer: the shape of the weight it is for, as far as it is known, and its values."""

    rows: int | None = None
    columns: int | None = None
    numel: int = 0


#: By component and path.
_Layers: TypeAlias = Mapping[tuple[str, str], _LoraLayer]
#: What a pipeline's class reads a LoRA with: tensors by name; that of Stable Diffusion gives the alphas beside them.
_Reader: TypeAlias = "Callable[..., dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], object]]"


@dataclass(frozen=True, repr=False)
class FewSteps(Transform):
    """Load a LoRA that lets a base checkpoint draw in a few steps; make its steps and guidance the defaults of calls.

    The adapter has a name of its own beside those that your script loads, before or after. ``restore`` removes it and
    the defaults, and leaves the others. Arguments that the caller passes always win. It takes the place of a preset's
    `CallDefaults`. ``save`` leaves it out: give it to ``load`` again.

    Pays:
        As `CallDefaults("turbo")` does for a distilled checkpoint: 4 steps without guidance are 4 forwards of one
        prompt, where a base checkpoint takes 50 forwards of two. The LoRA itself adds little to a step; merged into the
        base before optimizing (``pipe.fuse_lora()``), nothing.

    Attributes:
        lora: A safetensors file, in any format that the pipeline's ``load_lora_weights`` reads.
        steps: Denoising steps that it was distilled for, >= 1.
        guidance_scale: Guidance that it was distilled for; None: that of the family's distilled checkpoint, or 1.0,
            which is none.
        lora_scale: How strongly the LoRA counts.
        adapter_name: Name of the adapter.
    """

    phase: ClassVar[Phase] = Phase.CALL
    slot: ClassVar[str] = "call-defaults"
    effect: ClassVar[Effect] = Effect.RESAMPLES

    lora: str = field(metadata=MACHINE_LOCAL)
    steps: int = field(kw_only=True)
    guidance_scale: float | None = field(default=None, kw_only=True)
    lora_scale: float = field(default=1.0, kw_only=True)
    adapter_name: str = field(default="few-steps", kw_only=True)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.adapter_name):
            # PEFT makes it the name of a module, which takes no dots
            raise ValueError(f"adapter_name takes letters, digits, - and _, got {self.adapter_name!r}")

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return DENOISERS

    def keeps_compiled(self, pipe: Pipeline, context: Context) -> bool:
        return True

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        accepted = inspect.signature(type(pipe).__call__).parameters
        what = type(pipe).__name__
        reasons = [
            said("{pipe} takes no argument {name!r}", pipe=what, name=name)
            for name in self.wanted(pipe)
            if name not in accepted
        ]
        if not hasattr(pipe, "load_lora_weights"):
            return [*reasons, said("{pipe} loads no LoRAs", pipe=what)]
        if importlib.util.find_spec("peft") is None:
            return [*reasons, said("peft is not installed: pip install peft")]
        if any(self.adapter_name in adapters for adapters in _adapters_of(pipe).values()):
            reasons.append(
                said(
                    "{pipe} has an adapter {name!r} already: choose another adapter_name",
                    pipe=what,
                    name=self.adapter_name,
                )
            )
        found = self._layers(pipe)
        if isinstance(found, str):
            return [*reasons, found]
        planned = context.planned(pipe)
        if misfit := _misfit(found, planned):
            reasons.append(said("lora={lora!r} is of another architecture: {misfit}", lora=self.lora, misfit=misfit))
        # Such pipelines fit a LoRA to the weights that they find by name, as FLUX.1's does.
        fits = hasattr(pipe, "_maybe_expand_lora_state_dict")
        backends = [BACKENDS[name] for name in _backends(planned)] if fits else []
        unable = sorted({each.name for each in backends if not (each.takes_loras and each.keeps_names)})
        if unable:
            fix = said("quantize with torchao, quanto or gguf, or load and fuse the LoRA first (pipe.fuse_lora())")
            reasons.append(said("layers quantized by {backends} take no LoRA: {fix}", backends=listed(unable), fix=fix))
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        layers = self._layers(pipe)
        if isinstance(layers, str):
            return Preview((), note=layers)
        changes = (
            said("adapter {name} of {count} layers", name=self.adapter_name, count=len(layers)),
            *new_defaults(pipe, self.wanted(pipe)),
        )
        return Preview(
            changes,
            note="" if self.lora_scale == 1 else said("the LoRA counts {scale:g} times", scale=self.lora_scale),
        )

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned, layers = context.planned(pipe), self._layers(pipe)
        new = {}
        for (component, path), layer in ({} if isinstance(layers, str) else layers).items():
            dtype = planned.dtype_of(component) or torch.float32
            name = f"{component}.{path}.lora.{self.adapter_name}.weight"
            new[name] = PlannedWeight((layer.numel,), dtype, layer.numel * dtype.itemsize, is_fresh=True)
        return replace(planned.with_weights(new), num_inference_steps=self.steps)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        changes, anything = self.preview(pipe, context).changes, pipe
        with Undo() as undo:
            undo.push(functools.partial(_remove, pipe, self.adapter_name, _without_adapters(pipe)))
            active = {id(layer): list(layer.active_adapters) for layer in _lora_layers(pipe)}
            with torch.no_grad():
                tensors, foreign = _converted(Path(self.lora), *_names_of(pipe))
            # A file also has metadata, such as alphas; those of foreign names are in the converted tensors.
            file = Path(self.lora).absolute()
            by_name = {"weight_name": file.name, "use_safetensors": True}
            source, kwargs = (tensors, {}) if foreign else (str(file.parent), by_name)
            anything.load_lora_weights(source, adapter_name=self.adapter_name, local_files_only=True, **kwargs)
            for layer in _lora_layers(pipe):
                if self.adapter_name in layer.scaling:
                    layer.set_adapter([*active.get(id(layer), ()), self.adapter_name])
                    layer.set_scale(self.adapter_name, self.lora_scale)
                else:
                    layer.set_adapter(active[id(layer)])
            add_layer(pipe, Defaults(self.wanted(pipe)), undo)
            layers = self._layers(pipe)
            parts = modules_of(pipe, () if isinstance(layers, str) else dict.fromkeys(name for name, _ in layers))
            for owner in (pipe, *parts.values()):
                undo.setattr(owner, "save_pretrained", Bound(_refuse_saving, owner))
            for part in parts.values():
                undo.setattr(part, "load_state_dict", _LoadingPlainRefused(part, "load_state_dict"))
        return Applied(changes, undo=undo)

    def wanted(self, pipe: Pipeline) -> dict[str, Any]:
        """Return the new defaults of a call's arguments by name."""
        from ernie_accel.families import family_of

        turbo = family_of(pipe).modes.get("turbo")
        of_family = 1.0 if turbo is None or turbo.guidance_scale is None else turbo.guidance_scale
        guidance = of_family if self.guidance_scale is None else self.guidance_scale
        return {"num_inference_steps": self.steps, "guidance_scale": guidance}

    def _layers(self, pipe: Pipeline) -> _Layers | str:
        """Return what the LoRA holds, or why it cannot be used."""
        file = Path(self.lora)
        if not file.is_file() or file.suffix != ".safetensors":
            found = said("is no safetensors file") if file.exists() else said("does not exist")
            hub = said("one on the Hub is downloaded first, with huggingface_hub.hf_hub_download(repo, file)")
            return said("lora={lora!r} {found}: give the path of a file; {hub}", lora=self.lora, found=found, hub=hub)
        status = file.stat()
        found_layers = _read(file.absolute(), status.st_mtime_ns, status.st_size, *_names_of(pipe))
        if isinstance(found_layers, str):
            return said("{name} {reason}", name=f"lora={self.lora!r}", reason=found_layers)
        there = {(name, path) for name in modules_of(pipe) for path in _paths(pipe, name)}
        missing = [f"{component}.{path}" for component, path in found_layers if (component, path) not in there]
        if missing:
            count = said(
                "{count} of its {all} layers are not in this {pipe}",
                count=len(missing),
                all=len(found_layers),
                pipe=type(pipe).__name__,
            )
            return said(
                "lora={lora!r} is of another architecture: {count} (the first is {first})",
                lora=self.lora,
                count=count,
                first=missing[0],
            )
        return found_layers


class _ReadsLoras(Protocol):
    """A class of pipelines as a type checker sees it, where diffusers lets them load LoRAs."""

    lora_state_dict: _Reader


def _paths(pipe: Pipeline, component: str) -> Iterator[str]:
    """Yield the paths at which a component takes LoRAs, those of layers included that are computed as one now."""
    yield from excludable_paths(pipe, (component,))
    for module in modules_of(pipe, (component,)).values():
        for path, part in module.named_modules():
            yield from (f"{path}.{name}" for name in getattr(part, "fusible", ()))


@functools.lru_cache(maxsize=4)
def _read(file: Path, modified_ns: int, size: int, reader: _Reader, paths: tuple[str, ...]) -> _Layers | str:
    """Return what `FewSteps._layers` does, of a file that has not changed since it was read last."""
    from safetensors import SafetensorError

    try:
        tensors, _ = _converted(file, reader, paths)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return said("cannot be read: {reason}", reason=(str(error).strip() or type(error).__name__).splitlines()[0])
    if isinstance(tensors, str):
        return tensors
    layers: dict[tuple[str, str], _LoraLayer] = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            return said("holds {key}, which is no part of a LoRA that this pipeline loads", key=key)
        layer = layers.setdefault((match[1], match[2]), _LoraLayer())
        layer.numel += tensor.numel()
        if match[3] == "A":
            layer.columns = tensor.shape[-1]
        else:
            layer.rows = tensor.shape[0]
    return layers or said("holds no LoRA")


def _names_of(pipe: Pipeline) -> tuple[_Reader, tuple[str, ...]]:
    """Return what reads a LoRA's file for such pipes, and the paths of the transformer's layers."""
    transformer = modules_of(pipe).get("transformer")
    return cast(_ReadsLoras, type(pipe)).lora_state_dict, () if transformer is None else tuple(layer_paths(transformer))


def _converted(
    file: Path, reader: _Reader, paths: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], bool] | tuple[str, bool]:
    """Return the tensors of a LoRA under diffusers' names, or why it is none, and whether diffusers lacks its names."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
    magnitudes = sum("dora_scale" in name or "lora_magnitude" in name for name in names)
    if magnitudes:
        return said(
            "is a DoRA ({count} tensors of magnitudes), of which only a part would be loaded",
            count=magnitudes,
        ), False
    # By folder and name: offline, diffusers 0.38 refuses the path of a file.
    tensors = reader(str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True)
    if isinstance(tensors, tuple):  # Stable Diffusion's gives the alphas beside them
        tensors = tensors[0]
    foreign = bool(paths) and is_foreign(tensors)
    return (as_diffusers(tensors, list(paths)) if foreign else tensors), foreign


def _misfit(layers: _Layers, planned: PlannedPipe) -> str:
    """Say how many layers of a LoRA are for weights of other shapes than the pipe's; "" if none is."""
    found = []
    for (component, path), layer in layers.items():
        names = (f"{component}.{path}.weight", f"{component}.{path}.base_layer.weight")
        weight = next((planned.weights[name] for name in names if name in planned.weights), None)
        if weight is None or weight.stored_as is not None or not weight.dtype.is_floating_point:
            continue  # quantized weights have shapes of their own
        if len(weight.shape) == 2 and weight.shape != (layer.rows, layer.columns):
            rows, columns = weight.shape
            found.append(
                said(
                    "{path} is {rows} x {columns}, and the LoRA for {lora_rows} x {lora_columns}",
                    path=f"{component}.{path}",
                    rows=rows,
                    columns=columns,
                    lora_rows=layer.rows,
                    lora_columns=layer.columns,
                )
            )
    return (
        said(
            "{count} of its {all} layers have another shape (the first: {first})",
            count=len(found),
            all=len(layers),
            first=found[0],
        )
        if found
        else ""
    )


def _adapters_of(pipe: Pipeline) -> dict[str, list[str]]:
    found: dict[str, list[str]] = pipe.get_list_adapters()
    return found


def _backends(planned: PlannedPipe) -> Iterator[str]:
    """Yield the backend of each quantized weight of the transformer."""
    for name, weight in planned.weights.items():
        words = (weight.stored_as or "").split()
        if name.startswith("transformer.") and "by" in words and words[words.index("by") + 1] in BACKENDS:
            yield words[words.index("by") + 1]


def _lora_layers(pipe: Pipeline) -> Iterator[BaseTunerLayer]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in modules_of(pipe).values():
        yield from (part for part in module.modules() if isinstance(part, BaseTunerLayer))


def _without_adapters(pipe: Pipeline) -> tuple[str, ...]:
    """Return the components that never had an adapter: loading one leaves an attribute on them."""
    return tuple(name for name, module in modules_of(pipe).items() if "_hf_peft_config_loaded" not in vars(module))


def _refuse_saving(self: object, *_: object, **__: object) -> None:
    raise ErnieAccelError(
        f"{type(self).__name__}.save_pretrained: the LoRA of FewSteps() is among its layers, and what that writes has "
        "other names for their weights, which load as random numbers. Save the pipe with ernie_accel.save(pipe, "
        "folder), or call ernie_accel.restore(pipe) first."
    )


class _LoadingPlainRefused(StandInMethod):
    """A component's ``load_state_dict`` that refuses weights without the LoRA before it copies the first of them."""

    def __call__(
        self, state_dict: Mapping[str, object], strict: bool = True, *args: object, **kwargs: object
    ) -> object:
        """Load weights."""
        if not strict:  # as PEFT loads another LoRA
            return self.call_inner(state_dict, strict, *args, **kwargs)
        own = cast(torch.nn.Module, self.owner).state_dict()
        missing = [name for name in own if ".base_layer." in name and name not in state_dict]
        if missing:
            raise ErnieAccelError(
                f"{type(self.owner).__name__}.load_state_dict: these weights have no {missing[0]}, as they are without "
                "the LoRA of FewSteps(). Call ernie_accel.restore(pipe), load them, then optimize again."
            )
        return self.call_inner(state_dict, strict, *args, **kwargs)


def _remove(pipe: Pipeline, name: str, untouched: tuple[str, ...]) -> None:
    """Remove the adapter, and leave others as they are; a no-op where it is gone already."""
    wrapped = {part: module for part, module in modules_of(pipe).items() if is_compiled_wrapper(module)}
    try:
        for part, module in wrapped.items():  # diffusers finds no adapters in what torch.compile(...) returned
            setattr(pipe, part, module.get_submodule("_orig_mod"))
        _remove_unwrapped(pipe, name, untouched)
    finally:
        for part, module in wrapped.items():
            setattr(pipe, part, module)


def _remove_unwrapped(pipe: Pipeline, name: str, untouched: tuple[str, ...]) -> None:
    adapters = {each for names in _adapters_of(pipe).values() for each in names}
    if adapters - {name}:
        active = {id(layer): [each for each in layer.active_adapters if each != name] for layer in _lora_layers(pipe)}
        if name in adapters:
            pipe.delete_adapters(name)
        for layer in _lora_layers(pipe):
            layer.set_adapter(active[id(layer)])
    elif next(_lora_layers(pipe), None) is not None:  # a load that failed leaves layers without adapters
        pipe.unload_lora_weights()
    for component in untouched:
        module = modules_of(pipe).get(component)
        if module is not None and not hasattr(module, "peft_config"):
            vars(module).pop("_hf_peft_config_loaded", None)
