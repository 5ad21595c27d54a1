"""Measure what each technique adds, on the full-size model with random weights; a fresh process for every rung.

    python benchmarks/ladder.py                     # all rungs at 1024, 512 and 256 px on the GPU; tiny on a CPU
    python benchmarks/ladder.py --only stock,turbo-fp8 --save benchmarks/results/ladder_h200_202611

Columns: ms/step is the median over steps run back to back (the card throttles when it is busy, so a burst is no
result); the first picture includes optimizing and compiling, with an empty cache on disk, or in a rung named "again"
with what the rung before it left there; SQNR is of one prediction against float32 with the same weights and inputs;
roofline is the time of the products and the attention alone at the rates this card sustained in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEXT_TOKENS = 128
STEPS = 8
PIXELS = {"full": (1024, 512, 256), "tiny": (64,)}
CUDA = torch.cuda.is_available()


def _compile_stock(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)


def _apply(transforms: Callable[[Any], list[Any]], preset: str | None = None) -> Callable[[Any], None]:
    """Return a rung that optimizes a pipe by the transforms that `transforms` picks from the package, and a preset."""

    def change(pipe: Any) -> None:
        import ernie_accel

        ernie_accel.optimize(pipe, *transforms(ernie_accel), preset=preset)

    return change


#: Rung -> (what it is, how a stock pipe becomes it).
RUNGS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "stock": ("diffusers as it is, bf16", lambda pipe: None),
    "stock+compile": ("+ compile_repeated_blocks", _compile_stock),
    "rewrite": ("RewriteBlocks", _apply(lambda a: [a.RewriteBlocks()])),
    "rewrite+compile": ("RewriteBlocks + Compile", _apply(lambda a: [a.RewriteBlocks(), a.Compile()])),
    "turbo-bf16": ("+ fused kernels in its place: the preset", _apply(lambda a: [], "turbo-bf16")),
    "torchao-fp8+compile": (
        "peer: torchao fp8 per row + regional compile",
        _apply(lambda a: [a.Quantize("fp8", keep_originals=False), a.Compile()]),
    ),
    "rewrite+torchao-fp8+compile": (
        "RewriteBlocks + torchao fp8 + Compile",
        _apply(lambda a: [a.RewriteBlocks(), a.Quantize("fp8", keep_originals=False), a.Compile()]),
    ),
    "turbo-fp8 bf16-attention": (
        "+ fused fp8 kernels in its place",
        _apply(lambda a: [a.FuseKernels("fp8", attention="bf16", keep_originals=False)], "turbo-fp8"),
    ),
    "turbo-fp8": (
        "+ fp8 attention by cuDNN where it is installed: the preset",
        _apply(lambda a: [a.FuseKernels("fp8", keep_originals=False)], "turbo-fp8"),
    ),
}


def inputs_for(pipe: Any, pixels: int, device: str, dtype: torch.dtype, tokens: int = TEXT_TOKENS) -> dict[str, Any]:
    """Return arguments of one prediction; the same for every process."""
    config, side = pipe.transformer.config, pixels // 16
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(1, config.in_channels, side, side, generator=generator).to(device, dtype),
        "timestep": torch.full((1,), 500.0, device=device, dtype=dtype),
        "text_bth": torch.randn(1, tokens, config.text_in_dim, generator=generator).to(device, dtype),
        "text_lens": torch.full((1,), tokens, device=device),
        "return_dict": False,
    }


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Return the median time of `repeats` steps that follow each other without a pause."""
    if not CUDA:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    sync()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def sqnr_db(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (got.float().cpu() - expected).norm()))


@torch.no_grad()
def measure(rung: str, size: str, device: str, dtype: torch.dtype, reference: Path, profile: bool) -> dict[str, Any]:
    """Measure one rung in this process."""
    from random_pipeline import prompt_of, random_pipeline

    pipe = random_pipeline(size, device, dtype)
    start = time.perf_counter()
    RUNGS[rung][1](pipe)
    sync()
    row: dict[str, Any] = {"rung": rung, "what": RUNGS[rung][0], "optimize_s": time.perf_counter() - start}
    row["weight_gb"] = sum(p.numel() * p.element_size() for p in _tensors(pipe.transformer)) / 1e9
    pixels = PIXELS[size]
    expected = torch.load(reference)
    for px in pixels:
        arguments = inputs_for(pipe, px, device, dtype)
        start = time.perf_counter()
        out = pipe.transformer(**arguments)[0]
        sync()
        if px == pixels[0]:
            row["first_call_s"] = time.perf_counter() - start
            row["sqnr_db"] = sqnr_db(out, expected)
        for _ in range(3):
            pipe.transformer(**arguments)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        row[f"ms_{px}"] = milliseconds(lambda a=arguments: pipe.transformer(**a), 30 if px == pixels[0] else 20)
        if CUDA and px == pixels[0]:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9

    def picture() -> None:
        pipe(
            prompt_of(TEXT_TOKENS), height=pixels[0], width=pixels[0], num_inference_steps=STEPS, guidance_scale=1.0,
            generator=torch.Generator(device).manual_seed(0), output_type="pt",
        )  # fmt: skip
        sync()

    start = time.perf_counter()
    picture()
    row["first_picture_s"] = row["optimize_s"] + row["first_call_s"] + time.perf_counter() - start
    times = []
    for _ in range(3):
        start = time.perf_counter()
        picture()
        times.append((time.perf_counter() - start) * 1e3)
    row["picture_ms"] = statistics.median(times)
    if profile and CUDA:
        row["kernels"] = kernel_times(lambda: pipe.transformer(**inputs_for(pipe, pixels[0], device, dtype)))
    return row


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for tensor in [*module.parameters(), *module.buffers()]:
        if hasattr(tensor, "__tensor_flatten__"):
            tensors += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            tensors.append(tensor)
    return tensors


