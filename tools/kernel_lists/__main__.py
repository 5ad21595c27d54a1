"""Draw a picture of each family on its fused kernels and write down what was launched; needs a Hopper GPU and cuDNN.

``python -m tools.kernel_lists [FAMILY ...]``, after kernels were added or removed, or their parameters, block sizes or
warps changed. `ernie_accel.kernels.ahead` reads the lists. Pipes have the published configurations, random weights,
and two layers: the kernels of one layer are those of all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ernie_accel
from ernie_accel.kernels.ahead import Launched
from tools.kernel_lists.recording import Recorder, set_of, write_list

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from ladder_families import draws
from random_pipeline import prompt_of, random_family_pipeline, random_pipeline

LAYERS, PIXELS, TOKENS = 2, 1024, 128


def ernie_image(size: str, px: int, device: str) -> tuple[Any, Callable[[], object]]:
    """Return a pipe, and what draws a picture with it, encoding the prompt."""
    pipe = random_pipeline(size, device, torch.bfloat16)
    call = {"height": px, "width": px, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    return pipe, partial(pipe, prompt_of(TOKENS), use_pe=False, **call)


def without_text_encoder(family: str, size: str, px: int, device: str) -> tuple[Any, Callable[[], object]]:
    """Return a pipe without text encoder, and what draws a picture with it from random embeddings."""
    pipe = random_family_pipeline(family, size, device, torch.bfloat16)
    latents = draws(family, pipe, px, TOKENS)
    assert isinstance(latents, partial)
    return pipe, partial(pipe, **{**latents.keywords, "num_inference_steps": 2, "output_type": "pt"})


#: Name of the family -> (the mode of its presets, what makes a pipe of a size).
FAMILIES: dict[str, tuple[str, Callable[[str, int, str], tuple[Any, Callable[[], object]]]]] = {
    "ERNIE-Image": ("turbo", ernie_image),
    "Z-Image": ("turbo", partial(without_text_encoder, "z-image")),
    "NewBie-image": ("quality", partial(without_text_encoder, "newbie")),
}


def record(family: str, size: str = "full", px: int = PIXELS, device: str = "cuda") -> dict[str, list[Launched]]:
    """Return what a family launches, by precision; `size` is "full" or "tiny", `px` the pixels of a side."""
    mode, make = FAMILIES[family]
    found = {}
    for precision in ("bf16", "fp8"):
        pipe, draw = make(size, px, device)
        del pipe.transformer.layers[LAYERS:]
        with Recorder() as recorder:
            ernie_accel.optimize(pipe, preset=f"{mode}-{precision}", memory=None)
            draw()
        found[precision] = recorder.found
        del pipe, draw
    return found


def main() -> None:
    """Record and write the lists, and print how many kernels each has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {list(FAMILIES)}; default: all")
    families = parser.parse_args().families or list(FAMILIES)
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    for family in families:
        found = record(family)
        counts = ", ".join(f"{precision} {len(set_of(of))}" for precision, of in found.items())
        print(f"{write_list(family, found)}: {counts}")


if __name__ == "__main__":
    main()
