"""One or more examples of every transform, and what the contract tests look at on a pipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ernie_accel import (
    Autocast,
    BatchGuidance,
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
    ExplainOutOfMemory,
    FewSteps,
    FreeAfterUse,
    FuseKernels,
    FuseVae,
    KeepTimestepsOnHost,
    MakeContiguous,
    MoveTo,
    Offload,
    Quantize,
    Residency,
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
from ernie_accel.testing import differences, snapshot

__all__ = ["ELSEWHERE", "EXAMPLES", "differences", "make_awkward", "snapshot"]

#: Of two layers of `tiny_ernie`, rank 1.
TINY_LORA = Path(__file__).parent / "data" / "tiny_lora.safetensors"

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
    ExplainOutOfMemory(predicted=10**9),
    FewSteps(str(TINY_LORA), steps=2),
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
    BatchGuidance(),
    CaptureGraphs(),
    FuseKernels("fp8"),
    FuseVae(),
    KeepTimestepsOnHost(),
    MoveTo("cuda"),
    Offload("model"),
    Offload("group", blocks_per_group=2),
    Offload("stages"),
    Residency(10**9),
    Warmup(sizes=((64, 64), (96, 64)), batch_sizes=(1, 2), prompt_lengths=(4,)),
)


def make_awkward(pipe: Any) -> None:
    """Give the pipe a transposed weight and one that starts off a 16-byte boundary, as mapped files have them."""
    first, second = (p for p in list(pipe.transformer.parameters())[:40:20])
    first.data = first.data.transpose(0, -1).contiguous().transpose(0, -1)
    memory = torch.empty(second.numel() + 1)
    memory[1:] = second.data.flatten()
    second.data = memory[1:].view(second.shape)
