"""Show what the library does: the same prompts, stock and optimized, on one sheet, with the times of that run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_accel.api import optimize, plan, report
from ernie_accel.common.contact_sheet import Column, contact_sheet
from ernie_accel.common.language import said
from ernie_accel.core.components import CallablePipeline
from ernie_accel.core.plan import Plan
from ernie_accel.core.preset import Preset
from ernie_accel.core.report import Report
from ernie_accel.core.timing import Race
from ernie_accel.core.transform import Transform
from ernie_accel.storage.loading import load_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = (
    "a large red circle in the center on a striped cream background",
    "a small blue square in the top left and a large yellow ring in the bottom right on a grey background",
    "a large green triangle on the left and a small purple cross on the right on a pale blue background",
    "a large orange ring in the top right, a small black circle in the bottom left on a pale pink background",
)
STEPS = 8
GUIDANCE_SCALE = 1.0


#: How many times as fast a dtype of half the bytes must be to be worth its rounding.
WORTH_IT = 1.1


@dataclass(frozen=True)
class DemoRun:
    """What one run of the demo found.

    Attributes:
        sheet: The contact sheet, a PNG.
        plan: What was planned.
        report: What was applied.
        times: Stock against optimized, after a warm-up picture of each.
        first_call_s: Seconds of the optimized pipe's first picture, compilation included.
    """

    sheet: Path
    plan: Plan
    report: Report
    times: Race
    first_call_s: float


def race_dtypes(rounds: int = 3) -> Race:
    """Time the stock embedded model on the CPU in float32 and in bfloat16, in turn; it takes a few seconds.

    Which one is faster depends on the CPU's bfloat16 units, and on how torch uses them; no list of CPUs says it.
    """
    pipes = [_quiet(load_pipeline(dtype=dtype, device="cpu")) for dtype in ("float32", "bfloat16")]
    for pipe in pipes:
        _render(pipe, PROMPTS[0], 0)
    times = [[_render(pipe, PROMPTS[0], 0)[1] for pipe in pipes] for _ in range(rounds)]
    return Race(*map(tuple, zip(*times, strict=True)))


def bfloat16_pays(race: Race) -> bool:
    """Return whether bfloat16, the second of the race, is clearly faster, and by enough."""
    return not race.too_busy and race.quartiles[0] > 1 and race.ratio > WORTH_IT


def describe_run(the_plan: Plan) -> str:
    """Return in words what really runs of a plan that skips what cannot."""
    if the_plan.ok:
        return the_plan.title
    names = ", ".join(map(repr, the_plan.problems))
    return said("{title} without {names}, which cannot run here", title=the_plan.title, names=names)


def show(
    sheet: Path,
    preset: Preset | str,
    *transforms: Transform,
    device: str = "cpu",
    rounds: int = 2,
    announce: Callable[[str], None] = lambda _: None,
) -> DemoRun:
    """Render `PROMPTS` with the stock embedded model and with an optimized one, in turn, and write a contact sheet.

    Both run `STEPS` steps at the same guidance, and stock runs in the dtype that people load (bfloat16 on an
    accelerator), so that the ratio compares implementations and not settings.

    Args:
        sheet: Where the PNG goes.
        preset: What to apply; transforms that cannot run here are skipped and named.
        *transforms: What to apply beside the preset.
        device: torch device to run on.
        rounds: How often each prompt is rendered by each pipe.
        announce: Called with a description of what will run, before it runs.
    """
    stock, fast = (_quiet(load_pipeline(device=device)) for _ in range(2))
    the_plan = plan(fast, *transforms, preset=preset)
    announce(describe_run(the_plan))
    optimize(fast, *transforms, preset=preset, on_unsupported="skip")

    _render(stock, PROMPTS[0], 0)
    first_call_s = _render(fast, PROMPTS[0], 0)[1] / 1e3
    stock_ms: list[float] = []
    fast_ms: list[float] = []
    columns: list[Column] = []
    for _ in range(rounds):
        columns.clear()
        for seed, prompt in enumerate(PROMPTS):
            stock_image, ms = _render(stock, prompt, seed)
            stock_ms.append(ms)
            fast_image, ms = _render(fast, prompt, seed)
            fast_ms.append(ms)
            columns.append(Column(prompt, (stock_image, fast_image)))
    times = Race(tuple(stock_ms), tuple(fast_ms))
    contact_sheet(columns, sheet, rows=_labels(times))
    return DemoRun(sheet, the_plan, report(fast), times, first_call_s)


def _labels(times: Race) -> list[str]:
    """Return the labels of the rows: the same figures that the command prints."""
    ratio = "too busy to tell" if times.too_busy else f"{times.ratio:.2f} x"
    stock, fast = (f"{statistics.median(ms):.0f} ms" for ms in (times.first_ms, times.second_ms))
    return [f"stock\n{stock}", f"optimized\n{fast}\n{ratio}"]


def _quiet(pipe: CallablePipeline) -> CallablePipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _render(pipe: CallablePipeline, prompt: str, seed: int) -> tuple[Image, float]:
    """Return a picture and its milliseconds."""
    import torch

    start = time.perf_counter()
    image = pipe(
        prompt,
        height=128,
        width=128,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        use_pe=False,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return image, (time.perf_counter() - start) * 1e3
