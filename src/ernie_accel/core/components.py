"""What a pipeline is made of: its modules, their tensors, dtypes and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch

from ernie_accel.core.errors import UnknownNameError

#: A ``diffusers.DiffusionPipeline``; not imported here, because any object with its attributes will do.
Pipeline: TypeAlias = Any

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


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


def absent_components(pipe: Pipeline, names: Iterable[str] | None) -> list[str]:
    """Return one reason for each of `names` that is no module of this pipe (for ``Transform.unsupported``)."""
    modules = modules_of(pipe)
    return [
        f"{type(pipe).__name__} has no component {name!r}; its modules are {', '.join(modules)}"
        for name in names or ()
        if name not in modules
    ]


def weights_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and persistent buffers of `module`, that is, what a checkpoint holds, each once.

    Non-persistent buffers (the float32 RoPE frequencies of text encoders) are left out: ``from_pretrained`` does not
    load them, so a cast must not touch them.
    """
    yield from module.named_parameters()
    seen: set[int] = set()
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{path}.{name}" if path else name, buffer


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes `tensor` really occupies, looking inside quantized tensor subclasses."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in inner)
    return tensor.numel() * tensor.element_size()


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


def bare_float8(pipe: Pipeline) -> list[str]:
    """Return the components whose weights were cast to float8 without scales, as ``torch_dtype=float8`` does.

    Diffusers' layerwise casting stores float8 too, but upcasts in a hook; such modules run and are not named.
    """
    return [name for name, module in modules_of(pipe).items() if _is_bare_float8(module)]


def _is_bare_float8(module: torch.nn.Module) -> bool:
    return any(
        type(parameter) is torch.nn.Parameter and parameter.dtype in FLOAT8_DTYPES and not _upcasts_in_a_hook(part)
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
    )


def _upcasts_in_a_hook(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("layerwise_casting") is not None
