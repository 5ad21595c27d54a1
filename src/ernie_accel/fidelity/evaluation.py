"""What `evaluate` found: figures of each picture and in total, held against thresholds; as text, Markdown and JSON."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_accel.common.text import html_lines, html_table, human_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.timing import Race
from ernie_accel.fidelity.render import Rendering

if TYPE_CHECKING:
    import torch

_HEADER = ("#", "prompt", "seed", "NMSE", "PSNR dB", "SSIM", "latent SQNR dB", "baseline ms", "candidate ms")
#: A notebook shows as many pictures of each side, and no larger than that.
_SHOWN, _THUMBNAIL_PX = 6, 160


@dataclass(frozen=True)
class Thresholds:
    """What a candidate must keep; None: anything goes. Fidelity is held picture by picture, the worst one decides.

    Attributes:
        max_nmse: Highest normalised mean squared error of a picture; 0.01 is 20 dB.
        min_psnr_db: Lowest PSNR of a picture.
        min_ssim: Lowest SSIM of a picture.
        min_sqnr_db: Lowest signal-to-noise ratio of final latents.
        min_speedup: Lowest ratio of the median times of a picture, baseline over candidate.
        max_ms_per_step: Highest median time of a candidate's step.
        max_peak_bytes: Highest peak memory of the candidate.
    """

    max_nmse: float | None = None
    min_psnr_db: float | None = None
    min_ssim: float | None = None
    min_sqnr_db: float | None = None
    min_speedup: float | None = None
    max_ms_per_step: float | None = None
    max_peak_bytes: int | None = None


@dataclass(frozen=True)
class Side:
    """One of the two pipes that were compared.

    Attributes:
        name: "baseline" or "candidate".
        pipe: Class and dtypes of the pipe, in words.
        applied: Transforms in place, each with its effect.
        load_s: Seconds of the function that loaded it, with what it applied; None if it was passed loaded.
        optimize_s: Seconds to apply the transforms in place; None if there are none.
        first_picture_s: Seconds of the warm-up picture, compilation included; in no other figure.
        picture_ms: Median milliseconds of a picture: text encoding, steps, decoding.
        ms_per_step: Median milliseconds of a step.
        steps: Model evaluations of a picture.
        weight_bytes: Bytes of all weights.
        peak_bytes: Peak memory while drawing; None where it cannot be measured.
        peak_kind: What `peak_bytes` counts.
    """

    name: str
    pipe: str
    applied: tuple[str, ...]
    load_s: float | None
    optimize_s: float | None
    first_picture_s: float
    picture_ms: float
    ms_per_step: float
    steps: int
    weight_bytes: int
    peak_bytes: int | None
    peak_kind: str

    @property
    def steps_per_s(self) -> float:
        """Steps per second, from the median time of a step."""
        return 1e3 / self.ms_per_step


@dataclass(frozen=True)
class Fidelity:
    """How far a candidate is from the baseline.

    Attributes:
        nmse: Squared error of the picture over the baseline's energy.
        psnr_db: Of the picture, in [0, 1].
        ssim: Of the picture; NaN below 11x11 pixels.
        sqnr_db: Of the final latents.
    """

    nmse: float
    psnr_db: float
    ssim: float
    sqnr_db: float


@dataclass(frozen=True)
class Compared:
    """One prompt, drawn by both.

    Attributes:
        prompt: The text both were given.
        seed: Seed of the initial latents.
        fidelity: How far the candidate's picture is from the baseline's.
        problems: What went wrong: NaN or Inf, and on which side.
        baseline: The baseline's picture; of repeats the first.
        candidate: The candidate's.
        baseline_ms: Milliseconds of the baseline's picture, the median of repeats.
        candidate_ms: The candidate's.
    """

    prompt: str
    seed: int
    fidelity: Fidelity
    problems: tuple[str, ...]
    baseline: Rendering = field(repr=False)
    candidate: Rendering = field(repr=False)
    baseline_ms: float
    candidate_ms: float


@dataclass(frozen=True)
class Evaluation:
    """A candidate held against a baseline. Printing it gives the Markdown.

    Attributes:
        baseline: The reference.
        candidate: What was held against it.
        pictures: One for each prompt.
        total: Errors and energies of all pictures pooled; SSIM is the mean.
        thresholds: What the candidate must keep.
        settings: Arguments both were called with.
        repeats: How often each picture was timed.
        context: The machine.
        notes: What a reader must know to read the figures.
    """

    baseline: Side
    candidate: Side
    pictures: tuple[Compared, ...]
    total: Fidelity
    thresholds: Thresholds
    settings: Mapping[str, object]
    repeats: int
    context: Context
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """Median time of a baseline's picture over that of a candidate's."""
        return self.baseline.picture_ms / self.candidate.picture_ms

    def _which_is_faster(self) -> str:
        if self.repeats * len(self.pictures) == 1:
            return "from one time each, which says little; repeat it"
        times = Race(tuple(p.baseline_ms for p in self.pictures), tuple(p.candidate_ms for p in self.pictures))
        if times.too_busy:
            return f"{times.verdict}, the median picture took {times.spread:.1f} times as long as the fastest one"
        return f"the candidate is {'faster' if self.speedup > 1 else 'not faster'}"

    @property
    def failures(self) -> tuple[str, ...]:
        """Every reason why the candidate does not pass. NaN and Inf always fail, whatever the thresholds."""
        return tuple(self._failures())

    @property
    def ok(self) -> bool:
        """Whether the candidate passes."""
        return not self.failures

    @property
    def exit_code(self) -> int:
        """0 if the candidate passes, else 1."""
        return 0 if self.ok else 1

    def _failures(self) -> Iterator[str]:
        for number, picture in enumerate(self.pictures, start=1):
            yield from (f"picture {number}: {problem}" for problem in picture.problems)
        limits = self.thresholds
        for name, attribute in (
            ("max_nmse", "nmse"),
            ("min_psnr_db", "psnr_db"),
            ("min_ssim", "ssim"),
            ("min_sqnr_db", "sqnr_db"),
        ):
            values = [getattr(picture.fidelity, attribute) for picture in self.pictures]
            yield from _beyond(name, getattr(limits, name), values, "picture")
        yield from _beyond("min_speedup", limits.min_speedup, [self.speedup])
        yield from _beyond("max_ms_per_step", limits.max_ms_per_step, [self.candidate.ms_per_step])
        peak = math.nan if self.candidate.peak_bytes is None else self.candidate.peak_bytes
        yield from _beyond("max_peak_bytes", limits.max_peak_bytes, [peak])

    def to_json(self) -> str:
        """Return the evaluation as a JSON document; what JSON has no number for is "inf", "-inf" or "nan"."""
        document = {
            "ok": self.ok,
            "failures": self.failures,
            "thresholds": {f.name: getattr(self.thresholds, f.name) for f in fields(Thresholds)},
            "settings": dict(self.settings),
            "warm_up": "one picture each, excluded from all times but first_picture_s",
            "repeats": self.repeats,
            "device": self.context.device,
            "device_name": self.context.device_name,
            "versions": dict(self.context.versions),
            "notes": self.notes,
            "speedup": self.speedup,
            "total": asdict(self.total),
            "baseline": asdict(self.baseline) | {"steps_per_s": self.baseline.steps_per_s},
            "candidate": asdict(self.candidate) | {"steps_per_s": self.candidate.steps_per_s},
            "pictures": [
                {"prompt": p.prompt, "seed": p.seed}
                | asdict(p.fidelity)
                | {
                    "baseline_ms": p.baseline_ms,
                    "candidate_ms": p.candidate_ms,
                    "baseline_ms_per_step": p.baseline.ms_per_step,
                    "candidate_ms_per_step": p.candidate.ms_per_step,
                    "problems": p.problems,
                }
                for p in self.pictures
            ],
        }
        return json.dumps(_plain(document), indent=2, ensure_ascii=False)

    def to_markdown(self) -> str:
        """Return the evaluation as a page: verdict, limits, both sides, figures, pictures, how it was measured."""
        versions = ", ".join(f"{name} {self.context.versions.get(name, '?')}" for name in ("torch", "diffusers"))
        lines = [f"# Evaluation: {'passed' if self.ok else 'FAILED'}", ""]
        lines += [f"- {failure}" for failure in self.failures] + [""] * bool(self.failures)
        limits = ", ".join(f"{name} {limit}" for name, limit in asdict(self.thresholds).items() if limit is not None)
        lines += [f"Held to: {limits or 'no threshold; only NaN and Inf fail'}", ""]
        lines += [f"Baseline: {_described(self.baseline)}", "", f"Candidate: {_described(self.candidate)}", ""]
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines += [f"{self.context}, {versions}; {settings}", ""]
        lines += _markdown_table(("", "baseline", "candidate"), self._side_rows())
        lines += ["", *_markdown_table(_HEADER, self._picture_rows()), "", *self._how_measured()]
        return "\n".join(lines) + "\n"

    __str__ = __repr__ = to_markdown

    def _repr_html_(self) -> str:
        """Return what notebooks show: verdict, both sides, figures, and the first pictures side by side."""
        versions = ", ".join(f"{name} {self.context.versions.get(name, '?')}" for name in ("torch", "diffusers"))
        about = [*self.failures, f"Baseline: {_described(self.baseline)}", f"Candidate: {_described(self.candidate)}"]
        about.append(f"{self.context}, {versions}")
        parts = [html_lines(about, f"Evaluation: {'passed' if self.ok else 'FAILED'}")]
        parts.append(html_table(("", "baseline", "candidate"), self._side_rows(), frozenset({1, 2})))
        parts.append(html_table(_HEADER, self._picture_rows(), frozenset(range(2, len(_HEADER)))))
        pairs = [(each.baseline.image, each.candidate.image) for each in self.pictures[:_SHOWN]]
        for name, images in zip(("baseline", "candidate"), zip(*pairs, strict=True), strict=True):
            parts.append(f"<p>{name}<br>{''.join(map(_thumbnail, images))}</p>")
        parts.append(html_lines(self._how_measured()))
        return "".join(parts)

    def _how_measured(self) -> Iterator[str]:
        yield (
            f"Times are medians of {self.repeats} x {len(self.pictures)} pictures, the baseline's before the "
            "candidate's; the warm-up picture of each side is in no time but its own row. A ratio of "
            f"{self.speedup:.2f}: {self._which_is_faster()}."
        )
        yield from (f"Note: {note}." for note in self.notes)

    def save(self, folder: str | Path) -> Path:
        """Write the page, the JSON, all pictures and a contact sheet into `folder`; see `artifacts.save`."""
        from ernie_accel.fidelity.artifacts import Pair, save

        pages = {"evaluation.md": self.to_markdown(), "evaluation.json": self.to_json()}
        pairs = (Pair(each.prompt, each.baseline.image, each.candidate.image) for each in self.pictures)
        rows = [f"{side.name}\n{side.picture_ms:.0f} ms" for side in (self.baseline, self.candidate)]
        return save(Path(folder), pages, pairs, rows)

    def _side_rows(self) -> Iterator[tuple[str, ...]]:
        sides = (self.baseline, self.candidate)
        yield "ms a step", *(f"{side.ms_per_step:.1f}" for side in sides)
        yield "steps/s", *(f"{side.steps_per_s:.2f}" for side in sides)
        yield "steps", *(str(side.steps) for side in sides)
        yield "ms a picture", *(f"{side.picture_ms:.0f}" for side in sides)
        yield "warm-up picture, s", *(f"{side.first_picture_s:.1f}" for side in sides)
        yield "load, s", *(_seconds(side.load_s, "passed loaded") for side in sides)
        yield "optimize, s", *(_seconds(side.optimize_s, "-") for side in sides)
        yield "weights", *(human_bytes(side.weight_bytes) for side in sides)
        peaks = ("unknown" if side.peak_bytes is None else human_bytes(side.peak_bytes) for side in sides)
        yield f"peak, {self.candidate.peak_kind}", *peaks

    def _picture_rows(self) -> Iterator[tuple[str, ...]]:
        for number, p in enumerate(self.pictures, start=1):
            times = f"{p.baseline_ms:.0f}", f"{p.candidate_ms:.0f}"
            yield str(number), p.prompt, str(p.seed), *_shown(p.fidelity), *times
        medians = f"{self.baseline.picture_ms:.0f}", f"{self.candidate.picture_ms:.0f}"
        yield "", "all", "", *_shown(self.total), *medians


def _beyond(name: str, limit: float | None, values: Sequence[float], what: str = "") -> Iterator[str]:
    """Yield each value that is not on the right side of `limit`; NaN never is."""
    if limit is None:
        return
    for number, value in enumerate(values, start=1):
        within = value <= limit if name.startswith("max_") else value >= limit
        if not within:
            where = f"{what} {number}: " if what else ""
            yield f"{where}{name[4:]} {value:.4g} is {'above' if name.startswith('max_') else 'below'} {limit:g}"


def _described(side: Side) -> str:
    return f"{side.pipe}; " + (", ".join(side.applied) or "as loaded")


def _shown(fidelity: Fidelity) -> tuple[str, str, str, str]:
    return f"{fidelity.nmse:.2e}", f"{fidelity.psnr_db:.1f}", f"{fidelity.ssim:.4f}", f"{fidelity.sqnr_db:.1f}"


def _thumbnail(image: torch.Tensor) -> str:
    """Return a picture as HTML that holds it, small."""
    from ernie_accel.fidelity.artifacts import as_picture

    small, file = as_picture(image), io.BytesIO()
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    small.save(file, "PNG")
    return f'<img style="margin:2px" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _seconds(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.1f}"


def _markdown_table(header: Sequence[str], rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _plain(value: object) -> object:
    """Return `value` with floats that JSON does not know as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def median_ms(renderings: Sequence[Rendering]) -> float:
    """Return the median milliseconds of a picture."""
    return statistics.median(rendering.seconds for rendering in renderings) * 1e3
