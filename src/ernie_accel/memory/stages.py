"""What the device holds in each stage of a call: weights, and what is computed with them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from ernie_accel.core.apply import apply_request
from ernie_accel.core.components import (
    DENOISERS,
    PROMPT_COMPONENTS,
    Pipeline,
    denoisers_of,
    mark_as_skeleton,
    modules_of,
)
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.stand_in import standing_in
from ernie_accel.core.transform import Transform
from ernie_accel.families import family_of
from ernie_accel.families.family import Family
from ernie_accel.memory.activations import peak_of, quiet
from ernie_accel.memory.call import Call
from ernie_accel.models.guided_forward import GuidedForward
from ernie_accel.models.rewritten import ForwardInputs, inputs_of
from ernie_accel.storage.reading import forgetful
from ernie_accel.transforms.denoiser.batch_guidance import BatchGuidance
from ernie_accel.transforms.denoiser.fuse_kernels import FuseKernels
from ernie_accel.transforms.denoiser.rewrite_blocks import RewriteBlocks
from ernie_accel.transforms.vae.decoder import FuseVae
from ernie_accel.transforms.vae.slices_and_tiles import SliceVae, TileVae
from ernie_accel.transforms.weights.cast_dtype import CastDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What lies on the device between the stages: embeddings, latents, the inputs of graphs. Of full-size ERNIE-Image at
#: 1024x1024, the peak of a picture less weights and the largest stage: 75 MB without enhancer, 150 with (Hopper).
BETWEEN = 160_000_000
#: What is left for a stage of an architecture that cannot be worked out: an allowance, not a prediction.
UNKNOWN = 2 * 2**30
#: What captured graphs and torch's allocator hold beyond what is in use: there 660 to 760 MiB, with memory capped.
POOLS = 800 * 2**20
#: The same where nothing is captured: blocks of other sizes than those asked for.
ROUNDING = 400 * 2**20
#: Transforms that change what a stage needs beside weights, and can be applied to tensors without data.
_OF_DENOISER, _OF_VAE = (RewriteBlocks, FuseKernels, BatchGuidance), (FuseVae, TileVae, SliceVae)
_TRACED = (CastDtype, *_OF_DENOISER, *_OF_VAE)
#: Of them, those that do not change what a stage needs.
_ELSEWHERE: Mapping[str, tuple[type[Transform], ...]] = {"denoise": _OF_VAE, "decode": _OF_DENOISER}


@dataclass(frozen=True)
class Stage:
    """A stage of a call.

    Attributes:
        name: "enhance", "encode", "denoise" or "decode".
        weights: Bytes of weights on the device meanwhile.
        activations: Bytes that are computed with them at most; None where that is not known for this architecture.
    """

    name: str
    weights: int
    activations: int | None

    @property
    def total(self) -> int:
        """Bytes in use; `UNKNOWN` for what is not known."""
        return self.weights + (UNKNOWN if self.activations is None else self.activations) + BETWEEN


def activations_of(
    pipe: Pipeline,
    transforms: Iterable[Transform],
    context: Context,
    call: Call,
    known: Mapping[str, int | None] | None = None,
) -> dict[str, int | None]:
    """Return what each stage needs beside weights, in the order of the stages; nothing is computed and `pipe` stays.

    Args:
        pipe: As it is now.
        transforms: What will be applied to it.
        context: The machine.
        call: What will be asked of it.
        known: What some stages need, by name, where that was worked out before.
    """
    known = dict(known or {})
    traced = tuple(forgetful(each) for each in transforms if isinstance(each, _TRACED))
    names = tuple(name for name, _, _ in _runs(pipe, call))
    keys = _stage_keys(pipe, names, traced, context, call)
    known |= {name: _stages[key] for name, key in keys.items() if name not in known and key in _stages}
    if all(name in known for name in names):
        return {name: known[name] for name in names}
    twin = without_weights(pipe)
    if traced:
        try:
            apply_request(twin, traced, None, context, skip_unsupported=True)
        except ErnieAccelError:
            twin, keys = without_weights(pipe), {}
    found: dict[str, int | None] = {}
    with quiet():
        for name, part, run in _runs(twin, call):
            if name in known:
                found[name] = known[name]
            elif isinstance(run, _LanguageModel):
                found[name] = run.peak_of(part)
            else:
                found[name] = None if run is None else peak_of(part, run, call.prompt_tokens)
    for name, key in keys.items():
        while len(_stages) >= _MAX_STAGES:
            _stages.pop(next(iter(_stages)), None)
        _stages[key] = found[name]
    return found


#: What stages need, by all that it depends on: the next device or preset shares what is the same for both.
_stages: dict[Hashable, int | None] = {}
_MAX_STAGES = 256


def _stage_keys(
    pipe: Pipeline, names: Iterable[str], traced: tuple[Transform, ...], context: Context, call: Call
) -> dict[str, Hashable]:
    """Return, by stage, all that its need depends on; empty for a pipe that was changed from outside.

    The name and the memory of a device are left out, because what a transform makes depends on neither.
    """
    made = [_facts(module) for module in modules_of(pipe).values()]
    if context.state is not None or not all(made):
        return {}
    machine = (context.device, context.capability, context.no_compile, tuple(sorted(context.versions.items())))
    same = (type(pipe), tuple(modules_of(pipe)), tuple(made), _Same(family_of(pipe)), machine, call)
    return {
        name: (name, same, tuple(each for each in traced if not isinstance(each, _ELSEWHERE.get(name, ()))))
        for name in names
    }


@dataclass(frozen=True, eq=False)
class _Same:
    """A key that is equal to another only if both are of one object, which it keeps alive."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _facts(module: nn.Module) -> str | None:
    """Return a digest of all that a module computes by; None for one that does not do what its library made it for."""
    digest = hashlib.sha256()
    for name, layer in module.named_modules():
        own, processor = vars(layer), getattr(layer, "processor", None)
        changed = "forward" in own or layer._forward_hooks or layer._forward_pre_hooks
        for each in (layer, *((processor,) if processor is not None else ())):
            if changed or type(each).__module__.partition(".")[0] not in _LIBRARIES:
                return None
        config = own.get("config")
        said = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else repr(config)
        plain = [(key, value) for key, value in own.items() if isinstance(value, (bool, int, float, str, tuple))]
        kernel = (getattr(processor, "_attention_backend", None), getattr(config, "_attn_implementation", None))
        digest.update(repr((name, type(layer), type(processor), kernel, said, plain)).encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(repr((name, type(tensor), tensor.shape, tensor.stride(), tensor.dtype)).encode())
    return digest.hexdigest()


def without_weights(pipe: Pipeline) -> Pipeline:
    """Return a pipe like this one, as it is now, whose weights are on the meta device."""
    parts: dict[str, object] = dict(pipe.components)
    for name, module in modules_of(pipe).items():
        memo: dict[int, object] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            bare = tensor.detach().to("meta")
            memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
        parts[name] = copy.deepcopy(module, memo)
    twin: Pipeline = type(pipe)(**parts)
    mark_as_skeleton(twin)
    return twin


def _runs(pipe: Pipeline, call: Call) -> Iterator[tuple[str, nn.Module, Callable[[nn.Module], object] | None]]:
    modules, family = modules_of(pipe), family_of(pipe)
    if "pe" in modules:
        yield "enhance", modules["pe"], _LanguageModel(1, call.new_tokens)
    if any(name in modules for name in PROMPT_COMPONENTS if name != "pe"):
        name = next(name for name in PROMPT_COMPONENTS if name in modules and name != "pe")
        known = family.is_known and hasattr(modules[name], "get_input_embeddings")  # others may take other arguments
        yield "encode", modules[name], _LanguageModel(call.rows, call.prompt_tokens) if known else None
    for denoiser in list(denoisers_of(pipe).values())[:1]:
        yield "denoise", denoiser, _step(inputs_of(family), call, _rows(denoiser, family, call))
    if "vae" in modules:
        yield "decode", modules["vae"], _decode(modules["vae"], call)


def _rows(denoiser: nn.Module, family: Family, call: Call) -> int:
    """Return the rows of the denoiser's largest batch."""
    one_by_one = family.guidance_calls is not None and standing_in(denoiser, GuidedForward) is None
    return call.pictures if one_by_one else call.rows


def _step(inputs: ForwardInputs | None, call: Call, rows: int) -> Callable[[nn.Module], object] | None:
    if inputs is None:
        return None
    return lambda model: model(**inputs(model, rows, call.width, call.height, call.prompt_tokens))


@dataclass(frozen=True)
class _LanguageModel:
    """The work of a language model, which has many layers, and is mostly as its library made it.

    What such a model needs is therefore worked out once in a process: it takes half the time of a plan.
    """

    rows: int
    tokens: int

    def __call__(self, model: nn.Module) -> object:
        ids = torch.zeros(self.rows, self.tokens, dtype=torch.long)
        return model(input_ids=ids, output_hidden_states=True)

    def peak_of(self, model: nn.Module) -> int:
        """Return the bytes that it needs at most beside weights."""
        key = (_as_made(model), self)
        if key[0] is None:
            return peak_of(model, self, self.tokens)
        if key not in _language_models:
            if len(_language_models) >= _MAX_KNOWN:
                _language_models.clear()
            _language_models[key] = peak_of(model, self, self.tokens)
        return _language_models[key]


#: What was worked out, by model and work.
_language_models: dict[Hashable, int] = {}
_MAX_KNOWN = 64
#: Whose layers do what their settings say.
_LIBRARIES = ("torch", "transformers", "diffusers")


def _as_made(model: PreTrainedModel) -> Hashable:
    """Return all that the activations of a language model depend on; None for one that was changed from outside."""
    layers = dict(model.named_modules())
    for layer in layers.values():
        changed = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
        if changed or type(layer).__module__.partition(".")[0] not in _LIBRARIES:
            return None
    attention = (getattr(getattr(layer, "config", None), "_attn_implementation", None) for layer in layers.values())
    tensors = (*model.named_parameters(), *model.named_buffers())
    return (
        model.config.to_json_string(use_diff=False),
        tuple((name, type(layer)) for name, layer in layers.items()),
        tuple(attention),
        tuple((name, type(tensor), tensor.shape, tensor.dtype) for name, tensor in tensors),
    )


class _Decoder(Protocol):
    """A VAE of diffusers as a type checker sees it: its own classes come without types."""

    dtype: torch.dtype

    def decode(self, z: torch.Tensor, *, return_dict: bool) -> object: ...


def _decode(vae: nn.Module, call: Call) -> Callable[[nn.Module], object] | None:
    config = vae.config
    channels, widths = getattr(config, "latent_channels", None), getattr(config, "block_out_channels", None)
    if not hasattr(vae, "decode") or channels is None or widths is None or type(vae).__name__ not in _PICTURE_VAES:
        return None
    scale = 2 ** (len(widths) - 1)

    def run(model: nn.Module) -> object:
        shape = (call.pictures, channels, call.height // scale, call.width // scale)
        decoder = cast(_Decoder, model)
        return decoder.decode(torch.empty(shape, dtype=decoder.dtype), return_dict=False)

    return run


_PICTURE_VAES = frozenset({"AutoencoderKL", "AutoencoderKLFlux2"})


def weights_by_stage(planned: PlannedPipe, names: Iterable[str], kept: int | None) -> dict[str, int]:
    """Return the bytes of weights on the device in each stage.

    Args:
        planned: The pipe as it will be.
        names: Of the stages.
        kept: Bytes that `Residency` keeps them within; None where it is not used.
    """
    everything = planned.nbytes
    if kept is not None:
        return dict.fromkeys(names, min(kept, everything))
    components = {name.partition(".")[0] for name in planned.weights}
    prompts = {name for name in components if name in PROMPT_COMPONENTS}
    denoisers = {name for name in components if name in DENOISERS}
    at_work = {"enhance": {"pe"}, "encode": prompts - {"pe"}, "denoise": denoisers}
    at_work["decode"] = components - prompts - denoisers

    def total(chosen: Iterable[str]) -> int:
        return sum(planned.bytes_of(name) for name in chosen)

    found = {}
    for name in names:
        if planned.offload == "model":
            found[name] = total(at_work[name])
        elif planned.offload == "stages":
            found[name] = total((components - prompts) | at_work[name])
        else:
            found[name] = everything
    return found
