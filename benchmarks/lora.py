"""What a LoRA costs on fused kernels: ms a step and percent by rank, swapping, loading, and fidelity in dB.

On a GPU: ``python benchmarks/lora.py --out benchmarks/results/lora_NAME`` (full-size ERNIE-Image with random weights,
1024x1024 pixels, 128 text tokens; three minutes on an H200). On a CPU ``--tiny`` runs the same code in seconds;
its times say nothing. Writes OUT.json and OUT.md, by default into the folder that the environment variable OUT names.

Steps are timed back to back by CUDA events, so that the card is at its sustained clock; each rank is timed between two
runs without a LoRA, and compared with their mean. Fidelity is that of the transformer's output: fp8 against bfloat16,
both without a LoRA and both with it. Swaps go back to an adapter of a moment ago, but for the first.

There are two rounds, the second in the opposite order. For a row that is slow, the JSON has what tells why: the time of
each step, which operators and kernels a step calls, whether it was replayed, which products have spare columns, the
clocks of the card meanwhile, its memory, and how long the host takes to issue a step.

``--parts`` times the pieces instead, in microseconds: each product with and without spare columns, and the kernel that
fills these, by how it is cut into programs. It needs no model, and takes a few minutes, most of them to compile.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ladder_measures
import torch
from ladder_measures import kernel_times, seconds, sync
from random_pipeline import random_pipeline
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import ernie_accel
from ernie_accel import Context, FuseKernels, RewriteBlocks
from ernie_accel.core.stand_in import standing_in
from ernie_accel.kernels import ops
from ernie_accel.models.adapters import PRODUCTS, update_products
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.quantization.layers import sqnr_db

LAYERS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "all": ("to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "linear_fc2"),
}
COLUMNS = (
    "round", "layers", "rank", "ms a step", "without", "costs %", "swap ms", "first swap ms", "load s", "fp8 dB",
    "fp8 + LoRA dB",
)  # fmt: skip

#: Decimals of each figure, in the order of `COLUMNS`.
SHOWN = {
    "step_ms": 2,
    "without_ms": 2,
    "percent": 1,
    "swap_ms": 1,
    "first_swap_ms": 1,
    "load_s": 2,
    "base_db": 2,
    "lora_db": 2,
}


def main() -> None:
    """Measure every rank, and write the table."""
    arguments = parse()
    if arguments.parts:
        parts(arguments.tiny)
        return
    device = "cpu" if arguments.tiny else "cuda"
    context = Context.named("h200") if arguments.tiny else Context.detect()
    pipe = random_pipeline("tiny" if arguments.tiny else "full", device, torch.bfloat16, denoiser_only=True)
    inputs = step_inputs(pipe, 64 if arguments.tiny else 1024, 8 if arguments.tiny else 128)
    wanted = list(itertools.product(arguments.layers, arguments.ranks))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad():
        files = {
            (layers, rank, number): write_lora(pipe, Path(folder), layers, rank, number)
            for layers, rank in wanted
            for number in (0, 1)
        }
        stock = {None: forward(pipe, inputs)}
        for layers, rank in wanted:
            load(pipe, files[layers, rank, 0], "a")
            stock[layers, rank] = forward(pipe, inputs)
            pipe.unload_lora_weights()
        optimize(pipe, context, arguments.tiny)
        base_db = sqnr_db(stock[None], forward(pipe, inputs))
        out = arguments.out or Path(os.environ.get("OUT", ".")) / "lora"
        rows: list[dict[str, Any]] = []
        for number, (layers, rank) in ((n, each) for n in range(arguments.rounds) for each in wanted[:: (-1) ** n]):
            row, seen = measured(pipe, inputs, files[layers, rank, 0], files[layers, rank, 1], arguments.steps)
            fidelity = {"base_db": base_db, "lora_db": sqnr_db(stock[layers, rank], row.pop("output"))}
            row = {"round": number + 1, "layers": layers, "rank": rank, **row, **fidelity}
            print(json.dumps(row), flush=True)
            rows.append({**row, "seen": seen})
            write(rows, out, Context.detect(device=device))  # a run that is cut off has measured something, too
    print(table(rows))


def write(rows: list[dict[str, Any]], out: Path, context: Context) -> None:
    """Write the rows measured so far, as JSON and as a table."""
    result = {
        "benchmark": "lora",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "device": str(context),
        "versions": dict(context.versions),
        "rows": rows,
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU; times say nothing")
    parser.add_argument("--parts", action="store_true", help="time the pieces, and print them")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=["attention", "all"])
    parser.add_argument("--rounds", type=int, default=2, help="how often, every other time in the opposite order")
    parser.add_argument("--steps", type=int, default=24, help="steps of each timing")
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    return parser.parse_args()


def parts(tiny: bool) -> None:
    """Print what products and the low-rank kernel take, in microseconds."""
    device, tokens = ("cpu", 8) if tiny else ("cuda", 4224)
    kernels = None if tiny else importlib.import_module("ernie_accel.kernels.gpu")
    too_large = () if tiny else importlib.import_module("triton.runtime.errors").OutOfResources
    shapes = {"queries, keys, values": (12288, 4096), "gate and up": (24576, 4096), "down": (4096, 12288)}
    for name, (features, columns) in {**shapes, "attention output": (4096, 4096)}.items():
        if tiny:
            features, columns = features // 64, columns // 64
        x = torch.randn(1, tokens, columns, device=device, dtype=torch.bfloat16)
        weight, weight_scale = ops.quantize_rows(torch.randn(features, columns, device=device, dtype=torch.bfloat16))
        row, products = weight_scale.view(1, -1), {}
        for spare in (0, 128, 256):
            values, scale = ops.quantize_rows(x, spare)
            down = ops.quantize_rows(torch.randn(max(spare, 16), columns, device=device, dtype=torch.bfloat16))[0]
            factor, wide = torch.ones(len(down), device=device), weight.new_zeros(features, columns + spare)
            wide.view(torch.uint8)[:, :columns] = weight.view(torch.uint8)
            if spare:
                ops.low_rank_into(values, down, factor)
                wide[:, columns:] = torch.randn(features, spare, device=device)  # zeros would take less power
            products[spare] = partial(ops.linear_fp8, values, scale, wide, row)
        # In turn: what is timed first runs on a cooler card.
        rounds = [{spare: microseconds(product) for spare, product in products.items()} for _ in range(4)]
        times = {spare: statistics.median(each[spare] for each in rounds[1:]) for spare in products}
        print(name, "product by spare columns:", {spare: round(us, 1) for spare, us in times.items()}, flush=True)
        for ranks, spare in ((16, 128), (48, 128), (96, 128), (192, 256)):
            values, scale = ops.quantize_rows(x, spare)
            plain = ops.quantize_rows(x)[0]
            down = ops.quantize_rows(torch.randn(ranks, columns, device=device, dtype=torch.bfloat16))[0]
            factor, found = torch.ones(ranks, device=device), {}
            into = partial(ops.low_rank_into, values, down, factor)
            for cut in [None] if kernels is None else itertools.product((16, 32), (128, 256), (4, 6)):
                if kernels is not None:
                    kernels._FP8_LOW_RANK_ROWS, block, kernels._FP8_LOW_RANK_STAGES = cut
                    kernels._FP8_LOW_RANK_BLOCK = {64: block, 128: block}
                try:
                    copying = partial(ops.with_low_rank, plain, scale, down, factor, spare)
                    found[cut] = round(microseconds(into), 1), round(microseconds(copying), 1)
                except too_large:
                    print("more shared memory than there is:", cut)
            best = sorted(found.items(), key=lambda item: item[1])[:4]
            print(name, f"A x of {ranks} ranks, (rows, columns, stages): (in place, copying)", best, flush=True)


def microseconds(work: Callable[[], object]) -> float:
    """Return what a call takes of those that follow each other in a graph, so that launches do not count."""
    if not torch.cuda.is_available():
        return seconds(work) * 1e6
    repeats = 20
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    return ladder_measures.milliseconds(graph.replay, 10) / repeats * 1e3


def optimize(pipe: Any, context: Context, tiny: bool) -> None:
    """Put the pipe on the fast path."""
    if tiny:  # the preset would look for the device
        ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels("fp8"), context=context)
    else:
        ernie_accel.optimize(pipe, preset="turbo-fp8")


def step_inputs(pipe: Any, pixels: int, tokens: int) -> dict[str, Any]:
    """Return the arguments of one step of the transformer."""
    config, weight = pipe.transformer.config, next(pipe.transformer.parameters())
    generator = torch.Generator().manual_seed(7)
    shape = (1, config.in_channels, pixels // 16, pixels // 16)
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(weight),
        "timestep": torch.full((1,), 500.0).to(weight),
        "text_bth": torch.randn(1, tokens, config.text_in_dim, generator=generator).to(weight),
        "text_lens": torch.full((1,), tokens, device=weight.device),
        "return_dict": False,
    }


def forward(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the prediction of one step, on the host."""
    sample: torch.Tensor = pipe.transformer(**inputs)[0]
    return sample.float().cpu()


