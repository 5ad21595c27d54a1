"""The command ``ernie-accel evaluate``: what its options mean, and nothing else."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.embedded import SIZE_PX

if TYPE_CHECKING:
    from ernie_accel.core.components import CallablePipeline
    from ernie_accel.core.preset import Preset
    from ernie_accel.core.transform import Transform

#: bfloat16 against float32, as people check a port: small, few steps, one seed.
CLASSIC: dict[str, object] = {"width": 256, "height": 256, "num_inference_steps": 8, "seed": 42}

#: What the embedded model is good at.
EMBEDDED: dict[str, Any] = {"width": SIZE_PX[0], "height": SIZE_PX[1], "num_inference_steps": 8, "guidance_scale": 1.0}

Limit = Annotated[float | None, typer.Option(help="Exit code 1 beyond this.")]


def evaluate_command(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; default: the demo's prompts.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One prompt a line, UTF-8.")] = None,
    model: Annotated[str | None, typer.Option(help="Pipeline folder or hub id; default: the embedded model.")] = None,
    transformer: Annotated[
        Path | None, typer.Option(help="Single file with the transformer of both, as ComfyUI keeps it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Load the baseline as fp32, bf16, fp16 or auto.")] = "auto",
    candidate_dtype: Annotated[
        str | None, typer.Option(help="Load the candidate so; default: as the baseline.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Apply a preset to the candidate.")] = None,
    classic: Annotated[bool, typer.Option("--classic", help="bf16 against fp32, 256x256, 8 steps, seed 42.")] = False,
    width: Annotated[int | None, typer.Option(min=16, help="In pixels.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="In pixels.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of both.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance of both.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first picture; default 42.")] = None,
    pe: Annotated[str, typer.Option(help="Prompt enhancer: off, or fixed (written once for both).")] = "off",
    skip_unsupported: Annotated[
        bool, typer.Option("--skip-unsupported", help="Leave out what cannot run here instead of refusing.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Times each picture is drawn and timed.")] = 1,
    max_nmse: Limit = None,
    min_psnr_db: Limit = None,
    min_ssim: Limit = None,
    min_sqnr_db: Limit = None,
    min_speedup: Limit = None,
    max_ms_per_step: Limit = None,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures, sheet, Markdown and JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a dtype or a preset with the plain pipeline. Exit code 1 if a threshold is broken or NaN is found."""
    from ernie_accel.batch.input.check import size_problem
    from ernie_accel.core.context import Context
    from ernie_accel.core.files import check_folder
    from ernie_accel.fidelity.compare import evaluate
    from ernie_accel.fidelity.evaluation import Thresholds
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.recipes.recommend import fitting_preset
    from ernie_accel.storage.loading import check_dtype
    from ernie_accel.transforms.calls.call_defaults import CallDefaults

    if classic and (dtype, candidate_dtype) != ("auto", None):
        raise ErnieAccelError("--classic is bf16 against fp32: leave out --dtype and --candidate-dtype")
    if classic:
        dtype, candidate_dtype = "float32", candidate_dtype or "bfloat16"
    if candidate_dtype is None and preset is None:
        raise ErnieAccelError("there is nothing to compare: give --preset, --candidate-dtype or --classic")
    for name in (dtype, candidate_dtype or dtype):
        check_dtype(name)
    found = find_preset(preset) if preset and preset != "auto" else None
    if preset == "auto":
        found = fitting_preset(Context.detect(), model=model)
    # The baseline is called like the candidate, so that the figures show the change and not fewer steps.
    transforms = found.transforms if found is not None else ()
    same_call = tuple(transform for transform in transforms if isinstance(transform, CallDefaults))
    given = {
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ErnieAccelError(f"--guidance-scale is {guidance_scale}; expected a number such as 1.0 (no guidance)")
    if problem := size_problem(width, height, 16):
        raise ErnieAccelError(problem)
    texts = _prompts(prompts, prompts_file)
    if out is not None:
        check_folder(out)
    usual = (EMBEDDED if model is None else {}) | (CLASSIC if classic else {})
    evaluation = evaluate(
        partial(_load, model, transformer, dtype, *same_call, refuse=None if skip_unsupported else found),
        partial(_load, model, transformer, candidate_dtype or dtype, preset=found, skip_unsupported=skip_unsupported),
        texts,
        pe=pe,  # type: ignore[arg-type]  # checked there
        repeats=repeats,
        thresholds=Thresholds(max_nmse, min_psnr_db, min_ssim, min_sqnr_db, min_speedup, max_ms_per_step),
        **(usual | {name: value for name, value in given.items() if value is not None}),
    )
    typer.echo(evaluation.to_json() if as_json else evaluation.to_markdown())
    if out is not None:
        typer.echo(f"{evaluation.save(out).resolve()}", err=as_json)
    if not evaluation.ok:
        raise typer.Exit(evaluation.exit_code)


def _prompts(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    from ernie_accel.demo.show import PROMPTS

    lines: list[str] = []
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ErnieAccelError(f"cannot read {file}: {error}") from error
        if not lines:
            raise ErnieAccelError(f"{file} holds no prompt: write one a line")
    for number, prompt in enumerate(given or (), start=1):
        if not prompt.strip():
            raise ErnieAccelError(f"prompt {number} of the command line is empty; write what to draw, or leave it out")
    return (*(given or ()), *lines) or PROMPTS


def _load(
    model: str | None,
    transformer: Path | None,
    dtype: str,
    *transforms: Transform,
    preset: Preset | None = None,
    skip_unsupported: bool = False,
    refuse: Preset | None = None,
) -> CallablePipeline:
    """Load a side. `refuse` is what the other side will apply: if it cannot run, this one need not draw a picture.

    Raises:
        UnsupportedError: `preset` or `refuse` cannot run here.
    """
    from ernie_accel.api import optimize, plan
    from ernie_accel.core.errors import UnsupportedError
    from ernie_accel.storage.loading import load_pipeline

    stays = bool(transforms) or preset is not None  # optimize brings it to the device
    pipe = load_pipeline(model, dtype, pictures=True, on_host=stays, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    if refuse is not None and not (the_plan := plan(pipe, preset=refuse)).ok:
        raise UnsupportedError(the_plan)
    if not transforms and preset is None:
        return pipe
    return optimize(pipe, *transforms, preset=preset, on_unsupported="skip" if skip_unsupported else "error")
