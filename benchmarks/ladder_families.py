"""Z-Image and NewBie-image at full size with random weights: stock, what others advise, and the presets, in one run.

A step is one of a picture's, as the pipeline makes it: of NewBie-image with guidance, two predictions. Prompts are
given encoded, and latents are not decoded, so all times are the denoiser's.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ladder_measures import Job, kernel_times, peak_gb, reset_peak, seconds, sqnr_db, sync, weight_gb
from ladder_rungs import Change, compile_stock, leave, optimized
from random_pipeline import random_family_pipeline

#: Tokens of the prompt that is drawn over and over, and of others that are drawn once each.
TOKENS, OTHER_TOKENS = 128, (120, 77, 101, 40, 33)
PIXELS = {"full": (1024, 512), "tiny": (64, 32)}


@dataclass(frozen=True)
class Target:
    """What a rung must reach: `factor` times a column of another rung, in the same run.

    Attributes:
        rung: The rung.
        column: Of its row.
        factor: At most.
        of: The rung it is compared with, or itself.
        base: The column of that one; default the same.
    """

    rung: str
    column: str
    factor: float
    of: str
    base: str = ""


@dataclass(frozen=True)
class Measured:
    """A family as it is measured.

    Attributes:
        steps: Steps of a picture.
        guidance: Guidance scale.
        rungs: Rung -> (what it is, how a stock pipe becomes it).
        targets: What they must reach.
    """

    steps: int
    guidance: float
    rungs: dict[str, tuple[str, Change]]
    targets: tuple[Target, ...]


_FP8 = optimized(lambda a, _: [a.Quantize("fp8", keep_originals=False), a.Compile()])
_COMPILED = optimized(lambda a, _: [a.Compile()])
_TWO_CALLS = optimized(lambda a, _: [each for each in a.presets["quality-fp8"].transforms if each.slot != "guidance"])
_ONLY_FP8 = partial(optimized, lambda a, _: [a.FuseKernels("fp8", keep_originals=False)])
_LAUNCHED = partial(
    optimized, lambda a, _: [a.FuseKernels("fp8", keep_originals=False), a.CaptureGraphs(max_tokens=2048)]
)
_REWRITTEN = (
    "RewriteBlocks + Compile",
    optimized(lambda a, _: [a.RewriteBlocks(), a.Compile()]),
)

MEASURED = {
    "z-image": Measured(
        9,
        0.0,
        {
            "stock": ("diffusers as it is, bf16", leave),
            "stock+compile": ("+ compile_repeated_blocks", compile_stock),
            "torchao-fp8+compile": ("peer: torchao fp8 per row + regional compile", _FP8),
            "turbo-bf16": ("the preset", optimized(lambda a, _: [], "turbo-bf16")),
            "turbo-fp8": ("the preset", _ONLY_FP8("turbo-fp8")),
            "turbo-fp8-launched": ("the preset without a graph at 1024 px", _LAUNCHED("turbo-fp8")),
            "rewrite+compile": _REWRITTEN,
        },
        (
            Target("turbo-bf16", "ms_1024", 0.94, "stock+compile"),
            Target("turbo-fp8", "ms_1024", 0.78, "torchao-fp8+compile"),
            Target("turbo-bf16", "new_length_ms", 1.15, "turbo-bf16", "picture_ms"),
            Target("turbo-fp8", "new_length_ms", 1.15, "turbo-fp8", "picture_ms"),
            Target("turbo-fp8", "ms_512", 0.60, "stock+compile"),
        ),
    ),
    "newbie": Measured(
        9,
        4.0,
        {
            "stock": ("diffusers as it is, bf16", leave),
            "compiled-bf16": ("stock blocks compiled, which was quality-bf16", _COMPILED),
            "compiled-fp8": ("torchao fp8 + stock blocks compiled, which was quality-fp8", _FP8),
            "quality-bf16": ("the preset", optimized(lambda a, _: [], "quality-bf16")),
            "quality-fp8": ("the preset", _ONLY_FP8("quality-fp8")),
            "quality-fp8-launched": ("the preset without a graph at 1024 px", _LAUNCHED("quality-fp8")),
            "quality-fp8-two-calls": ("the preset without BatchGuidance", _TWO_CALLS),
            "rewrite+compile": _REWRITTEN,
        },
        (
            Target("quality-bf16", "ms_1024", 0.53, "stock"),
            Target("quality-bf16", "ms_1024", 0.92, "compiled-bf16"),
            Target("quality-fp8", "ms_1024", 0.62, "compiled-fp8"),
            Target("quality-bf16", "new_length_ms", 1.15, "quality-bf16", "picture_ms"),
            Target("quality-fp8", "new_length_ms", 1.15, "quality-fp8", "picture_ms"),
            Target("quality-fp8", "ms_512", 0.40, "stock"),
        ),
    ),
}


def draws(family: str, pipe: Any, px: int, tokens: int) -> Callable[[], object]:
    """Return what draws the latents of a picture of `px` x `px` pixels for an encoded prompt of so many tokens."""
    how, transformer = MEASURED[family], pipe.transformer
    width, device = transformer.config.cap_feat_dim, next(transformer.parameters()).device
    encoded = [_rand(1, tokens, width, seed=tokens), _rand(1, 8, width, seed=3)]
    call: dict[str, Any] = {"height": px, "width": px, "num_inference_steps": how.steps, "output_type": "latent"}
    call["guidance_scale"] = how.guidance
    if family == "z-image":
        call["prompt_embeds"] = [encoded[0][0].to(device)]
    else:  # the pipeline pads prompts to this length
        for name, text in zip(("", "negative_"), encoded, strict=True):
            padded = torch.nn.functional.pad(text, (0, 0, 0, 256 - text.shape[1]))
            mask = (torch.arange(256) < text.shape[1])[None].long()
            call |= {f"{name}prompt_embeds": padded.to(device), f"{name}prompt_attention_mask": mask.to(device)}
    noise = torch.randn(1, transformer.config.in_channels, px // 8, px // 8, generator=_generator(7)).to(device)
    call["latents"] = noise if family == "z-image" else noise.bfloat16()
    return partial(pipe, **call)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed)).bfloat16()


def predict(family: str, pipe: Any, px: int) -> torch.Tensor:
    """Return one prediction of the transformer, from the same inputs in every process."""
    transformer = pipe.transformer
    weight = next(transformer.parameters())
    channels, width = transformer.config.in_channels, transformer.config.cap_feat_dim
    dtype = torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
    noise = _rand(1, channels, px // 8, px // 8, seed=7).to(weight.device, dtype)
    text, time = _rand(1, TOKENS, width, seed=5).to(weight.device, dtype), torch.full((1,), 0.3, device=weight.device)
    if family == "z-image":
        out: Any = transformer([noise[0].unsqueeze(1)], time.to(dtype), [text[0]], return_dict=False)[0][0].squeeze(1)
    else:
        mask = torch.ones(1, TOKENS, dtype=torch.long, device=weight.device)
        out = transformer(noise, time.to(dtype), text, mask, return_dict=False)[0][0]
    found: torch.Tensor = out
    return found


@torch.no_grad()
def make_family_reference(family: str, job: Job) -> dict[str, float]:
    """Save what float32 gives with the very weights that the rungs have."""
    pipe = random_family_pipeline(family, job.size, job.device, torch.bfloat16)
    pipe.transformer.float()
    torch.save({"prediction": predict(family, pipe, PIXELS[job.size][0]).cpu()}, job.reference)
    return {}


@torch.no_grad()
def measure_family(family: str, rung: str, job: Job) -> dict[str, Any]:
    """Measure one rung of a family in this process."""
    how, pixels = MEASURED[family], PIXELS[job.size]
    pipe = random_family_pipeline(family, job.size, job.device, torch.bfloat16)
    what, change = how.rungs[rung]
    row: dict[str, Any] = {"what": what, "optimize_s": seconds(lambda: change(pipe, str(job.cache)))}
    row["weight_gb"] = weight_gb(pipe.transformer)
    for px, name in zip(pixels, ("1024", "512"), strict=True):
        picture = draws(family, pipe, px, TOKENS)
        first = seconds(picture)
        if px == pixels[0]:
            row["first_picture_s"] = row["optimize_s"] + first
            reset_peak()
        seconds(picture)
        times = _back_to_back(picture, 4 if px == pixels[0] else 5)
        row[f"ms_{name}"] = statistics.median(times) * 1e3 / how.steps
        if px == pixels[0]:
            row["peak_gb"], row["picture_ms"] = peak_gb(), statistics.median(times) * 1e3
            others = [seconds(draws(family, pipe, px, tokens)) for tokens in OTHER_TOKENS]
            row["new_lengths_ms"] = [round(other * 1e3, 1) for other in others]
            row["new_length_ms"] = statistics.mean(others) * 1e3
            row["sqnr_db"] = sqnr_db(predict(family, pipe, px), torch.load(job.reference)["prediction"])
    if job.profile and torch.cuda.is_available():
        row["kernels"] = kernel_times(draws(family, pipe, pixels[0], TOKENS))
    return row


def _back_to_back(picture: Callable[[], object], count: int) -> list[float]:
    """Return the seconds of each of `count` pictures that follow each other without a pause."""
    if not torch.cuda.is_available():
        return [seconds(picture) for _ in range(count)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        picture()
        mark.record()
    sync()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def verdicts(family: str, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each target with what was reached, for the rungs that were measured."""
    found = []
    for target in MEASURED[family].targets:
        row, base = rows.get(target.rung, {}), rows.get(target.of, {})
        value, other = row.get(target.column), base.get(target.base or target.column)
        if value and other:
            found.append(
                {
                    "rung": target.rung,
                    "column": target.column,
                    "of": target.of,
                    "base": target.base or target.column,
                    "reached": value / other,
                    "target": target.factor,
                }
            )
    return found
