"""Show what the library does: the same prompts, stock and optimized, on one sheet, with the times of this very run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_accel.api import optimize, plan, report
from ernie_accel.core.plan import Plan
from ernie_accel.core.preset import Preset
from ernie_accel.core.report import Report
from ernie_accel.demo.sheet import Column, contact_sheet
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


@dataclass(frozen=True)
class Showing:
    """What one run of the demo found.

    Attributes:
        sheet: The contact sheet, a PNG.
        plan: What was planned.
        report: What was applied.
        stock_ms: Milliseconds of each picture, stock, after a warm-up picture.
        optimized_ms: The same, optimized; the two were rendered in turn.
        first_call_s: Seconds of the optimized pipe's first picture, compilation included.
    """

    sheet: Path
    plan: Plan
    report: Report
    stock_ms: tuple[float, ...]
    optimized_ms: tuple[float, ...]
    first_call_s: float

    @property
    def ratios(self) -> tuple[float, ...]:
        """Stock over optimized time of each pair of pictures, rendered one right after the other."""
        return tuple(stock / fast for stock, fast in zip(self.stock_ms, self.optimized_ms, strict=True))

    @property
    def ratio(self) -> float:
        """Speed relative to stock: the median over the pairs."""
        return statistics.median(self.ratios)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile over the pairs: if 1 lies between them, nothing can be said."""
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high


def show(sheet: Path, preset: Preset | str, device: str = "cpu", rounds: int = 2) -> Showing:
    """Render `PROMPTS` with the stock embedded model and with an optimized one, in turn, and write a contact sheet.

    Both run `STEPS` steps at the same guidance, and stock runs in the dtype that people load (bfloat16 on an
    accelerator), so that the ratio compares implementations and not settings.

    Args:
        sheet: Where the PNG goes.
        preset: What to apply; transforms that cannot run here are skipped and named in the report.
        device: torch device to run on.
        rounds: How often each prompt is rendered by each pipe.
    """
    stock, fast = (load_pipeline(device=device) for _ in range(2))
    for pipe in (stock, fast):
        pipe.set_progress_bar_config(disable=True)
    the_plan = plan(fast, preset=preset)
    optimize(fast, preset=preset, on_unsupported="skip")

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
    labels = [f"{name}\n{statistics.median(ms):.0f} ms" for name, ms in (("stock", stock_ms), ("optimized", fast_ms))]
    contact_sheet(columns, sheet, rows=labels)
    return Showing(sheet, the_plan, report(fast), tuple(stock_ms), tuple(fast_ms), first_call_s)


def _render(pipe: Any, prompt: str, seed: int) -> tuple[Image, float]:
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
