"""Every scheme on one full-size ERNIE-Image block against its bfloat16 output: time, bytes and fidelity.

On a GPU: ``python benchmarks/quantization.py --out benchmarks/results/quantization_NAME``. On a CPU ``--tiny`` runs
the same code in seconds; its times say nothing. Writes OUT.json and OUT.md, by default into the folder that the
environment variable OUT names, and prints the rows as they come. All pairs take six minutes on an H200; ``--only`` and
``--schemes`` choose.

Fidelity is that of what the block adds to the residual stream (output minus input): the stream itself would hide it.

Each scheme is applied by `Quantize` to a pipe whose transformer has two blocks of the true width (4096, feed-forward
12288) and random weights, so the second block is quantized as in the whole model: 7 linears. The block is timed eager
and compiled, on what the first block hands it at 1024x1024 pixels and 128 text tokens: 4224 rows. Times are medians
of single calls by CUDA events, after calls for most of a second, which bring the card to its sustained clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ernie_accel
from ernie_accel import Compile, Context, Quantize
from ernie_accel.core.components import module_bytes
from ernie_accel.quantization.backend import SCHEMES
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import sqnr_db

FULL = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 12288, "rope_axes_dim": (32, 48, 48)}
TINY = {"hidden_size": 128, "num_attention_heads": 2, "ffn_hidden_size": 256, "rope_axes_dim": (16, 24, 24)}
GEMMS = {"gemm_square_ms": "self_attention.to_q", "gemm_up_ms": "mlp.up_proj", "gemm_down_ms": "mlp.linear_fc2"}
COLUMNS = (
    *("scheme", "backend", "block ms, compiled", "block ms, eager", "GEMM ms 4096x4096", "4096x12288", "12288x4096"),
    *("MB a block", "output dB", "output rel", "weight dB, least", "first call s", "peak MB on the way"),
)


def main() -> None:
    """Measure every pair of scheme and backend that can run here, and write the table."""
    arguments = parse()
    device = "cpu" if arguments.tiny else "cuda"
    context = Context.detect(device=device)
    pairs = [(scheme, backend) for backend in BACKENDS.values() for scheme in backend.schemes]
    result: dict[str, Any] = {
        "benchmark": "quantization",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "device": str(context),
        "python": platform.python_version(),
        "versions": dict(context.versions),
        "sizes": {"tiny": arguments.tiny, "rows": arguments.image_side**2 + arguments.text_tokens},
        "rows": [],
        "refused": [],
    }
    bench = Bench(device, TINY if arguments.tiny else FULL, arguments)
    reference = bench.measure_plain(result)
    for scheme, backend in pairs:
        reasons = backend.unsupported(scheme, context)
        if reasons:
            result["refused"].append({"scheme": scheme, "backend": backend.name, "reasons": reasons})
        elif backend.name not in (arguments.only or BACKENDS) or scheme not in (arguments.schemes or SCHEMES):
            continue
        else:
            bench.measure(scheme, backend.name, reference, result)
        write(result, arguments.out)
    print(write(result, arguments.out))


class Bench:
    """One machine, one width: makes pipes, captures what a block is called with, and times it."""

    def __init__(self, device: str, width: dict[str, Any], arguments: argparse.Namespace) -> None:
        self.device, self.width, self.arguments = device, width, arguments
        generator = torch.Generator().manual_seed(0)
        side, text = arguments.image_side, arguments.text_tokens
        self.inputs = {
            "hidden_states": torch.randn(1, 16, side, side, generator=generator),
            "timestep": torch.full((1,), 500.0),
            "text_bth": torch.randn(1, text, 64, generator=generator),
            "text_lens": torch.full((1,), text),
        }

    def pipe(self, device: str) -> Any:
        """Return a pipe with a two-block transformer of this width, bfloat16, the same weights every time."""
        from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

        torch.manual_seed(0)
        with torch.device(device):
            transformer = ErnieImageTransformer2DModel(
                num_layers=2, in_channels=16, out_channels=16, patch_size=1, text_in_dim=64, **self.width
            )
        generator = torch.Generator(device).manual_seed(0)
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.02, generator=generator)
        transformer = transformer.to(torch.bfloat16).eval().requires_grad_(False)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return ErnieImagePipeline(
            transformer=transformer, vae=None, text_encoder=None, tokenizer=None, scheduler=scheduler
        )

    def call(self, pipe: Any) -> None:
        """Run the transformer once."""
        moved = {
            name: value.to(self.device, torch.bfloat16 if value.is_floating_point() else value.dtype)
            for name, value in self.inputs.items()
        }
        with torch.no_grad():
            pipe.transformer(**moved, return_dict=False)

    def captured(self, pipe: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the second block is called with."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        block = pipe.transformer.layers[1]
        hook = block.register_forward_pre_hook(lambda _, a, k: found.append((a, k)), with_kwargs=True)
        self.call(pipe)
        hook.remove()
        (x, rotary, modulation, *rest), kwargs = found[0]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        # Random gates let next to nothing through; wide open ones keep bfloat16's own rounding of x out of the result.
        wide = (shift1, scale1, torch.full_like(gate1, 100), shift2, scale2, torch.full_like(gate2, 100))
        return (x, rotary, wide, *rest), kwargs

    def measure_plain(self, result: dict[str, Any]) -> dict[str, Any]:
        """Time the block in bfloat16; return its input and output."""
        pipe = self.pipe(self.device)
        args, kwargs = self.captured(pipe)
        block = pipe.transformer.layers[1]
        with torch.no_grad():
            output = block(*args, **kwargs) - args[0]
        row = {"scheme": "bfloat16", "backend": "-", "bytes": module_bytes(block)}
        row |= self.times(pipe, args, kwargs, ())
        result["rows"].append(row)
        print(row, flush=True)
        return {"args": args, "kwargs": kwargs, "output": output}

    def measure(self, scheme: str, backend: str, reference: dict[str, Any], result: dict[str, Any]) -> None:
        """Quantize, compare, time eager and compiled; append a row."""
        request = Quantize(scheme, backend=backend, device=self.device)
        pipe = self.pipe("cpu" if self.arguments.tiny else self.device).to("cpu")
        started = time.perf_counter()
        peak_before = self.reset_peak()
        ernie_accel.optimize(pipe, request)
        peak = self.peak() - peak_before
        seconds = time.perf_counter() - started
        block = pipe.transformer.layers[1]
        with torch.no_grad():
            output = block(*reference["args"], **reference["kwargs"]) - reference["args"][0]
        details = [d for d in ernie_accel.report(pipe).entries[0].applied.details if ".layers.1." in d.name]
        expected = reference["output"].float()
        row = {
            "scheme": scheme,
            "backend": backend,
            "bytes": module_bytes(block),
            "output_db": sqnr_db(expected, output),
            "output_rel": ((output.float() - expected).norm() / expected.norm()).item(),
            "weight_db": min(d.sqnr_db for d in details),
            "quantize_s": seconds,
            "peak_bytes": peak,
            "quantized_bytes": module_bytes(pipe.transformer),
            "layers": len(details),
        }
        row |= self.times(pipe, reference["args"], reference["kwargs"], (request,))
        result["rows"].append(row)
        print(row, flush=True)

    def times(self, pipe: Any, args: Any, kwargs: Any, requests: tuple[Any, ...]) -> dict[str, Any]:
        """Return milliseconds of the second block, eager and, where it can be, compiled."""
        block = pipe.transformer.layers[1]
        found: dict[str, Any] = {"eager_ms": self.median_ms(block, args, kwargs), "compiled_ms": None}
        plan = ernie_accel.plan(pipe, *requests, Compile())
        if not plan.ok:
            return found | {"not_compiled": "; ".join(plan.problems[Compile()])}
        torch._dynamo.reset()
        ernie_accel.optimize(pipe, *requests, Compile())
        started = time.perf_counter()
        with torch.no_grad():
            block(*args, **kwargs)
        self.wait()
        found["first_call_s"] = time.perf_counter() - started
        found["compiled_ms"] = self.median_ms(block, args, kwargs)
        for name, path in GEMMS.items():
            layer = block.get_submodule(path)
            x = torch.randn(args[0].numel() // args[0].shape[-1], layer.in_features, device=self.device).bfloat16()
            found[name] = self.median_ms(torch.compile(layer, fullgraph=True), (x,), {}, warmup_s=0.2)
        return found

    def median_ms(self, block: Any, args: Any, kwargs: Any, warmup_s: float | None = None) -> float:
        """Return the median of single calls in ms, after some seconds of calls (and compiling)."""
        times = []
        with torch.no_grad():
            block(*args, **kwargs)
            end = time.perf_counter() + (self.arguments.warmup_s if warmup_s is None else warmup_s)
            while time.perf_counter() < end:
                block(*args, **kwargs)
                self.wait()
            for _ in range(self.arguments.calls):
                times.append(self.one_ms(block, args, kwargs))
        return statistics.median(times)

    def one_ms(self, block: Any, args: Any, kwargs: Any) -> float:
        """Time one call."""
        if self.device == "cpu":
            start = time.perf_counter()
            block(*args, **kwargs)
            return (time.perf_counter() - start) * 1e3
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        block(*args, **kwargs)
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))

    def wait(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def reset_peak(self) -> int:
        """Start measuring device memory; return what is in use."""
        if self.device == "cpu":
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Return the most device memory in use since `reset_peak`."""
        return 0 if self.device == "cpu" else torch.cuda.max_memory_allocated()


