"""What a pipeline is made of: its modules, their tensors, dtypes and bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import torch

from ernie_accel.common.language import listed, said
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.library_hooks import library_hooks


class Pipeline(Protocol):
    """What the library asks of a pipeline: a ``diffusers.DiffusionPipeline``, or any object with these.

    It does not import diffusers. Which components a pipeline has is known only once it is loaded; each is an attribute
    under its own name ("transformer", "vae"), so no class declares them. `PipelineT` stands for one class of pipeline:
    what goes in comes out.
    """

    @property
    def components(self) -> Mapping[str, Any]:
        """Its parts by name: models, tokenizers, the scheduler; None where one was left out."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings it was made with, by name."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast all of its models, in place."""

    def __getattr__(self, name: str, /) -> Any:
        """Return a component, or anything else that the pipeline's class has, by name."""


class CallablePipeline(Pipeline, Protocol):
    """A pipeline of a class that draws; ``DiffusionPipeline`` itself, from which those derive, cannot be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw pictures."""


class Tokenizer(Protocol):
    """What the library asks of a tokenizer from transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    model_max_length: int

    def __call__(self, text: str, **settings: object) -> Mapping[str, Any]:
        """Return the tokens of a text ("input_ids") and what belongs to them."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **settings: object) -> str:
        """Return a chat as one text."""


class Loadable(Protocol):
    """What a type checker sees of ``diffusers.DiffusionPipeline`` and the like.

    ``diffusers/__init__.py`` imports each class as itself, or as a placeholder that only says torch is missing; type
    checkers see the placeholder, which has this method and nothing else of a pipeline.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a pipeline."""


#: A pipeline as the public functions accept it.
AnyPipeline: TypeAlias = Pipeline | Loadable
PipelineT = TypeVar("PipelineT", bound=AnyPipeline)

#: Components that only work before the denoising starts.
PROMPT_COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "pe")

#: What predicts noise or velocity at every step, by component name; a pipe has one, or a few that take turns.
DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")

#: What ``enable_group_offload`` attaches to modules (diffusers/hooks/group_offloading.py).
GROUP_OFFLOAD_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading", "lazy_leafs")


def is_device_name(device: object) -> bool:
    """Return whether `device` is written as torch writes one: "cuda", "npu:1"."""
    return isinstance(device, str) and re.fullmatch(r"[a-z]+(:\d+)?", device) is not None


def is_float8(dtype: torch.dtype) -> bool:
    """Return whether `dtype` is one of torch's one-byte floating-point types."""
    return dtype.is_floating_point and dtype.itemsize == 1


