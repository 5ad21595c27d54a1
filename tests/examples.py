"""One or more examples of every transform, and what the contract tests look at on a pipe."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ernie_accel import (
    Autocast,
    BatchPromptEncoding,
    CacheSteps,
    CallDefaults,
    CaptureGraphs,
    CastDtype,
    CheckFinite,
    Compile,
    CompileVae,
    ElideMask,
    ExpandAttentionMask,
    FreeAfterUse,
    FuseKernels,
    FuseVae,
    KeepTimestepsOnHost,
    MakeContiguous,
    MoveTo,
    Offload,
    Quantize,
    RewriteBlocks,
    RewriteEnhancer,
    RewriteTextEncoder,
    SetAttention,
    SliceVae,
    SwapScheduler,
    TileVae,
    Transform,
    TruncatePrompts,
    Warmup,
)

EXAMPLES: tuple[Transform, ...] = (
    Autocast("bfloat16"),
    BatchPromptEncoding(cache=4),
    CacheSteps(),
    CacheSteps(backend="cache-dit"),
    CacheSteps(backend="diffusers", threshold=0.02),
    CallDefaults(num_inference_steps=3),
    CallDefaults("turbo", guidance_scale=2.0),
    CastDtype("bfloat16"),
    CastDtype("float16", components=("transformer",)),
    CheckFinite(),
    Compile(),
    CompileVae(),
    ElideMask(),
    ExpandAttentionMask(),
    FreeAfterUse(),
    MakeContiguous(),
    MakeContiguous(channels_last=("vae",)),
    Quantize("int8-weight-only"),
    RewriteBlocks(),
    RewriteEnhancer(max_new_tokens=8),
    RewriteTextEncoder(keep=2),
    SetAttention("math"),
    SliceVae(),
    SwapScheduler("euler_ancestral"),
    SwapScheduler("euler", shift=5.0),
    SwapScheduler("unipc"),
    SwapScheduler("heun", karras=True),
    SwapScheduler("dpmpp_sde", timestep_spacing="trailing"),
    SwapScheduler("lcm"),
    TileVae(tile_px=32),
    TruncatePrompts(8, keep="tail"),
)

#: Transforms that have nothing to do to a plain pipe on the CPU, or need an accelerator; tests/gpu runs the latter.
ELSEWHERE: tuple[Transform, ...] = (
    CaptureGraphs(),
    FuseKernels("fp8"),
    FuseVae(),
    KeepTimestepsOnHost(),
    MoveTo("cuda"),
    Offload("model"),
    Offload("group", blocks_per_group=2),
    Offload("stages"),
    Warmup(sizes=((64, 64), (96, 64)), batch_sizes=(1, 2), prompt_lengths=(4,)),
)


def make_awkward(pipe: Any) -> None:
    """Give the pipe a transposed weight and one that starts off a 16-byte boundary, as mapped files have them."""
    first, second = (p for p in list(pipe.transformer.parameters())[:40:20])
    first.data = first.data.transpose(0, -1).contiguous().transpose(0, -1)
    memory = torch.empty(second.numel() + 1)
    memory[1:] = second.data.flatten()
    second.data = memory[1:].view(second.shape)


def snapshot(pipe: Any) -> dict[str, Any]:
    """Return all that a transform could change: classes, tensors, strides, settings, call defaults."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    tensors = {
        f"{component}.{name}": (id(tensor), tensor.dtype, tensor.stride(), tensor.device, tensor.detach().clone())
        for component, module in modules.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    return {
        "class": type(pipe),
        "instance": sorted(vars(pipe)),
        "signature": str(inspect.signature(pipe.__call__)),
        "components": {name: id(part) for name, part in pipe.components.items()},
        "config": str(dict(pipe.config)),
        "methods": {name: id(value) for name, value in vars(pipe).items() if inspect.isfunction(value)},
        "scheduler": str(dict(pipe.scheduler.config)),
        "modules": {
            f"{component}.{name}": (id(part), type(part), part._compiled_call_impl, _plain(part), _behaviour(part))
            for component, module in modules.items()
            for name, part in module.named_modules()
        },
        "tensors": tensors,
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs between two snapshots, in words; tensors must agree bit for bit."""
    found = [key for key in before if key != "tensors" and before[key] != after[key]]
    for name in before["tensors"].keys() | after["tensors"].keys():
        old, new = before["tensors"].get(name), after["tensors"].get(name)
        if old is None or new is None or old[:4] != new[:4] or not torch.equal(_values(old[4]), _values(new[4])):
            found.append(name)
    return found


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if hasattr(tensor, "__tensor_flatten__") else tensor


def _plain(module: torch.nn.Module) -> str:
    """Return the module's simple attributes, where switches such as `use_tiling` live."""
    simple = (bool, int, float, str, type(None))
    return str({k: v for k, v in vars(module).items() if isinstance(v, simple) and k != "_compiled_call_impl"})


def _behaviour(module: torch.nn.Module) -> tuple[Any, ...]:
    """Return what changes what a module does and is no tensor: hooks, a forward of its own, its processor."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    processor = getattr(module, "processor", None)
    return (
        *map(id, hooks),
        vars(module).get("forward"),
        type(processor),
        str(getattr(processor, "_attention_backend", None)),
    )