def write(result: dict[str, Any], out: Path | None) -> str:
    """Write the result as JSON and as a table; return the table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for row in result["rows"]:
        cells = [row["scheme"], row["backend"], number(row.get("compiled_ms"), 2), number(row["eager_ms"], 2)]
        cells += [number(row.get(name), 3) for name in GEMMS]
        cells += [number(row["bytes"] / 1e6, 1), number(row.get("output_db"), 1), number(row.get("output_rel"), 4)]
        cells += [number(row.get("weight_db"), 1), number(row.get("first_call_s"), 1)]
        peak = row.get("peak_bytes")
        cells.append("-" if not peak else f"{peak / 1e6:.0f} of {row['quantized_bytes'] / 1e6:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [""] + [f"- {r['scheme']} by {r['backend']}: {'; '.join(r['reasons'])}" for r in result["refused"]]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = [f"# Quantization on {result['device']}", "", f"{result['date']}, `{result['command']}`; {versions}", ""]
    text = "\n".join([*head, *lines, ""])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def number(value: float | None, digits: int) -> str:
    """Write a number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="small width on the CPU: proves that the benchmark runs")
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and the .md")
    parser.add_argument("--only", nargs="*", help="only these backends")
    parser.add_argument("--schemes", nargs="*", help="only these schemes")
    parser.add_argument("--calls", type=int, default=20, help="timed calls")
    parser.add_argument("--warmup-s", type=float, default=0.7, help="seconds of calls before the timed ones")
    arguments = parser.parse_args()
    if arguments.out is None and os.environ.get("OUT"):
        arguments.out = Path(os.environ["OUT"], "quantization")
    arguments.image_side, arguments.text_tokens = (4, 5) if arguments.tiny else (64, 128)
    return arguments


if __name__ == "__main__":
    main()
