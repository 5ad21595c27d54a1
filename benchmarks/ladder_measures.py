"""How the ladder measures: the inputs that all rungs share, sustained times, fidelity, and the card's own ceilings."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_pipeline import random_pipeline

from ernie_accel.core.context import Context

TEXT_TOKENS = 128
STEPS = 8
#: Squares that the ladder measures, the main one first.
PIXELS = {"full": (1024, 512, 256), "tiny": (64,)}
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Job:
    """What one process needs to know beside the name of what it measures.

    Attributes:
        size: A key of ``random_pipeline.SIZES``.
        folder: Holds what the processes of a run share, such as the reference.
        cache: Where a rung keeps compiled code that outlives its process.
        profile: Add the kernels that take longest.
    """

    size: str
    folder: Path
    cache: Path
    profile: bool = False

    @property
    def device(self) -> str:
        return "cuda" if CUDA else "cpu"

    @property
    def pixels(self) -> tuple[int, ...]:
        return PIXELS[self.size]

    @property
    def reference(self) -> Path:
        return self.folder / "reference.pt"

    def pipeline(self) -> Any:
        """Return the stock pipeline in bfloat16; its weights are the same in every process."""
        return random_pipeline(self.size, self.device, torch.bfloat16)


def inputs_for(
    pipe: Any, width: int, height: int | None = None, *, batch: int = 1, tokens: int = TEXT_TOKENS
) -> dict[str, Any]:
    """Return arguments of one prediction; the same for every process."""
    config, weight = pipe.transformer.config, next(pipe.transformer.parameters())
    device, dtype = weight.device, torch.bfloat16
    generator = torch.Generator().manual_seed(7)
    shape = (batch, config.in_channels, (height or width) // 16, width // 16)
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(device, dtype),
        "timestep": torch.full((batch,), 500.0, device=device, dtype=dtype),
        "text_bth": torch.randn(batch, tokens, config.text_in_dim, generator=generator).to(device, dtype),
        "text_lens": torch.full((batch,), tokens, device=device),
        "return_dict": False,
    }


def denoised(pipe: Any, pixels: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return the latents after all steps of a picture."""
    inputs = inputs_for(pipe, pixels)
    latents: torch.Tensor = pipe(
        prompt_embeds=[inputs["text_bth"][0].to(dtype)], latents=inputs["hidden_states"].to(dtype), height=pixels,
        width=pixels, num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent",
    ).images  # fmt: skip
    sync()
    return latents


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(step: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    sync()
    start = time.perf_counter()
    step()
    sync()
    return time.perf_counter() - start


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Return the median time of `repeats` steps that follow each other without a pause."""
    return statistics.median(each_milliseconds(step, repeats))


def each_milliseconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Return the times of `repeats` steps that follow each other without a pause."""
    if not CUDA:
        return [seconds(step) * 1e3 for _ in range(repeats)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    sync()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def reset_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """Return the most memory in use since `reset_peak`; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else None


def sqnr_db(got: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float()
    return float(20 * torch.log10(expected.norm() / (got.float().cpu() - expected).norm()))


def weight_gb(module: torch.nn.Module) -> float:
    """Return the bytes of all weights in 1e9, scales of quantized ones included."""
    return sum(p.numel() * p.element_size() for p in _tensors(module)) / 1e9


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for tensor in [*module.parameters(), *module.buffers()]:
        if hasattr(tensor, "__tensor_flatten__"):
            tensors += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            tensors.append(tensor)
        scales = (getattr(getattr(tensor, "quant_state", None), "absmax", None), getattr(tensor, "SCB", None))
        tensors += [scale for scale in scales if scale is not None]  # where bitsandbytes keeps them
    return tensors


def kernel_times(step: Callable[[], object]) -> dict[str, list[float]]:
    """Return {kernel: [ms, launches]} of the twelve kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        sync()
    top = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)[:12]
    return {event.key[:110]: [round(event.device_time_total / 1e3, 2), event.count] for event in top}


@torch.no_grad()
def make_reference(job: Job) -> dict[str, float]:
    """Save what float32 gives with the very weights that the rungs have, and return this card's ceilings."""
    pipe = random_pipeline(job.size, job.device, torch.bfloat16, denoiser_only=True)
    arguments = inputs_for(pipe, job.pixels[0])
    pipe.transformer.float()
    floats = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }
    prediction = pipe.transformer(**floats)[0].cpu()
    torch.save({"prediction": prediction, "latents": denoised(pipe, job.pixels[0], torch.float32).cpu()}, job.reference)
    del pipe
    return ceilings() if CUDA and job.size == "full" else {}


def ceilings() -> dict[str, float]:
    """Return the rates that this card sustains at the shapes of one step: TFLOP/s of products and attention, TB/s."""
    torch.cuda.empty_cache()
    rows, hidden, ffn, heads = 4096 + TEXT_TOKENS, 4096, 12288, 32
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)]  # (K, N)
    flop = sum(2 * rows * k * n for k, n in shapes)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for k, n in shapes]
    xs = [torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for k, _ in shapes]
    bf16 = _sustained(lambda: [x @ w.t() for x, w in zip(xs, weights, strict=True)])
    result = {"bf16_tflops": flop / bf16 / 1e9}
    if torch.cuda.get_device_capability() >= (8, 9):
        fp8 = torch.float8_e4m3fn
        w8 = [(w.to(fp8), torch.ones(1, w.shape[0], device="cuda")) for w in weights]
        x8 = [(x.to(fp8), torch.ones(rows, 1, device="cuda")) for x in xs]
        time_fp8 = _sustained(
            lambda: [
                torch._scaled_mm(x, w.t(), sx, sw, out_dtype=torch.bfloat16, use_fast_accum=True)
                for (x, sx), (w, sw) in zip(x8, w8, strict=True)
            ]
        )
        result["fp8_tflops"] = flop / time_fp8 / 1e9
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(1, heads, rows, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        attention = _sustained(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    result["attention_tflops"] = 4 * rows * rows * hidden / attention / 1e9
    a = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    result["copy_tb_s"] = 2 * a.numel() * 2 / _sustained(lambda: b.copy_(a)) / 1e9
    layers = 36
    attention_ms = layers * attention
    result["roofline_bf16_ms"] = layers * bf16 + attention_ms
    if "fp8_tflops" in result:
        result["roofline_fp8_ms"] = layers * time_fp8 + attention_ms
    return result


def _sustained(step: Callable[[], object], at_least: float = 1.5) -> float:
    """Return milliseconds of a step, repeated for `at_least` seconds after as long a warm-up."""
    step()
    once = milliseconds(step, 10)
    repeats = max(20, int(at_least * 1e3 / once))
    milliseconds(step, repeats)
    return milliseconds(step, repeats)


def record_of(benchmark: str, context: Context) -> dict[str, Any]:
    """Return what a file of results says of the run: command, date, commit, hardware and versions."""
    return {
        "benchmark": benchmark,
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "device": str(context),
        "commit": os.environ.get("COMMIT", ""),
        "python": platform.python_version(),
        "versions": dict(context.versions),
    }