def modules_of(pipe: Pipeline, names: Iterable[str] | None = None) -> dict[str, torch.nn.Module]:
    """Return the pipe's torch modules by component name, in the pipe's own order.

    Args:
        pipe: The pipeline.
        names: Only these components; default all of them.

    Raises:
        UnknownNameError: A name is not a module of this pipe.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if names is None:
        return modules
    for name in names:
        if name not in modules:
            raise UnknownNameError("component", name, modules)
    return {name: modules[name] for name in names}


def denoisers_of(pipe: Pipeline) -> dict[str, torch.nn.Module]:
    """Return the modules that work at every denoising step by component name: UNet, transformer or several of them."""
    modules = modules_of(pipe)
    return {name: modules[name] for name in DENOISERS if name in modules}


def staying_denoisers_note(pipe: Pipeline, components: Iterable[str]) -> str:
    """Return which denoisers of the pipe are not among `components`, for the note of a plan; "" if all are."""
    components = tuple(components)
    left = [name for name in denoisers_of(pipe) if name not in components]
    if not left or not set(components) & set(DENOISERS):
        return ""
    template = "{names} stays as it is (components={components!r} takes it, too)"
    return said(template, names=listed(left), components=(*components, *left))


def other_denoisers_note(pipe: Pipeline) -> str:
    """Return that denoisers beside "transformer" stay as they are, for the note of a plan; "" where there are none."""
    return _beside_transformer(pipe, said("stays as it is: a family's own blocks are those of its transformer"))


def uncached_denoisers_note(pipe: Pipeline) -> str:
    """Return that denoisers beside "transformer" compute all of their steps, for the note of a plan."""
    return _beside_transformer(pipe, said("computes all of its steps: those of the transformer alone are cached"))


def _beside_transformer(pipe: Pipeline, says: str) -> str:
    left = [name for name in denoisers_of(pipe) if name != "transformer"]
    return said("{name} {reason}", name=listed(left), reason=says) if left else ""


def emptied_components(pipe: Pipeline, names: Iterable[str] | None) -> list[str]:
    """Return which of these components (None: of all) have no weights at the moment, because they were freed."""
    modules = modules_of(pipe)
    return [name for name in (modules if names is None else names) if name in modules and _is_emptied(modules[name])]


def _is_emptied(module: torch.nn.Module) -> bool:
    """Return whether a module has parameters, and none of them an element."""
    emptied = False
    for weight in module.parameters():
        if weight.numel():
            return False
        emptied = True
    return emptied


#: What ``torch.compile(module)`` calls the module that it wraps.
_INSIDE = "_orig_mod"


def is_compiled_wrapper(module: object) -> bool:
    """Return whether a module is what ``torch.compile(module)`` returned around another."""
    # Recognised by what it holds, not by its class, which takes a second to import.
    return isinstance(module, torch.nn.Module) and _INSIDE in module._modules


def inside_of(module: torch.nn.Module) -> torch.nn.Module:
    """Return what ``torch.compile(...)`` wrapped, if a module is its wrapper; else the module itself."""
    while is_compiled_wrapper(module):
        module = module.get_submodule(_INSIDE)
    return module


def absent_components(pipe: Pipeline, names: Iterable[str] | None) -> list[str]:
    """Return one reason for each of `names` that is no module of this pipe (for ``Transform.unsupported``)."""
    modules = modules_of(pipe)
    denoisers = tuple(denoisers_of(pipe))
    is_other = denoisers and "transformer" not in denoisers
    hint = said(": write components={denoisers!r}", denoisers=denoisers) if is_other else ""
    return [
        said(
            "{pipe} has no component {name!r}; its modules are {modules}{hint}",
            pipe=type(pipe).__name__,
            name=name,
            modules=", ".join(modules),
            hint=hint if name == "transformer" else "",
        )
        for name in names or ()
        if name not in modules
    ]


#: Attribute of the modules of a pipe that was made without weights.
_SKELETON = "_ernie_accel_skeleton"


def mark_as_skeleton(pipe: AnyPipeline) -> None:
    """Mark a pipe as one without weights (they are on the meta device), in place: it is for plans only."""
    for module in modules_of(cast(Pipeline, pipe)).values():
        for part in module.modules():
            setattr(part, _SKELETON, True)


def is_skeleton(owner: object) -> bool:
    """Return whether a module, or a pipe, was made without weights."""
    if isinstance(owner, torch.nn.Module):
        return vars(owner).get(_SKELETON, False) is True
    return any(map(is_skeleton, modules_of(cast(Pipeline, owner)).values()))


class Weight(NamedTuple):
    """The place of a parameter or buffer.

    Attributes:
        path: Path within the component, without what ``torch.compile`` wrapped around its modules.
        owner: The module that holds it.
        name: Its name there.
    """

    path: str
    owner: torch.nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now. ``module.to`` keeps parameter objects and replaces buffer objects."""
        held: torch.Tensor = getattr(self.owner, self.name)
        return held


def weights_of(module: torch.nn.Module, *, all_buffers: bool = False) -> Iterator[Weight]:
    """Yield the parameters and buffers of `module`, each tensor once.

    Args:
        module: A component.
        all_buffers: Also buffers that no checkpoint holds (the float32 RoPE frequencies of text encoders).
            ``from_pretrained`` does not load them, so a cast must not touch them.
    """
    seen: set[int] = set()
    for path, owner in _walked(module):
        held: list[tuple[str, torch.Tensor]] = [
            (name, tensor) for name, tensor in owner._parameters.items() if tensor is not None
        ]
        held += [
            (name, buffer)
            for name, buffer in owner._buffers.items()
            if buffer is not None and (all_buffers or name not in owner._non_persistent_buffers_set)
        ]
        if held and _INSIDE in path:
            path = ".".join(part for part in path.split(".") if part != _INSIDE)
        for name, tensor in held:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield Weight(f"{path}.{name}" if path else name, owner, name)


