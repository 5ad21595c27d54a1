"""Claim: of the remedies for a grid, a second pass by a model without one removes it; the others are measured too.

    python benchmarks/grid_remedies.py --out benchmarks/results/grid_remedies_cpu_202611.json    # a few minutes
    python benchmarks/grid_remedies.py --pictures 2                                              # to see that it runs

The embedded model draws no grid. So a checkpoint that does is made of it: its last layer gets a random bias, the same
at every patch. What the remedies do to this grid is no measure of what they do to that of ERNIE-Image-Turbo; it shows
which of them can act on a grid that comes from the weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

import ernie_accel
from ernie_accel.demo.judge import judge, summarize, unseen_prompts
from ernie_accel.fidelity import VISIBLE, grid_score

SIZE = 128
BIAS = 2.5
"""Standard deviation of the bias, which makes a grid that is clearly visible."""
SUFFIX = ", subtle film grain"


def main() -> None:
    """Draw with the checkpoint that has a grid, with each remedy, and print and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    base, gridded = pipe_of(0.0), pipe_of(BIAS)
    found = [
        (text, scene)
        for text, scene in unseen_prompts(16 * options.pictures + 40)
        if not scene.background.texture and scene.height == scene.width == SIZE
    ][: options.pictures]
    texts, scenes = [text for text, _ in found], [scene for _, scene in found]
    short = [f"a {each.colour} {each.shape} on a white background" for each in (scene.objects[0] for scene in scenes)]

    def row(images: list[Image.Image], judged: bool = True) -> dict[str, Any]:
        scores = [grid_score(image) for image in images]
        figures = {"score": round(median(scores), 2), "grids": sum(score > VISIBLE for score in scores)}
        if judged:
            pixels = [torch.from_numpy(_pixels(image)) for image in images]
            figures["objects right"] = round(summarize(judge(pixels, scenes), scenes).object_fraction, 3)
        return figures

    first = draw(gridded, texts)
    call = {"num_inference_steps": 20, "strength": 0.3, "use_pe": False}
    rows: dict[str, dict[str, Any]] = {"the base model, without a grid": row(draw(base, texts))}
    rows["the checkpoint with a grid"] = row(first)
    for guidance in (2.0, 4.0):
        rows[f"... at guidance {guidance:g} instead of 1"] = row(draw(gridded, texts, guidance_scale=guidance))
    rows['... with ", subtle film grain"'] = row(draw(gridded, [text + SUFFIX for text in texts]))
    rows["... short prompts"] = row(draw(gridded, short), judged=False)
    rows["... short prompts, enhanced"] = row(draw(gridded, short, use_pe=True), judged=False)
    for name, pipe, guidance in (("itself", gridded, 1.0), ("the base model", base, 2.0)):
        generators = seeds(len(texts))
        again = ernie_accel.image_to_image(
            pipe, first, texts, guidance_scale=guidance, generator=generators, **call
        ).images
        rows[f"... refined by {name}"] = row(again)
    print(table(rows, options.pictures))
    if options.out is not None:
        record = {
            "command": f"python benchmarks/grid_remedies.py --pictures {options.pictures}",
            "versions": {name: version(name) for name in ("torch", "diffusers")},
            "pictures": options.pictures,
            "bias": BIAS,
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def pipe_of(bias: float) -> Any:
    """Return the embedded model with a random bias of this standard deviation in its last layer."""
    pipe = ernie_accel.demo.load()
    pipe.set_progress_bar_config(disable=True)
    last = pipe.transformer.final_linear.bias
    with torch.no_grad():
        last += bias * torch.randn(last.shape, generator=torch.Generator().manual_seed(0))
    return pipe


def draw(pipe: Any, texts: list[str], **call: Any) -> list[Image.Image]:
    """Return a picture of each text, always from the same noise."""
    given = {"num_inference_steps": 8, "guidance_scale": 1.0, "use_pe": False, "height": SIZE, "width": SIZE} | call
    torch.manual_seed(0)  # of the enhancer's words
    images: list[Image.Image] = pipe(texts, generator=seeds(len(texts)), **given).images
    return images


def seeds(count: int) -> list[torch.Generator]:
    """Return a generator for each picture."""
    return [torch.Generator().manual_seed(number) for number in range(count)]


def _pixels(image: Image.Image) -> Any:
    import numpy as np

    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255


def table(rows: Mapping[str, Mapping[str, Any]], pictures: int) -> str:
    """Return the figures for a terminal, and for the docs."""
    lines = [f"| {pictures} pictures by | median score | above {VISIBLE:g} | objects right |", "|---|---|---|---|"]
    for name, of in rows.items():
        right = f"{100 * of['objects right']:.1f} %" if "objects right" in of else ""
        lines.append(f"| {name} | {of['score']:.2f} | {of['grids']} | {right} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
