"""Draw with the full-size pipeline, enhancer included, on a card whose memory is capped, and compare with stock."""

from __future__ import annotations

import gc
import statistics
import time
import zlib
from typing import Any

import torch
from ladder_measures import CUDA, STEPS, Job, sync
from ladder_parts import add_enhancer
from random_pipeline import prompt_of, random_pipeline

GIB = 2**30
#: What a process cannot have of a card: the driver's share, and the desktop's.
TAKEN_GIB = 0.7
#: Name -> memory of the card in GiB, preset; None: all there is, and diffusers as it is.
FITTED: dict[str, tuple[float | None, str | None]] = {
    "stock": (None, None),
    "24 GB fp8": (24, "turbo-fp8"),
    "16 GB fp8": (16, "turbo-fp8"),
    "12 GB fp8": (12, "turbo-fp8"),
    "8 GB fp8": (8, "turbo-fp8"),
}
NEW_TOKENS, PROMPT_TOKENS = 256, 128
#: (width, height, tokens, pictures) that are drawn once each under the cap.
OTHERS = ((848, 1264, 40, 1), (1264, 848, 200, 1), (512, 512, 77, 2), (1024, 1024, 300, 1))


def fit_rung(name: str, job: Job) -> dict[str, Any]:
    """Measure one rung: seconds a picture with and without enhancer, memory against the prediction, bits."""
    gib, preset = FITTED[name]
    pipe = _pipeline(job)
    facts: dict[str, Any] = {"cap_gib": gib}
    if preset is not None and gib is not None:
        facts |= _place(pipe, preset, gib, job)
    pixels = job.pixels[0]
    sync()
    start = time.perf_counter()
    _draw(pipe, pixels, enhance=False)
    sync()
    facts["first_s"] = time.perf_counter() - start
    _draw(pipe, pixels, enhance=False)
    _reset()
    facts["off_s"], off = _timed(pipe, pixels, enhance=False)
    _draw(pipe, pixels, enhance=True)
    facts["on_s"], on = _timed(pipe, pixels, enhance=True, repeats=1 if preset is None else 3)
    facts |= _memory()
    if preset is not None:
        facts |= _compare(job, str([each for each in facts["chosen"] if "Quantize" in each]), off, on)
        for i, (width, height, tokens, pictures) in enumerate(OTHERS if CUDA else ()):
            _draw(pipe, width, height=height, tokens=tokens, pictures=pictures, steps=3, seed=i, enhance=False)
        facts["peak_of_other_sizes_gib"] = _memory()["peak_gib"]
    return facts


def _pipeline(job: Job) -> Any:
    pipe = random_pipeline(job.size, job.device, torch.bfloat16)
    add_enhancer(pipe, job.size)
    pipe.pe_tokenizer.model_max_length = NEW_TOKENS
    pipe.pe_tokenizer.eos_token = None
    pipe.pe.generation_config.eos_token_id = None
    return pipe


def _place(pipe: Any, preset: str, gib: float, job: Job) -> dict[str, Any]:
    """Bring the pipe from the host to a card of so much memory, as a user of one would."""
    import ernie_accel

    pipe.to("cpu")
    gc.collect()
    usable = int((gib - TAKEN_GIB) * GIB)
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(usable / torch.cuda.get_device_properties(0).total_memory)
    else:  # the tiny pipeline of the tests, which no cap could hold back
        ernie_accel.optimize(pipe, preset="turbo-fp32", on_unsupported="skip")
        return {"chosen": [], "predicted_peak_gib": None, "placed_s": 0.0}
    enhancer = ernie_accel.RewriteEnhancer(max_new_tokens=NEW_TOKENS)
    memory_plan = ernie_accel.plan(pipe, enhancer, preset=preset, memory=usable).memory
    start = time.perf_counter()
    ernie_accel.optimize(pipe, enhancer, preset=preset, memory=usable)
    sync()
    seconds = time.perf_counter() - start
    entries = ernie_accel.report(pipe).entries
    ernie_accel.optimize(pipe, enhancer, preset=preset, memory=usable)
    if ernie_accel.report(pipe).entries != entries:
        raise RuntimeError("asked again for the same, the pipe was changed")
    gc.collect()
    return {
        "placed_s": seconds,
        "chosen": [repr(each) for each in memory_plan.transforms],
        "predicted_peak_gib": memory_plan.peak / GIB,
        "predicted_needed_gib": memory_plan.needed / GIB,
        "host_gib": memory_plan.host / GIB,
    }


def _draw(
    pipe: Any,
    width: int,
    *,
    height: int | None = None,
    tokens: int = PROMPT_TOKENS,
    pictures: int = 1,
    steps: int = STEPS,
    seed: int = 0,
    enhance: bool,
) -> torch.Tensor:
    generator = torch.Generator("cuda" if CUDA else "cpu").manual_seed(seed)
    images: torch.Tensor = pipe(
        prompt_of(tokens, seed),
        width=width,
        height=height or width,
        num_images_per_prompt=pictures,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=generator,
        use_pe=enhance,
        output_type="pt",
    ).images
    return images


def _timed(pipe: Any, pixels: int, *, enhance: bool, repeats: int = 3) -> tuple[float, torch.Tensor]:
    seconds = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        images = _draw(pipe, pixels, enhance=enhance)
        sync()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), images


def _reset() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def _memory() -> dict[str, float]:
    if not CUDA:
        return {"peak_gib": 0.0, "reserved_gib": 0.0}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def _compare(job: Job, precisions: str, off: torch.Tensor, on: torch.Tensor) -> dict[str, Any]:
    """Compare the pictures to those of the first rung with weights in as many bits, which has the most memory."""
    file = job.folder / f"fits_{zlib.crc32(precisions.encode())}.pt"
    if not file.is_file():
        torch.save((off.cpu(), on.cpu()), file)
        return {"bits": "the reference of those below with as many bits"}
    first = torch.load(file)
    same = [torch.equal(one, other.cpu()) for one, other in zip(first, (off, on), strict=True)]
    return {"bits": "equal" if all(same) else f"differ (without and with enhancer: {same})"}
