"""Claim: `fidelity.grid_score` finds a visible grid with an AUC of at least 0.98, whatever it is on and however the
picture is saved, and at most 1 % of clean pictures count as gridded.

    python benchmarks/grid_score.py --out benchmarks/results/grid_score_cpu_202611.json    # ten minutes
    python benchmarks/grid_score.py --pictures 8                                           # a minute, and less sure

Clean pictures are flat colours with a slope and sensor noise, textures and photographs (of scikit-image, in random
crops), and what the embedded model draws on plain and graded backgrounds. Each is looked at as it is, as JPEG of
quality 95, 85 and 75, and resized to 75 % and 150 %. The grids repeat every 8 or 16 px: lines, waves, cells or random
tiles, stronger in some parts of a picture than in others.

The detector's constants were chosen on one half of the pictures (`--half choose`); what is reported is the other half,
of which no photograph, texture or prompt is in the first. There is one threshold for all.

A grid is called visible from a root mean square of 1.5 grey levels on, and 0.25 more for every grey level that the
picture itself varies by within 16 px: texture masks patterns (Legge and Foley 1980).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import skimage.data
import torch
from PIL import Image

import ernie_accel
from ernie_accel.demo.judge import unseen_prompts
from ernie_accel.fidelity import VISIBLE, grid_score

PHOTOGRAPHS = {
    "choose": ("astronaut", "chelsea", "coins", "moon", "rocket"),
    "report": (
        "camera", "cat", "cell", "clock", "coffee", "hubble_deep_field", "immunohistochemistry", "page", "retina",
        "stereo_motorcycle", "text"
    ),
}  # fmt: skip
TEXTURES = {"choose": ("brick",), "report": ("grass", "gravel")}
HALVES = tuple(TEXTURES)
KINDS = ("lines", "waves", "cells", "tiles")
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
Pixels = np.ndarray[Any, Any]


def main() -> None:
    """Score clean and gridded pictures, print what that finds, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100, help="of each kind of background")
    parser.add_argument("--half", choices=HALVES, default="report", help="which half of the pictures to look at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write; a plot goes beside it")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    backgrounds = {
        "flat": [flat(rng) for _ in range(options.pictures)],
        "textures": crops(TEXTURES[options.half], options.pictures, rng),
        "photographs": crops(PHOTOGRAPHS[options.half], options.pictures, rng),
        "embedded model": drawn(options.pictures, options.half),
    }
    clean: dict[str, dict[str, list[float]]] = {}
    gridded: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, pictures in backgrounds.items():
        clean[name] = {way: scores(pictures, change) for way, change in WAYS.items()}
        gridded[name] = {}
        for strength in STRENGTHS:
            with_grid = [add_grid(each, strength * visible(each), rng) for each in pictures]
            gridded[name][f"{strength:g}"] = {way: scores(with_grid, change) for way, change in WAYS.items()}
        print(f"{name}: done", flush=True)
    figures = summary(clean, gridded)
    print(table(figures))
    if options.out is not None:
        record = {
            "command": f"python benchmarks/grid_score.py --pictures {options.pictures} --seed {options.seed}",
            "half": options.half,
            "versions": {"numpy": np.__version__, "scikit-image": skimage.__version__},
            "threshold": VISIBLE,
            **figures,
            "drawn at 16 px": patterned(options.pictures, options.half),
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            print("no plot: matplotlib is not installed", file=sys.stderr)
            return
        plot(clean, gridded, options.out.with_suffix(".png"))


def as_it_is(pixels: Pixels) -> float:
    """Score a picture."""
    return grid_score(pixels)


def as_jpeg(quality: int) -> Callable[[Pixels], float]:
    """Score a picture after it was a JPEG."""

    def score(pixels: Pixels) -> float:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return grid_score(Image.open(file))

    return score


def resized(scale: float) -> Callable[[Pixels], float]:
    """Score a picture that was resized, with the scale known."""

    def score(pixels: Pixels) -> float:
        height, width = (round(side * scale) for side in pixels.shape[:2])
        return grid_score(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS), scale=scale)

    return score


WAYS: Mapping[str, Callable[[Pixels], float]] = {
    "as it is": as_it_is,
    "JPEG 95": as_jpeg(95),
    "JPEG 85": as_jpeg(85),
    "JPEG 75": as_jpeg(75),
    "resized to 75 %": resized(0.75),
    "resized to 150 %": resized(1.5),
}


