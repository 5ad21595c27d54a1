"""Question: how many more pictures per minute does a batch make than the loop that guides show? The aim on a CPU: 1.5.

    python benchmarks/batch.py                                          # the embedded model; minutes on two cores
    python benchmarks/batch.py --full-size --size 512 --preset turbo-bf16    # the 8B model, random weights, on a GPU

The loop calls the stock pipe once per row and saves each picture. The batch is `produce` with ledger, manifest and text
chunks, on a pipe optimized with `--preset` if one is given. Both make the same rows with the same steps, guidance and
noise, in turn; the figures are medians over the rounds, after one round that is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ernie_accel
from ernie_accel.batch import Row, produce
from ernie_accel.batch.engines import LocalEngine
from ernie_accel.demo.captions import caption
from ernie_accel.demo.scenes import random_scene

GUIDANCE_SCALE = 1.0


def make_rows(count: int, size: int, steps: int) -> list[Row]:
    """Return rows with captions of random scenes."""
    rng = random.Random(0)
    return [
        Row(
            line=i + 2,
            index=i,
            prompt=caption(random_scene(rng), rng, "en"),
            file_name=f"{i:05d}.png",
            width=size,
            height=size,
            steps=steps,
            guidance_scale=GUIDANCE_SCALE,
        )
        for i in range(count)
    ]


def loop(pipe: Any, rows: list[Row], out: Path) -> float:
    """Make the rows one by one, as guides show, and return the seconds."""
    start = time.perf_counter()
    for row in rows:
        picture = pipe(
            row.prompt,
            width=row.width,
            height=row.height,
            num_inference_steps=row.steps,
            guidance_scale=row.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(row.index),
        ).images[0]
        picture.save(out / row.file_name)
    return time.perf_counter() - start


class Timed(LocalEngine):
    """Notes when the pipe was at work, so that the time in which it was not can be told."""

    def __init__(self, pipe: Any, max_batch: int | None) -> None:
        super().__init__(pipe, max_batch=max_batch)
        self.spans: list[tuple[float, float, int]] = []

    def _timed(self, call: Any, requests: Any, *rest: Any) -> Any:
        start = time.perf_counter()
        result = call(requests, *rest)
        self.spans.append((start, time.perf_counter(), len(requests)))
        return result

    def render(self, requests: Any, timeout_s: float | None = None) -> Any:
        """Render, and note when."""
        return self._timed(super().render, requests, timeout_s)

    def prepare(self, requests: Any) -> Any:
        """Prepare, and note when."""
        return self._timed(super().prepare, requests)

    def idle(self) -> float:
        """Return the part of the time, from the first call to the end of the last, outside all calls."""
        whole = self.spans[-1][1] - self.spans[0][0]
        return 1 - sum(end - start for start, end, _ in self.spans) / whole


def batch(pipe: Any, rows: list[Row], out: Path, batch_size: int | None) -> tuple[float, float, list[int]]:
    """Make the rows with `produce`; return the seconds, the idle part of the engine's time and the batch sizes."""
    engine = Timed(pipe, batch_size)
    start = time.perf_counter()
    results = list(produce(engine, rows, out, batch_size=batch_size, progress=False))
    seconds = time.perf_counter() - start
    assert all(result.error is None for result in results), [result.error for result in results]
    sizes = [count for _, _, count in engine.spans]
    engine.close()
    return seconds, engine.idle(), sizes


def psnr_db(one: Path, other: Path) -> float:
    """Return the PSNR of two pictures of 8 bits."""
    a, b = (np.asarray(Image.open(path), dtype=np.float64) for path in (one, other))
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def full_size_pipe(device: str) -> Any:
    """Return an ERNIE-Image pipeline of full size, with random weights and without prompt enhancer."""
    from diffusers import (
        AutoencoderKLFlux2,
        ErnieImagePipeline,
        ErnieImageTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Mistral3Config, Mistral3Model

    text = {
        "model_type": "ministral3",
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    }
    vision = {"model_type": "pixtral", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = ErnieImageTransformer2DModel(
            hidden_size=4096,
            num_attention_heads=32,
            num_layers=36,
            ffn_hidden_size=12288,
            in_channels=128,
            out_channels=128,
            patch_size=1,
            text_in_dim=3072,
            rope_axes_dim=(32, 48, 48),
        )
        vae = AutoencoderKLFlux2()
        encoder = Mistral3Model(Mistral3Config(text_config=text, vision_config=vision))
    torch.set_default_dtype(torch.float32)
    for part in (transformer, vae, encoder):
        part.to(torch.bfloat16).eval().requires_grad_(False)
    return ErnieImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=ernie_accel.demo.load(prompt_enhancer=False).tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--batch-size", type=int, help="default: found by trying, within each round anew")
    parser.add_argument("--preset", help="optimize the pipe of the batch")
    parser.add_argument("--no-enhancer", action="store_true", help="leave the prompt enhancer out of both")
    parser.add_argument("--full-size", action="store_true", help="the 8B model with random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    if options.full_size:
        pipe = full_size_pipe(options.device)
    else:
        pipe = ernie_accel.demo.load(prompt_enhancer=not options.no_enhancer).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    rows = make_rows(options.rows, options.size, options.steps)
    loops, batches, idles, sizes = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds + 1):
            one, many = Path(folder, f"loop-{turn}"), Path(folder, f"batch-{turn}")
            one.mkdir()
            loop_s = loop(pipe, rows if turn else rows[:2], one)
            if options.preset:
                ernie_accel.optimize(pipe, preset=options.preset)
            batch_s, idle, sizes = batch(pipe, rows, many, options.batch_size)
            if options.preset:
                ernie_accel.restore(pipe)
            if turn:
                loops.append(loop_s)
                batches.append(batch_s)
                idles.append(idle)
        same = [psnr_db(one / row.file_name, many / row.file_name) for row in rows]
    figures = {
        "command": " ".join(f"{name}={value}" for name, value in vars(options).items()),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "loop_pictures_per_min": round(60 * len(rows) / statistics.median(loops), 1),
        "batch_pictures_per_min": round(60 * len(rows) / statistics.median(batches), 1),
        "ratio": round(statistics.median(loops) / statistics.median(batches), 2),
        "ratios_by_round": [round(a / b, 2) for a, b in zip(loops, batches, strict=True)],
        "engine_idle": round(statistics.median(idles), 4),
        "calls_of_last_round": sizes,
        "psnr_db_min_median": [round(min(same), 1), round(statistics.median(same), 1)],
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