def _walked(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield what ``named_modules`` does, which is far slower: it has a generator at work for every level."""
    seen: set[int] = set()
    left = [("", module)]
    while left:
        path, each = left.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield path, each
            left += [
                (f"{path}.{name}" if path else name, child)
                for name, child in reversed(each._modules.items())
                if child is not None
            ]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes `tensor` really occupies, looking inside quantized tensor subclasses."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in inner)
    return tensor.numel() * tensor.element_size()


#: Width of a vector load: products of one row round differently if the weights start at another offset from a multiple.
_LINE_BYTES = 64


def alignment_of(tensor: torch.Tensor) -> int:
    """Return how many bytes after a multiple of 64 a tensor on the CPU begins; 0 on other devices, which align all."""
    return tensor.data_ptr() % _LINE_BYTES if tensor.device.type == "cpu" else 0


def with_alignment(values: torch.Tensor, alignment: int) -> torch.Tensor:
    """Return `values`, copied if need be, so that `alignment_of` it is `alignment`; dense, with the same strides.

    Files of weights are mapped into memory at any multiple of 8 bytes, and some kernels round accordingly: weights that
    are put back at another offset give slightly different pictures.
    """
    if values.device.type != "cpu" or alignment_of(values) == alignment or alignment % values.element_size():
        return values
    room = torch.empty(values.numel() * values.element_size() + 2 * _LINE_BYTES, dtype=torch.uint8)
    start = (alignment - room.data_ptr()) % _LINE_BYTES
    flat = room[start : start + values.numel() * values.element_size()].view(values.dtype)
    return flat.as_strided(values.size(), torch.empty_like(values, device="meta").stride()).copy_(values)


def module_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers of `module`."""
    return sum(map(tensor_bytes, [*module.parameters(), *module.buffers()]))


def pipe_bytes(pipe: Pipeline) -> int:
    """Return the bytes of all weights of all components."""
    return sum(map(module_bytes, modules_of(pipe).values()))


def device_of(pipe: Pipeline) -> torch.device:
    """Return the device the pipe executes on (the accelerator also while its weights are offloaded)."""
    for attribute in ("_execution_device", "device"):
        device = getattr(pipe, attribute, None)
        if isinstance(device, torch.device):
            return device
    return next((p.device for m in modules_of(pipe).values() for p in m.parameters()), torch.device("cpu"))


def quantizing_device(module: torch.nn.Module, device: str) -> torch.device:
    """Return where the weights of a module are to be quantized: on the accelerator, even while they wait on the host.

    Args:
        module: A component.
        device: torch device type that the pipe will run on.
    """
    here = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    if here.type == "cpu" and device == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return here


def bare_float8(pipe: Pipeline) -> list[str]:
    """Return the components whose weights were cast to float8 without scales, as ``torch_dtype=float8`` does.

    Diffusers' layerwise casting stores float8 too, but upcasts in a hook; such modules run and are not named.
    """
    return [name for name, module in modules_of(pipe).items() if _is_bare_float8(module)]


def _is_bare_float8(module: torch.nn.Module) -> bool:
    return any(
        type(parameter) is torch.nn.Parameter and is_float8(parameter.dtype) and not _has_casting_hook(part)
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
    )


def is_moved_in_parts(model: torch.nn.Module) -> bool:
    """Return whether accelerate or diffusers move or cast parts of this model when those are called."""
    return any(library_hooks(part) for part in model.modules() if part is not model)


def components_offloaded_by_accelerate(pipe: Pipeline) -> list[str]:
    """Return the names of the components that ``enable_model_cpu_offload`` or a script moves by accelerate's hooks."""
    return [name for name, module in modules_of(pipe).items() if library_hooks(module).accelerate is not None]


def forget_kept(model: torch.nn.Module) -> None:
    """Let the stand-ins for forwards within `model` free the memory that they keep between calls."""
    for part in model.modules():
        forget = getattr(vars(part).get("forward"), "forget", None)
        if forget is not None:
            forget()


def upcasts_in_a_hook(module: torch.nn.Module) -> bool:
    """Return whether a part of `module` stores its weights by diffusers' layerwise casting."""
    return any(map(_has_casting_hook, module.modules()))


def _has_casting_hook(part: torch.nn.Module) -> bool:
    return bool(library_hooks(part).named("layerwise_casting"))
