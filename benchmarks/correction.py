"""What a low-rank correction of quantized layers is worth: the ways to compute one, ranks, and time at full size.

``python benchmarks/correction.py --out benchmarks/results/correction_NAME`` quantizes the blocks of the embedded model
and compares the transformer's output, at all 8 steps of 4 held-out pictures, with the unquantized one's. Ways:

- "none": as it is quantized;
- "svd": the largest singular directions of the error, added to it (LQER without calibration, arXiv 2402.02446);
- "projected": the directions in which the error moves the outputs of other pictures most (the calibrated variant);
- "first": those of the weight, taken out before the rest is quantized (SVDQuant, arXiv 2411.05007);
- "fitted": "first", and then fitted to all that the quantized rest lacks: what ``Quantize(correction_rank=...)`` does;
- "fitted twice": the rest quantized again without the fitted product, and fitted again (LoftQ, arXiv 2310.08659).

``--layer`` instead times one layer of 4096 x 12288 with random weights in bfloat16 on ``--device``, and counts the
operations. ``--model`` times `Quantize` on the whole of ERNIE-Image's transformer at full size, with random weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ernie_accel
from ernie_accel import Quantize
from ernie_accel.common.text import table
from ernie_accel.core.context import Context
from ernie_accel.demo.judge import unseen_prompts
from ernie_accel.quantization.backend import QuantizationBackend, plain_copy
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.correction import (
    OVERSAMPLING,
    POWER_ITERATIONS,
    correct,
    low_rank,
    quantize_corrected,
)
from ernie_accel.quantization.layers import LinearSite, linear_sites, sqnr_db

PAIRS = (
    ("nf4", "bitsandbytes"),
    ("gguf-q4_0", "gguf"),
    ("fp8-weight-only", "torchao"),
    ("int8", "torchao"),
    ("int8-weight-only", "torchao"),
)
RANK, RANKS = 32, (2, 4, 8, 16, 32, 64)
#: Parameters of the linear layers in the blocks of ERNIE-Image: 36 layers of 4 x 4096^2 + 3 x 4096 x 12288.
FULL_SIZE = 36 * (4 * 4096**2 + 3 * 4096 * 12288)

Way = Callable[[QuantizationBackend, str, nn.Linear, int, Tensor], nn.Module]


def as_it_is(backend: QuantizationBackend, scheme: str, linear: nn.Linear, rank: int, x: Tensor) -> nn.Module:
    """Quantize without a correction."""
    return backend.quantize(scheme, linear)


def of_the_error(backend: QuantizationBackend, scheme: str, linear: nn.Linear, rank: int, x: Tensor) -> nn.Module:
    """Add the largest singular directions of the error."""
    layer = backend.quantize(scheme, linear)
    correct(layer, *low_rank(linear.weight.detach() - backend.dequantize(layer).float(), rank))
    return layer


def projected(backend: QuantizationBackend, scheme: str, linear: nn.Linear, rank: int, x: Tensor) -> nn.Module:
    """Add the error within the directions of outputs that it moves most, for inputs `x` [T, K]."""
    layer = backend.quantize(scheme, linear)
    error = linear.weight.detach() - backend.dequantize(layer).float()
    directions, _ = low_rank(x @ error.T, rank)
    directions = torch.linalg.qr(directions.T).Q
    correct(layer, directions.T @ error, directions)
    return layer


def taken_out(backend: QuantizationBackend, scheme: str, linear: nn.Linear, rank: int, x: Tensor) -> nn.Module:
    """Take the largest singular directions out before quantizing the rest."""
    down, up = low_rank(linear.weight.detach(), rank)
    layer = backend.quantize(scheme, plain_copy(linear, linear.weight.detach() - up @ down))
    correct(layer, down, up)
    return layer


def fitted(backend: QuantizationBackend, scheme: str, linear: nn.Linear, rank: int, x: Tensor) -> nn.Module:
    """As the library does."""
    return quantize_corrected(backend, scheme, linear, rank)


def fitted_twice(backend: QuantizationBackend, scheme: str, linear: nn.Linear, rank: int, x: Tensor) -> nn.Module:
    """Quantize again what the fitted product leaves, and fit again."""
    weight = linear.weight.detach()
    product = quantize_corrected(backend, scheme, linear, rank).correction.product()  # type: ignore[operator, union-attr]
    layer = backend.quantize(scheme, plain_copy(linear, weight - product))
    correct(layer, *low_rank(weight - backend.dequantize(layer).float(), rank))
    return layer


WAYS: dict[str, Way] = {
    "none": as_it_is,
    "svd": of_the_error,
    "projected": projected,
    "first": taken_out,
    "fitted": fitted,
    "fitted twice": fitted_twice,
}


class Bench:
    """The embedded model, inputs of its transformer, what it answers unquantized, and what its layers are given."""

    def __init__(self, pictures: int, steps: int) -> None:
        self.pipe = ernie_accel.demo.load(prompt_enhancer=False)
        self.pipe.set_progress_bar_config(disable=True)
        count = pictures + max(1, pictures // 2)
        texts = [text for text, scene in unseen_prompts(16 * count) if scene.height == scene.width == 128][:count]
        self.calls, others = self._calls(texts[:pictures], steps), self._calls(texts[pictures:], steps)
        self.sites = [s for s in linear_sites(self.pipe, ("transformer",), None) if s.left_out is None]
        self.exact = self._outputs(self.calls)
        self.inputs: dict[str, Tensor] = {}
        with self._listening():
            self._outputs(others)

    def measure(self, scheme: str, backend: str, way: str, rank: int) -> float:
        """Return the SQNR of the outputs in dB with every layer of the blocks quantized in this way."""
        originals = [site.linear for site in self.sites]
        for site in self.sites:
            new = WAYS[way](BACKENDS[backend], scheme, site.linear, rank, self.inputs[site.name])
            site.parent._modules[site.child] = new
        found = sqnr_db(self.exact, self._outputs(self.calls))
        for site, original in zip(self.sites, originals, strict=True):
            site.parent._modules[site.child] = original
        return round(found, 2)

    def _calls(self, texts: list[str], steps: int) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        handle = self.pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
        noise = [torch.Generator().manual_seed(seed) for seed in range(len(texts))]
        size = {"height": 128, "width": 128, "num_inference_steps": steps, "guidance_scale": 1.0}
        self.pipe(texts, generator=noise, use_pe=False, output_type="latent", **size)
        handle.remove()
        return calls

    @torch.no_grad()
    def _outputs(self, calls: list[dict[str, Any]]) -> Tensor:
        return torch.cat([self.pipe.transformer(**call)[0] for call in calls])

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def keep(site: LinearSite) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1])
                self.inputs[site.name] = torch.cat([self.inputs.get(site.name, rows[:0]), rows])

            return hook

        handles = [site.layer.register_forward_pre_hook(keep(site)) for site in self.sites]
        yield
        for handle in handles:
            handle.remove()


def time_layer(device: str, rows: int, columns: int, scheme: str, backend: str) -> dict[str, Any]:
    """Time quantizing one layer with and without a correction on `device`, after a first time (a CPU: its own time)."""
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
    used, found, on_gpu = BACKENDS[backend], {}, device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time  # on a CPU that others use, too
    for name, do in (
        ("quantize", lambda: used.quantize(scheme, linear)),
        ("low rank", lambda: low_rank(linear.weight.float(), RANK)),
        ("corrected", lambda: quantize_corrected(used, scheme, linear, RANK)),
    ):
        seconds = []
        for _ in range(3):
            start = clock()
            do()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(clock() - start)
        found[f"{name} s"] = round(min(seconds[1:]), 4)
    passes = 2 * (POWER_ITERATIONS + 1)  # products of the matrix with a narrow one, and two more for the gram and turn
    operations = 2 * 2 * rows * columns * (RANK + OVERSAMPLING) * (passes + 1)
    return {
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads",
        "layer": f"{rows} x {columns}, {scheme} by {backend}, rank {RANK}",
        **found,
        "operations, GFLOP": round(operations / 1e9, 1),
        "all blocks at full size, TFLOP": round(operations / 1e12 * FULL_SIZE / (rows * columns), 2),
        "all blocks at full size, s": round(found["corrected s"] * FULL_SIZE / (rows * columns), 1),
    }


def time_model(device: str, size: str, scheme: str, backend: str) -> dict[str, Any]:
    """Time `Quantize` on a whole transformer on `device`, as a script calls it, with and without a correction."""
    from random_pipeline import random_pipeline

    pipe = random_pipeline(size, device, torch.bfloat16, denoiser_only=True)
    found: dict[str, Any] = {}
    for name, rank in (("a first time", None), ("quantize", None), ("corrected", RANK)):
        start = time.perf_counter()
        ernie_accel.optimize(pipe, Quantize(scheme, backend=backend, correction_rank=rank))
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        found[f"{name} s"] = round(time.perf_counter() - start, 1)
        ernie_accel.restore(pipe)
    return {"model": f"ERNIE-Image, {size}; {scheme} by {backend}, rank {RANK}", **found}


def main() -> None:
    """Measure, print, and write OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="without the suffix; default: nothing is written")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="one scheme, one picture, one step; a layer of 256 x 512")
    parser.add_argument("--layer", action="store_true", help="time one layer of 4096 x 12288 instead")
    parser.add_argument("--model", action="store_true", help="time Quantize on a whole transformer instead")
    parser.add_argument("--device", default="cpu", help="of --layer and --model")
    parser.add_argument("--schemes", nargs="+", help="only these")
    options = parser.parse_args()
    from ladder_measures import record_of

    pairs = [pair for pair in PAIRS if pair[0] in (options.schemes or dict(PAIRS))][: 1 if options.tiny else None]
    record = record_of("correction", Context.detect(device=options.device))
    if options.layer:
        size = (256, 512) if options.tiny else (12288, 4096)
        record["layers"] = [time_layer(options.device, *size, *pair) for pair in pairs]
        for layer in record["layers"]:
            print(json.dumps(layer, indent=1), flush=True)
    elif options.model:
        record["models"] = []
        for pair in pairs:
            record["models"].append(time_model(options.device, "tiny" if options.tiny else "full", *pair))
            print(json.dumps(record["models"][-1], indent=1), flush=True)
    else:
        bench = Bench(*((1, 1) if options.tiny else (options.pictures, options.steps)))
        record["ways_db"] = {s: {way: bench.measure(s, b, way, RANK) for way in WAYS} for s, b in pairs}
        record["ranks_db"] = {s: {str(rank): bench.measure(s, b, "fitted", rank) for rank in RANKS} for s, b in pairs}
        for title, rows in (("way", record["ways_db"]), ("rank", record["ranks_db"])):
            columns = list(next(iter(rows.values())))
            print(table((f"scheme, by {title}", *columns), [(s, *map(str, row.values())) for s, row in rows.items()]))
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