def write_lora(pipe: Any, folder: Path, layers: str, rank: int, seed: int) -> Path:
    """Write a random LoRA, as large in effect as trained ones are, and return its file."""
    tensors = {}
    weight = next(pipe.transformer.parameters())
    generator = torch.Generator(weight.device).manual_seed(seed)
    for path, layer in pipe.transformer.named_modules():
        if path.startswith("layers.") and path.endswith(LAYERS[layers]):
            # The change of a weight has a twentieth of its norm.
            scale = (0.05 * 0.02 / rank**0.5) ** 0.5
            for half, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                values = torch.randn(shape, generator=generator, device=weight.device) * scale
                tensors[f"transformer.{path}.lora_{half}.weight"] = values.to(weight.dtype).cpu()
    path = folder / f"{layers}_{rank}_{seed}.safetensors"
    save_file(tensors, path)
    return path


def load(pipe: Any, file: Path, name: str) -> None:
    """Load a LoRA from disk."""
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)


def measured(
    pipe: Any, inputs: dict[str, Any], one: Path, other: Path, steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what two LoRAs of a rank cost, with the prediction by the first of them, and what tells why."""

    def step() -> None:
        pipe.transformer(**inputs)

    without = [each_milliseconds(step, steps)]
    load_s = seconds(lambda: load(pipe, one, "a"))
    load(pipe, other, "b")

    def switch(name: str) -> Callable[[], None]:
        def do() -> None:
            pipe.set_adapters([name])
            update_products(pipe.transformer)

        return do

    switch("b")()  # which makes room
    first_s, *swaps = [seconds(switch(name)) for name in "ababab"]
    switch("a")()
    output = forward(pipe, inputs)
    with_lora = each_milliseconds(step, steps)
    seen = what_ran(pipe, inputs, with_lora)
    products = PRODUCTS.required(pipe.transformer)
    seen["spare_columns"] = dict(Counter(product.spare for product in products))
    seen["added_in_place"] = sum(product.up is not None for product in products)
    host_ms = seconds(lambda: update_products(pipe.transformer)) * 1e3
    pipe.unload_lora_weights()
    without.append(each_milliseconds(step, steps))
    seen |= {"without": what_ran(pipe, inputs, without[1]), "without_before_ms": rounded(without[0])}
    base, step_ms = statistics.mean(map(statistics.median, without)), statistics.median(with_lora)
    return {
        "step_ms": step_ms,
        "without_ms": base,
        "percent": 100 * (step_ms / base - 1),
        "swap_ms": statistics.median(swaps) * 1e3,
        "first_swap_ms": first_s * 1e3,
        "load_s": load_s,
        "products": len(products),
        "look_ms": host_ms,
        "output": output,
    }, seen


def each_milliseconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Return the times of steps that follow each other without a pause, after a few more."""
    for _ in range(4):
        step()
    return ladder_measures.each_milliseconds(step, repeats)


def rounded(times: list[float]) -> list[float]:
    """Return times as the JSON has them."""
    return [round(each, 2) for each in times]


class Operators(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(pipe: Any, inputs: dict[str, Any]) -> dict[str, int]:
    """Return how often a step calls each operator when no graph is replayed, the most frequent first."""
    graphed = standing_in(pipe.transformer, GraphedForward)
    with Operators() as seen:
        (pipe.transformer if graphed is None else graphed.inner_forward)(**inputs)
    return dict(seen.calls.most_common())


def captures(pipe: Any) -> list[int]:
    """Return the identities of the graphs that are kept."""
    graphed = standing_in(pipe.transformer, GraphedForward)
    entries = [] if graphed is None else graphed._graphs._entries.values()
    return [id(entry.made) for entry in entries if entry.made is not None]


def what_ran(pipe: Any, inputs: dict[str, Any], times_ms: list[float]) -> dict[str, Any]:
    """Return what tells why steps took these times."""
    before, issued = captures(pipe), []
    for _ in range(8):
        start = time.perf_counter()
        pipe.transformer(**inputs)
        issued.append((time.perf_counter() - start) * 1e3)
    clocks = card()  # while the card computes
    sync()
    found: dict[str, Any] = {
        "steps_ms": rounded(times_ms),
        "graphs": len(before),
        "captured_anew": captures(pipe) != before,
        "host_ms": rounded(issued),
        "card": clocks,
    }
    if ladder_measures.CUDA:
        memory = torch.cuda.memory_stats()
        found["memory_gb"] = {
            name: round(memory[f"{name}_bytes.all.current"] / 1e9, 2) for name in ("allocated", "reserved")
        }
        found["memory_retries"] = memory["num_alloc_retries"]
        found["kernels"] = kernel_times(lambda: pipe.transformer(**inputs))
    return {**found, "operators": operators(pipe, inputs)}


def card() -> str:
    """Return clocks, power and temperature of the card now, and what holds the clocks down, as nvidia-smi says."""
    asked = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    if not ladder_measures.CUDA or not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in rows:
        figures = [f"{row[name]:.{digits}f}" for name, digits in SHOWN.items()]
        lines.append(" | ".join([str(row["round"]), row["layers"], str(row["rank"]), *figures]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