def scores(pictures: list[Pixels], change: Callable[[Pixels], float]) -> list[float]:
    """Return the score of each picture."""
    return [round(change(each), 4) for each in pictures]


def flat(rng: np.random.Generator) -> Pixels:
    """Return one colour with a slope and a sensor's noise."""
    size = int(rng.choice([128, 256, 384, 512]))
    slope_x, slope_y = rng.uniform(-30, 30, 2)
    steps = np.linspace(-0.5, 0.5, size)
    pixels = rng.uniform(30, 225, 3) + (slope_x * steps[None, :] + slope_y * steps[:, None])[..., None]
    return to_bytes(pixels + rng.normal(0, 8 * rng.uniform() ** 2, (size, size, 1)))


def crops(names: tuple[str, ...], count: int, rng: np.random.Generator) -> list[Pixels]:
    """Return random crops of scikit-image's pictures, in turns."""
    found = []
    for number in range(count):
        whole = getattr(skimage.data, names[number % len(names)])()
        whole = np.asarray(Image.fromarray(whole[0] if isinstance(whole, tuple) else whole).convert("RGB"))
        side = min(int(rng.choice([256, 384, 512])), *whole.shape[:2])
        top, left = (int(rng.integers(0, length - side + 1)) for length in whole.shape[:2])
        found.append(whole[top : top + side, left : left + side])
    return found


def drawn(count: int, half: str, textured: bool = False) -> list[Pixels]:
    """Return what the embedded model draws: on plain and graded backgrounds, or on textures of a 16 px period."""
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    several = unseen_prompts(16 * count + 80)
    wanted = [pair for pair in several if bool(pair[1].background.texture) == textured]
    found = []
    for number in range(HALVES.index(half), 2 * count, len(HALVES)):
        prompt, scene = wanted[number]
        image = pipe(
            prompt,
            height=scene.height,
            width=scene.width,
            num_inference_steps=8,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(number),
            use_pe=False,
        ).images[0]
        found.append(np.asarray(image))
    return found


def visible(pixels: Pixels) -> float:
    """Return the root mean square from which a grid on a picture is called visible, in grey levels."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float64)
    height, width = (side // 16 for side in grey.shape)
    cells = grey[: height * 16, : width * 16].reshape(height, 16, width, 16)
    return 1.5 + 0.25 * float(np.median(cells.std((1, 3))))


def add_grid(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return a picture with a grid of `strength` grey levels, root mean square."""
    height, width = pixels.shape[:2]
    period = int(rng.choice([8, 16]))
    down, across = np.indices((height, width)) + rng.integers(0, period, 2)[:, None, None]
    pattern = tile(str(rng.choice(KINDS)), period, rng)[down % period, across % period]
    uneven = Image.fromarray(rng.uniform(0.2, 1, (4, 4)).astype(np.float32)).resize((width, height))
    pattern = pattern * np.asarray(uneven)
    return to_bytes(pixels + (pattern * strength / np.sqrt((pattern**2).mean()))[..., None])


