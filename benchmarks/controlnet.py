"""Question: what does a step of Z-Image with a ControlNet take, which diffusers computes beside the transformer?

On a GPU: ``python benchmarks/controlnet.py --out benchmarks/results/controlnet_NAME``; it takes two minutes. On a CPU
``--tiny`` runs the same code; its times say nothing. Writes OUT.json and OUT.md.

Sizes are those of Z-Image-Turbo, and of a ControlNet with 6 blocks and 2 in its refiner; weights are random, in
bfloat16, prompts have 128 tokens. A step is a call of the ControlNet and one of the transformer. Times are medians of
steps one by one, after four that compile and capture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ladder_measures import CUDA, record_of, seconds
from random_pipeline import random_family_pipeline

import ernie_accel
from ernie_accel import CaptureGraphs, Compile, Context, FuseKernels, RewriteBlocks, Transform

RUNGS: dict[str, tuple[Transform, ...]] = {
    "diffusers as it is": (),
    "blocks of the transformer compiled": (Compile(),),
    "fused kernels in fp8": (RewriteBlocks(), FuseKernels("fp8")),
    "and graphs, as in `turbo-fp8`": (RewriteBlocks(), FuseKernels("fp8"), CaptureGraphs()),
}
#: Without kernels, for a CPU.
TINY_RUNGS: dict[str, tuple[Transform, ...]] = {"diffusers as it is": (), "rewritten": (RewriteBlocks(),)}
TOKENS, CHANNELS = 128, 33


def main() -> None:
    """Measure every rung at both sizes, and write the table."""
    arguments = parse()
    size, device = ("tiny", "cpu") if arguments.tiny else ("full", "cuda")
    context = Context.detect(device=device)
    pipe = controlled(size, device)
    sides = {512: 64, 1024: 128} if size == "full" else {64: 8, 128: 16}
    rows: list[dict[str, Any]] = []
    for name, transforms in (TINY_RUNGS if arguments.tiny else RUNGS).items():
        if transforms:
            ernie_accel.optimize(pipe, *transforms)
        steps = {px: step(pipe, side, device) for px, side in sides.items()}
        rows.append({"rung": name} | {f"ms_{px}": median_ms(each, 12 if CUDA else 1) for px, each in steps.items()})
        print(rows[-1], flush=True)
        ernie_accel.restore(pipe)
    write({**record_of("controlnet", context), "rows": rows}, arguments.out)


def controlled(size: str, device: str) -> Any:
    """Return a Z-Image pipeline with a ControlNet, which shares the transformer's refiners."""
    import diffusers

    plain = random_family_pipeline("z-image", size, device, torch.bfloat16)
    config = plain.transformer.config
    with torch.device(device):
        net = diffusers.ZImageControlNetModel(
            control_layers_places=[0, 5, 10, 15, 20, 25] if size == "full" else [0, 1],
            control_refiner_layers_places=[0, 1] if size == "full" else [0],
            control_in_dim=CHANNELS,
            **{name: config[name] for name in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")},
        )
    generator = torch.Generator(device).manual_seed(2)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02, generator=generator)
    net = net.to(device, torch.bfloat16).eval().requires_grad_(False)
    return diffusers.ZImageControlNetPipeline(**plain.components, controlnet=net)


def step(pipe: Any, side: int, device: str) -> Callable[[], object]:
    """Return one step for latents of `side` x `side`."""
    generator = torch.Generator(device).manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    config = pipe.transformer.config
    x, caption = [rand(config["in_channels"], 1, side, side)], [rand(TOKENS, config["cap_feat_dim"])]
    control, moment = [rand(CHANNELS, 1, side, side)], torch.full((1,), 0.4, device=device, dtype=torch.bfloat16)

    @torch.no_grad()
    def run() -> object:
        samples = pipe.controlnet(x, moment, caption, control, conditioning_scale=0.8)
        return pipe.transformer(x, moment, caption, controlnet_block_samples=samples, return_dict=False)

    return run


def median_ms(run: Callable[[], object], count: int) -> float:
    """Return the median time of a step in ms, after four."""
    for _ in range(4):
        run()
    return 1e3 * statistics.median(seconds(run) for _ in range(count))


def write(result: dict[str, Any], out: Path) -> None:
    """Write OUT.json and OUT.md."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    columns = [name for name in result["rows"][0] if name != "rung"]
    lines = [f"# Z-Image with a ControlNet on {result['device']}", "", f"`{result['command']}`", ""]
    lines += [f"python {result['python']}, {versions}; commit {result['commit'] or 'unknown'}.", ""]
    lines += [f"| | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    lines += [f"| {row['rung']} | {' | '.join(f'{row[name]:.1f}' for name in columns)} |" for row in result["rows"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU; times say nothing")
    parser.add_argument("--out", type=Path, required=True, help="without the suffix")
    return parser.parse_args()


if __name__ == "__main__":
    main()
