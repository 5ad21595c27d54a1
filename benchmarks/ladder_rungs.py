"""The rungs of the ladder: one technique more on each, measured as a model and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from unittest import mock

import torch
from ladder_measures import (
    CUDA,
    STEPS,
    TEXT_TOKENS,
    Job,
    inputs_for,
    kernel_times,
    milliseconds,
    peak_gb,
    reset_peak,
    seconds,
    sqnr_db,
    weight_gb,
)
from random_pipeline import prompt_of

#: (stock pipe, folder for compiled code) -> None; changes the pipe in place.
Change: TypeAlias = Callable[[Any, str], None]


def leave(pipe: Any, cache: str) -> None:
    """Leave diffusers as it is."""


def compile_stock(pipe: Any, cache: str) -> None:
    """Compile as diffusers' documentation advises."""
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)


def optimized(transforms: Callable[[Any, str], list[Any]], preset: str | None = None) -> Change:
    """Return a change by the transforms that `transforms` makes, given package and folder, beside those of a preset."""

    def change(pipe: Any, cache: str) -> None:
        import ernie_accel

        ernie_accel.optimize(pipe, *transforms(ernie_accel, cache), preset=preset)

    return change


#: Tokens of prompts that are drawn once each: whatever is compiled, planned or captured for a length counts.
OTHER_LENGTHS = (120, 77, 101, 40, 63, 90, 33, 112)

#: Rung -> (what it is, how a stock pipe becomes it).
RUNGS: dict[str, tuple[str, Change]] = {
    "stock": ("diffusers as it is, bf16", leave),
    "stock+compile": ("+ compile_repeated_blocks", compile_stock),
    "rewrite": ("RewriteBlocks", optimized(lambda a, _: [a.RewriteBlocks()])),
    "rewrite+compile": ("RewriteBlocks + Compile", optimized(lambda a, _: [a.RewriteBlocks(), a.Compile()])),
    "rewrite+compile cache": (
        "the same with Compile(cache=folder), and no other cache of compiled code",
        optimized(lambda a, cache: [a.RewriteBlocks(), a.Compile(cache=cache)]),
    ),
    "turbo-bf16": ("+ fused kernels in its place: the preset", optimized(lambda a, _: [], "turbo-bf16")),
    "torchao-fp8+compile": (
        "peer: torchao fp8 per row + regional compile",
        optimized(lambda a, _: [a.Quantize("fp8", keep_originals=False), a.Compile()]),
    ),
    "rewrite+torchao-fp8+compile": (
        "RewriteBlocks + torchao fp8 + Compile",
        optimized(lambda a, _: [a.RewriteBlocks(), a.Quantize("fp8", keep_originals=False), a.Compile()]),
    ),
    "turbo-fp8 bf16-attention": (
        "+ fused fp8 kernels in its place",
        optimized(lambda a, _: [a.FuseKernels("fp8", attention="bf16", keep_originals=False)], "turbo-fp8"),
    ),
    "turbo-fp8": (
        "+ fp8 attention, with ernie-accel[cudnn]: the preset",
        optimized(lambda a, _: [a.FuseKernels("fp8", keep_originals=False)], "turbo-fp8"),
    ),
    "turbo-fp8 CompileVae": (
        "the same with CompileVae in FuseVae's place",
        optimized(lambda a, _: [a.FuseKernels("fp8", keep_originals=False), a.CompileVae()], "turbo-fp8"),
    ),
}


@torch.no_grad()
def measure_rung(rung: str, job: Job) -> dict[str, Any]:
    """Measure one rung in this process."""
    pipe = job.pipeline()
    what, change = RUNGS[rung]
    row: dict[str, Any] = {"what": what, "optimize_s": seconds(lambda: change(pipe, str(job.cache)))}
    row["weight_gb"] = weight_gb(pipe.transformer)
    main = job.pixels[0]
    for px in job.pixels:
        arguments = inputs_for(pipe, px)
        outputs: list[torch.Tensor] = []
        first = seconds(lambda a=arguments, o=outputs: o.append(pipe.transformer(**a)[0]))
        if px == main:
            row["first_call_s"] = first
            row["sqnr_db"] = sqnr_db(outputs[0], torch.load(job.reference)["prediction"])
        for _ in range(3):
            pipe.transformer(**arguments)
        reset_peak()
        row[f"ms_{px}"] = milliseconds(lambda a=arguments: pipe.transformer(**a), 30 if px == main else 20)
        if px == main:
            row["peak_gb"] = peak_gb()

    def picture(tokens: int = TEXT_TOKENS) -> None:
        pipe(
            prompt_of(tokens), height=main, width=main, num_inference_steps=STEPS, guidance_scale=1.0,
            generator=torch.Generator(job.device).manual_seed(0), output_type="pt",
        )  # fmt: skip

    with _timed(pipe.vae, "decode") as decoding_s:
        row["first_picture_s"] = row["optimize_s"] + row["first_call_s"] + seconds(picture)
    row["first_decode_s"] = sum(decoding_s)
    row["picture_ms"] = statistics.median(seconds(picture) for _ in range(3)) * 1e3
    row["other_lengths_ms"] = statistics.mean(seconds(lambda n=n: picture(n)) for n in OTHER_LENGTHS) * 1e3
    if job.profile and CUDA:
        row["kernels"] = kernel_times(lambda: pipe.transformer(**inputs_for(pipe, main)))
    return row


@contextmanager
def _timed(owner: Any, method: str) -> Iterator[list[float]]:
    """Yield a list that gets the seconds of each call of a method, device included."""
    taken: list[float] = []
    plain = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        result: list[Any] = []
        taken.append(seconds(lambda: result.append(plain(*args, **kwargs))))
        return result[0]

    with mock.patch.object(owner, method, timed):
        yield taken