def tile(kind: str, period: int, rng: np.random.Generator) -> Pixels:
    """Return one period of a grid, of mean 0."""
    down, across = np.indices((period, period))
    if kind == "lines":
        pattern = -((down == 0) | (across == 0)).astype(float)
    elif kind == "waves":
        pattern = np.sin(2 * np.pi * down / period) + np.sin(2 * np.pi * across / period)
    elif kind == "cells":
        pattern = np.where((down < period // 2) ^ (across < period // 2), 1.0, -1.0)
    else:
        steps = np.minimum(np.arange(period), period - np.arange(period))
        smooth = 1 / (1 + steps[:, None] ** 2 + steps[None] ** 2)
        pattern = np.fft.ifft2(np.fft.fft2(rng.normal(size=(period, period))) * smooth).real
    return pattern - pattern.mean()


def to_bytes(pixels: Pixels) -> Pixels:
    """Return values as bytes."""
    return pixels.clip(0, 255).round().astype(np.uint8)


def auc(clean: list[float], gridded: list[float]) -> float:
    """Return how often a gridded picture scores above a clean one; ties count half."""
    ranks = np.sort(clean)
    below = np.searchsorted(ranks, gridded, "left") + np.searchsorted(ranks, gridded, "right")
    return float(below.mean() / 2 / len(ranks))


def summary(clean: Mapping[str, Any], gridded: Mapping[str, Any]) -> dict[str, Any]:
    """Return false alarms, and AUC and what is found by background and strength; of all ways of saving together."""
    everything = [score for of in clean.values() for some in of.values() for score in some]
    found: dict[str, Any] = {"pictures": len(everything), "false alarms": share(everything), "backgrounds": {}}
    found["highest clean"] = max(everything)
    found["false alarms by way"] = {way: share([s for of in clean.values() for s in of[way]]) for way in WAYS}
    for name, of in clean.items():
        plain = [score for some in of.values() for score in some]
        rows = {}
        for strength, ways in gridded[name].items():
            marked = [score for some in ways.values() for score in some]
            rows[strength] = {
                "auc": round(auc(plain, marked), 4),
                "found": share(marked),
                "auc by way": {way: round(auc(of[way], ways[way]), 4) for way in WAYS},
            }
        found["backgrounds"][name] = {"false alarms": share(plain), "highest clean": max(plain), "strengths": rows}
    marked_of = {
        strength: [score for of in gridded.values() for some in of[strength].values() for score in some]
        for strength in next(iter(gridded.values()))
    }
    found["all"] = {s: {"auc": round(auc(everything, m), 4), "found": share(m)} for s, m in marked_of.items()}
    return found


def share(scored: list[float]) -> float:
    """Return the share of pictures above the threshold."""
    return round(float((np.array(scored) > VISIBLE).mean()), 4)


def patterned(count: int, half: str) -> dict[str, Any]:
    """Return how pictures score whose background was asked for with a pattern of 16 px."""
    found = [grid_score(each) for each in drawn(count, half, textured=True)]
    return {"pictures": len(found), "above the threshold": share(found), "median": round(float(np.median(found)), 2)}


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures for a terminal, and for the docs."""
    strengths = list(figures["all"])
    head = " | ".join(f"{strength} x visible" for strength in strengths)
    lines = [f"| background | false alarms | {head} |", "|---|---|" + "---|" * len(strengths)]
    rows = {name: (of["false alarms"], of["strengths"]) for name, of in figures["backgrounds"].items()}
    rows["all"] = figures["false alarms"], figures["all"]
    for name, (alarms, by_strength) in rows.items():
        cells = " | ".join(f"{each['auc']:.3f}, {each['found']:.0%}" for each in by_strength.values())
        lines.append(f"| {name} | {alarms:.1%} | {cells} |")
    return "\n".join(lines)


def plot(clean: Mapping[str, Any], gridded: Mapping[str, Any], path: Path) -> None:
    """Draw ROC curves of each background by strength, and the scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(clean), 6.6), layout="constrained")
    panels = figure.subplots(2, len(clean))
    colours = dict(zip(next(iter(gridded.values())), ("#9ecae1", "#4292c6", "#08519c", "#08203f"), strict=True))
    for (name, of), roc, levels in zip(clean.items(), panels[0], panels[1], strict=True):
        plain = np.array([score for some in of.values() for score in some])
        shown = [plain]
        for strength, ways in gridded[name].items():
            marked = np.array([score for some in ways.values() for score in some])
            shown.append(marked)
            cuts = np.concatenate([[np.inf], np.unique(np.concatenate([plain, marked]))[::-1], [-1.0]])
            alarms = [(plain > cut).mean() for cut in cuts]
            roc.plot(alarms, [(marked > cut).mean() for cut in cuts], color=colours[strength], label=f"{strength} x")
        roc.set(title=name, xlabel="false alarms", xlim=(-0.002, 0.1), ylim=(0, 1.02))
        roc.grid(alpha=0.3)
        levels.boxplot(shown, whis=(1, 99), showfliers=False, medianprops={"color": "#08519c"})
        levels.axhline(VISIBLE, color="#c0392b", linewidth=1)
        levels.set_yscale("symlog", linthresh=0.5)
        levels.set_ylim(-0.05, 30)
        levels.set_yticks([0, 0.5, 1, 2, 5, 10, 20], ["0", "0.5", "1", "2", "5", "10", "20"])
        levels.set_xticks(range(1, len(shown) + 1), ["clean", *(f"{strength} x" for strength in gridded[name])])
        levels.grid(alpha=0.3, axis="y")
    panels[0][0].set_ylabel("grids found")
    panels[0][0].legend(title="of visible", loc="lower right")
    panels[1][0].set_ylabel("grid_score (median, quartiles, 1 to 99 %)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