def kernel_times(step: Callable[[], object]) -> dict[str, list[float]]:
    """Return {kernel: [ms, launches]} of the ten kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        sync()
    top = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)[:12]
    return {event.key[:110]: [round(event.device_time_total / 1e3, 2), event.count] for event in top}


@torch.no_grad()
def make_reference(size: str, device: str, dtype: torch.dtype, out: Path) -> dict[str, Any]:
    """Save the float32 prediction of the very weights that the rungs have, and measure this card's ceilings."""
    from random_pipeline import random_pipeline

    pipe = random_pipeline(size, device, dtype, denoiser_only=True)
    arguments = inputs_for(pipe, PIXELS[size][0], device, dtype)
    pipe.transformer.float()
    arguments = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }
    torch.save(pipe.transformer(**arguments)[0].cpu(), out)
    del pipe
    return ceilings() if CUDA and size == "full" else {}


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


def _sustained(step: Callable[[], object], seconds: float = 1.5) -> float:
    """Return milliseconds of a step, repeated for `seconds` after as long a warm-up."""
    step()
    once = milliseconds(step, 10)
    repeats = max(20, int(seconds * 1e3 / once))
    milliseconds(step, repeats)
    return milliseconds(step, repeats)


def table(result: dict[str, Any]) -> str:
    """Return the result as a markdown table."""
    rows, ceiling, pixels = result["rungs"], result["ceilings"], result["pixels"]
    stock = next((row for row in rows if row["rung"] == "stock" and f"ms_{pixels[0]}" in row), None)
    head = ["rung", *(f"ms/step {px} px" for px in pixels), "x stock", "x roofline", "picture ms", "first picture s"]
    head += ["weights GB", "peak GB", "SQNR dB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['rung']} | failed: {row['error'].splitlines()[-1][:80]} |" + " |" * (len(head) - 2))
            continue
        ms = row[f"ms_{pixels[0]}"]
        floor = ceiling.get("roofline_fp8_ms" if "fp8" in row["rung"] else "roofline_bf16_ms")
        cells = [row["rung"], *(f"{row[f'ms_{px}']:.1f}" for px in pixels)]
        cells += [f"{stock[f'ms_{pixels[0]}'] / ms:.2f}" if stock else "", f"{ms / floor:.2f}" if floor else ""]
        cells += [f"{row['picture_ms']:.0f}", f"{row['first_picture_s']:.1f}"]
        cells += [f"{row['weight_gb']:.2f}", f"{row.get('peak_gb', 0):.1f}", f"{row['sqnr_db']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(result: dict[str, Any], stem: Path) -> None:
    """Write the result as JSON, markdown and, where matplotlib is installed, a plot."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    about = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rates = ", ".join(f"{name} {value:.1f}" for name, value in result["ceilings"].items())
    text = f"# Ladder on {result['device']}\n\n`{result['command']}`\n\n{about}; commit {result['commit']}.\n\n"
    stem.with_suffix(".md").write_text(text + f"Ceilings: {rates}.\n\n" + table(result) + "\n")
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    rows = [row for row in result["rungs"] if "error" not in row]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1))
    times = [row[f"ms_{result['pixels'][0]}"] for row in rows]
    axes.bar_label(axes.barh([row["rung"] for row in rows], times), fmt="%.1f")
    axes.invert_yaxis()
    axes.set_xlabel(f"ms/step, {result['pixels'][0]} px, {result['device']}")
    figure.savefig(stem.with_suffix(".png"), bbox_inches="tight", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(PIXELS), default="full" if CUDA else "tiny")
    parser.add_argument("--only", help=f"comma-separated rungs of {', '.join(RUNGS)}")
    parser.add_argument("--save", type=Path, help="path without suffix for .json, .md and .png")
    parser.add_argument("--profile", action="store_true", help="add the kernels that take longest")
    parser.add_argument("--commit", help="the commit that is measured; default: asked of git")
    parser.add_argument("--rung", help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.bfloat16)
    if arguments.rung == "reference":
        print(json.dumps(make_reference(arguments.size, device, dtype, arguments.reference)))
        return
    if arguments.rung:
        print(
            json.dumps(measure(arguments.rung, arguments.size, device, dtype, arguments.reference, arguments.profile))
        )
        return
    wanted = arguments.only.split(",") if arguments.only else [*RUNGS, "turbo-fp8 again"]
    unknown = {name.removesuffix(" again") for name in wanted} - set(RUNGS)
    if unknown:
        parser.error(f"no such rung: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.pt"
        common = ["--size", arguments.size, "--reference", str(reference)] + ["--profile"] * arguments.profile
        rates = run(["--rung", "reference", *common])
        rows = []
        for name in wanted:
            cache = Path(folder) / name.removesuffix(" again")
            row = run(["--rung", name.removesuffix(" again"), *common], cache)
            rows.append(row | {"rung": name})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {
        "device": torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU",
        "command": shlex.join(["python", "benchmarks/ladder.py", "--size", arguments.size, "--only", ",".join(wanted)]),
        "commit": arguments.commit or _commit(),
        "versions": _versions(),
        "pixels": PIXELS[arguments.size],
        "ceilings": rates,
        "rungs": rows,
    }
    if arguments.save:
        save(result, arguments.save)
    print(table(result))


def run(arguments: list[str], cache: Path | None = None) -> dict[str, Any]:
    """Run this script in a process of its own, with its compiled code in `cache`; return its result."""
    folders = (
        {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache)}
    )
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | folders)
    if done.returncode:
        return {"error": done.stderr[-1500:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "diffusers", "transformers", "torchao", "nvidia-cudnn-frontend"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
