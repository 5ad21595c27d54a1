"""Draw the same prompts from the same noise with two pipes, or with one before and after, and compare."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeGuard, cast

import torch

from ernie_accel.api import optimize, plan, report, restore
from ernie_accel.common.text import effect_text
from ernie_accel.core.components import AnyPipeline, CallablePipeline, Pipeline, device_of, modules_of, pipe_bytes
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError, RestoreError, UnknownNameError, UnsupportedError
from ernie_accel.core.outputs import require_pictures
from ernie_accel.core.plan import check_pipeline, compose
from ernie_accel.core.preset import Preset
from ernie_accel.core.transform import Transform
from ernie_accel.fidelity import metrics
from ernie_accel.fidelity.evaluation import Compared, Evaluation, Fidelity, Side, Thresholds, median_ms
from ernie_accel.fidelity.render import PeakMemory, Rendering, accepts, render
from ernie_accel.recipes.presets import find_preset

#: A pipeline, or what loads one (its time is then measured, and only one is in memory at a time).
Source: TypeAlias = AnyPipeline | Callable[[], AnyPipeline]
#: What makes a candidate out of the baseline's own pipe.
Change: TypeAlias = Preset | str | Transform | list[Transform] | tuple[Transform, ...]

PE_MODES = ("off", "fixed")


def evaluate(
    baseline: Source,
    candidate: Source | Change,
    prompts: str | Sequence[str],
    *,
    seed: int = 42,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    pe: Literal["off", "fixed"] = "off",
    repeats: int = 1,
    thresholds: Thresholds | None = None,
    call: Mapping[str, object] | None = None,
) -> Evaluation:
    """Hold a candidate against a baseline: what it costs in fidelity, and what it buys in time and memory.

    Both draw every prompt from the same initial latents: the baseline draws them from the seed, and the candidate gets
    them in its own dtype, since drawing in another dtype gives other noise. Each side first draws one picture that is
    timed apart, so that compilation is in no other figure.

    Args:
        baseline: A pipeline, or a function that loads one.
        candidate: Another pipeline or such a function; or what to apply to the baseline's pipe: a preset or its name,
            a transform, or several. The pipe is then given back as it came.
        prompts: What to draw.
        seed: Seed of the first picture; the others count on from it.
        height: In pixels; None, here and below: each pipe's own default.
        width: In pixels.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        pe: "off" draws the prompts as they are. "fixed" has the baseline's prompt enhancer write each text once, from
            the seed, and gives the same text to both.
        repeats: How often each picture is drawn and timed, >= 1.
        thresholds: What the candidate must keep.
        call: Further arguments for both calls.

    Returns:
        The evaluation; print it, or ask its `ok`.

    Raises:
        UnknownNameError: There is no such preset, or no such `pe`.
        UnsupportedError: A transform cannot run here.
        ErnieAccelError: The two pipes cannot be compared.
    """
    if pe not in PE_MODES:
        raise UnknownNameError("pe", pe, PE_MODES)
    if repeats < 1 or not prompts:
        raise ValueError(f"give at least one prompt and one repeat, got {prompts!r} and repeats={repeats}")
    asked = {
        "height": height,
        "width": width,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    settings = {name: value for name, value in asked.items() if value is not None} | dict(call or {})
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)

    request = _asked_for(candidate) if isinstance(candidate, (Preset, str, Transform, list, tuple)) else None
    pipe, load_s = _loaded(baseline)
    change = request.transforms_on(pipe) if isinstance(request, Preset) else request
    context = Context.detect(pipe)
    if change is not None:
        _check(pipe, change)
    if pe == "fixed":
        texts = tuple(_enhanced(pipe, text, seed, settings) for text in texts)
    first = _drawn(pipe, texts, seed, settings, repeats)
    ours = _side("baseline", pipe, first, load_s)
    notes: list[str] = []
    if change is not None:
        with _changed(pipe, change, notes):
            second = _drawn(pipe, texts, seed, settings, repeats, first)
            theirs = _side("candidate", pipe, second, None)
    else:
        if not _is_pipeline(baseline):
            del pipe  # ours alone: two models need not fit into memory at once
            gc.collect()
            if context.device == "cuda":
                torch.cuda.empty_cache()
        other, load_s = _loaded(cast(Source, candidate))
        second = _drawn(other, texts, seed, settings, repeats, first)
        theirs = _side("candidate", other, second, load_s)
    if ours.load_s is not None and theirs.load_s is not None:
        notes.append("the baseline was loaded first, so that only its load pays for imports and a cold file cache")
    if ours.steps != theirs.steps:
        notes.append(f"{ours.steps} and {theirs.steps} steps: the candidate draws another picture by design")
    pictures = tuple(_compared(texts, seed, first, second))
    return Evaluation(
        baseline=ours,
        candidate=theirs,
        pictures=pictures,
        total=_total(pictures),
        thresholds=thresholds or Thresholds(),
        settings=settings | {"seed": seed, "pe": pe},
        repeats=repeats,
        context=context,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Drawn:
    """All pictures of one side.

    Attributes:
        warm_up: The picture before the others.
        pictures: By prompt, the repeats of each.
        peak_bytes: Peak memory while drawing them.
        peak_kind: What that counts.
    """

    warm_up: Rendering
    pictures: tuple[tuple[Rendering, ...], ...]
    peak_bytes: int | None
    peak_kind: str


def _drawn(
    pipe: CallablePipeline,
    texts: Sequence[str],
    seed: int,
    settings: Mapping[str, object],
    repeats: int,
    like: _Drawn | None = None,
) -> _Drawn:
    """Draw all prompts, from the latents of `like` if that is given."""
    call = dict(settings) | ({"use_pe": False} if accepts(pipe, "use_pe") else {})
    warm_up = render(pipe, texts[0], seed, call)
    starts: list[torch.Tensor | None] = [None] * len(texts)
    if like is not None:
        if warm_up.start.shape != like.warm_up.start.shape:
            raise ErnieAccelError(
                f"the pipes draw latents of different shapes, {tuple(like.warm_up.start.shape)} and "
                f"{tuple(warm_up.start.shape)}: pictures of different sizes or models cannot be compared"
            )
        starts = [drawn[0].start.to(warm_up.start.dtype) for drawn in like.pictures]
    memory = PeakMemory(device_of(pipe))
    memory.reset()
    pictures = tuple(
        tuple(render(pipe, text, seed + number, call, start) for _ in range(repeats))
        for number, (text, start) in enumerate(zip(texts, starts, strict=True))
    )
    return _Drawn(warm_up, pictures, memory.read(), memory.kind)


def _compared(texts: Sequence[str], seed: int, first: _Drawn, second: _Drawn) -> Iterator[Compared]:
    for number, (text, ours, theirs) in enumerate(zip(texts, first.pictures, second.pictures, strict=True)):
        baseline, candidate = ours[0], theirs[0]
        problems = [f"baseline: {problem}" for problem in baseline.problems]
        problems += [f"candidate: {problem}" for problem in candidate.problems]
        large_enough = min(baseline.image.shape[-2:]) >= 11
        yield Compared(
            prompt=text,
            seed=seed + number,
            fidelity=Fidelity(
                nmse=metrics.nmse(candidate.image, baseline.image),
                psnr_db=metrics.psnr_db(candidate.image, baseline.image),
                ssim=metrics.ssim(candidate.image, baseline.image) if large_enough else float("nan"),
                sqnr_db=metrics.sqnr_db(candidate.latents, baseline.latents),
            ),
            problems=tuple(problems),
            baseline=baseline,
            candidate=candidate,
            baseline_ms=median_ms(ours),
            candidate_ms=median_ms(theirs),
        )


def _total(pictures: Sequence[Compared]) -> Fidelity:
    """Return the fidelity of all pictures as one: errors and energies are summed before they are divided."""
    images = [(p.candidate.image, p.baseline.image) for p in pictures]
    latents = [(p.candidate.latents, p.baseline.latents) for p in pictures]
    image_error = sum(metrics.error_energy(*pair) for pair in images)
    latent_error = sum(metrics.error_energy(*pair) for pair in latents)
    return Fidelity(
        nmse=metrics.ratio(image_error, sum(metrics.energy(b) for _, b in images)),
        psnr_db=metrics.decibels(image_error / sum(b.numel() for _, b in images)),
        ssim=statistics.fmean(p.fidelity.ssim for p in pictures),
        sqnr_db=metrics.decibels(metrics.ratio(latent_error, sum(metrics.energy(b) for _, b in latents))),
    )


def _side(name: str, pipe: Pipeline, drawn: _Drawn, load_s: float | None) -> Side:
    renderings = [rendering for repeats in drawn.pictures for rendering in repeats]
    receipts = [(entry.step.transform, entry.applied) for entry in report(pipe).entries if entry.applied is not None]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for m in modules_of(pipe).values() for p in m.parameters()})
    return Side(
        name=name,
        pipe=f"{type(pipe).__name__} in {', '.join(dtypes)}",
        applied=tuple(f"{t!r} ({effect_text(t.effect.value, t.floor_db)})" for t, _ in receipts),
        load_s=load_s,
        optimize_s=sum(applied.seconds for _, applied in receipts) if receipts else None,
        first_picture_s=drawn.warm_up.seconds,
        picture_ms=median_ms(renderings),
        ms_per_step=statistics.median(rendering.ms_per_step for rendering in renderings),
        steps=renderings[0].steps,
        weight_bytes=pipe_bytes(pipe),
        peak_bytes=drawn.peak_bytes,
        peak_kind=drawn.peak_kind,
    )


def _is_pipeline(source: object) -> TypeGuard[CallablePipeline]:
    return isinstance(getattr(source, "components", None), dict)


def _loaded(source: Source) -> tuple[CallablePipeline, float | None]:
    """Return the pipe and the seconds it took to load; None if it was loaded."""
    if _is_pipeline(source):
        require_pictures(type(source))
        return source, None
    if isinstance(source, torch.nn.Module) or not callable(source):
        check_pipeline(cast(AnyPipeline, source))
    start = time.perf_counter()
    pipe = cast(Callable[[], CallablePipeline], source)()
    seconds = time.perf_counter() - start
    check_pipeline(pipe)
    require_pictures(type(pipe))
    return pipe, seconds


def _asked_for(change: Change) -> Preset | tuple[Transform, ...]:
    """Return the preset, or the transforms given, one a slot."""
    if isinstance(change, (str, Preset)):
        return find_preset(change)
    return compose((change,) if isinstance(change, Transform) else tuple(change), None)


def _in_place(pipe: Pipeline) -> tuple[Transform, ...]:
    return tuple(entry.step.transform for entry in report(pipe).entries if entry.applied is not None)


def _on_top(before: tuple[Transform, ...], change: tuple[Transform, ...]) -> tuple[Transform, ...]:
    """Return both; what changes replaces what is in place in the same slot."""
    return tuple({transform.occupies: transform for transform in (*before, *change)}.values())


def _check(pipe: Pipeline, change: tuple[Transform, ...]) -> None:
    """Refuse what cannot run before anything is drawn.

    Raises:
        UnsupportedError: A transform cannot run on this pipe and machine.
    """
    the_plan = plan(pipe, *_on_top(_in_place(pipe), change))
    if not the_plan.ok:
        raise UnsupportedError(the_plan)


@contextmanager
def _changed(pipe: Pipeline, change: tuple[Transform, ...], notes: list[str]) -> Iterator[None]:
    """Apply `change` on top of what is in place, and afterwards give back what was in place."""
    before = _in_place(pipe)
    optimize(pipe, *_on_top(before, change))
    try:
        yield
    finally:
        try:
            _give_back(pipe, before)
        except RestoreError as error:  # the figures are worth more than the original
            notes.append(f"the pipe stays optimized: {error}")


def _give_back(pipe: Pipeline, before: tuple[Transform, ...]) -> None:
    if before:
        optimize(pipe, *before)
    else:
        restore(pipe)


def _enhanced(pipe: Pipeline, text: str, seed: int, settings: Mapping[str, object]) -> str:
    """Return what the pipe's prompt enhancer makes of a prompt; the global random state is left as it was."""
    if getattr(pipe, "pe", None) is None:
        raise ErnieAccelError(f"pe='fixed' needs a prompt enhancer, and this {type(pipe).__name__} has none")
    size = {name: settings.get(name) or 1024 for name in ("width", "height")}  # the pipeline's own default
    device = device_of(pipe)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        written: str = pipe._enhance_prompt_with_pe(text, device, **size)
    return written
