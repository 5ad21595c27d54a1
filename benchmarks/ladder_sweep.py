"""Batches and sizes of pictures: what a rung gains beside one square picture, and what it compiles anew."""

from __future__ import annotations

from typing import Any

import torch
from ladder_measures import Job, inputs_for, milliseconds, peak_gb, reset_peak
from ladder_rungs import RUNGS

#: Rungs that are swept.
SWEPT = ("stock", "stock+compile", "turbo-bf16", "turbo-fp8")
#: (width, height, batch). "full" has the family's recommended shapes at batch 1 (turned on their side they cost alike).
CELLS = {
    "full": (
        *((256, 256, batch) for batch in (1, 2, 4, 8)),
        *((512, 512, batch) for batch in (1, 2, 4, 8)),
        (768, 768, 1),
        *((1024, 1024, batch) for batch in (1, 2, 4)),
        *((848, 1264, 1), (1200, 896, 1), (768, 1376, 1)),
    ),
    "tiny": ((64, 64, 1), (64, 64, 2), (96, 64, 1)),
}
#: Prompt lengths in tokens, and batches, that must not compile anew.
LENGTHS = {"full": (1, 2, 3, 17, 64, 77, 200, 333, 512), "tiny": (1, 2, 17)}
BATCHES = {"full": (3, 5, 6, 7, 8), "tiny": (3,)}


@torch.no_grad()
def sweep_rung(rung: str, job: Job) -> dict[str, Any]:
    """Measure one rung at all batches and sizes in this process."""
    pipe = job.pipeline()
    what, change = RUNGS[rung]
    change(pipe, str(job.cache))
    cells = [_cell(pipe, *cell) for cell in CELLS[job.size]]
    small = min(job.pixels)
    before = _graphs()
    for tokens in LENGTHS[job.size]:
        pipe.transformer(**inputs_for(pipe, small, tokens=tokens))
    after_lengths = _graphs()
    for batch in BATCHES[job.size]:
        pipe.transformer(**inputs_for(pipe, small, batch=batch))
    return {
        "what": what,
        "cells": cells,
        "graphs": before,
        "graphs_for_prompt_lengths": after_lengths - before,
        "graphs_for_batches": _graphs() - after_lengths,
    }


def _cell(pipe: Any, width: int, height: int, batch: int) -> dict[str, Any]:
    cell: dict[str, Any] = {"width": width, "height": height, "batch": batch}
    arguments = inputs_for(pipe, width, height, batch=batch)
    try:
        for _ in range(3):
            pipe.transformer(**arguments)
        reset_peak()
        once = milliseconds(lambda: pipe.transformer(**arguments), 1)
        ms = milliseconds(lambda: pipe.transformer(**arguments), max(6, min(30, int(2000 / once))))
    except torch.OutOfMemoryError as error:
        return cell | {"error": f"OutOfMemoryError: {str(error).splitlines()[0]}"}
    return cell | {"ms": ms, "ms_per_image": ms / batch, "peak_gb": peak_gb()}


def _graphs() -> int:
    """Return how many graphs were compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
