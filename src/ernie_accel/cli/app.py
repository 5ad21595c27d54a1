"""The command line, ``ernie-accel demo | plan | optimize | batch | evaluate | recommend | info``: thin shells."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ernie_accel.batch.input.options import none_if_auto
from ernie_accel.cli.batch import batch_command
from ernie_accel.cli.evaluate import evaluate_command
from ernie_accel.common.language import (
    LANGUAGES,
    VARIABLE,
    language_asked_for,
    listed,
    localized,
    said,
    say,
    speak,
    speaking,
)
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError
from ernie_accel.core.files import check_file
from ernie_accel.embedded import SIZE_PX

if TYPE_CHECKING:
    from ernie_accel.core.components import CallablePipeline
    from ernie_accel.core.context import Context
    from ernie_accel.core.report import Report

app = typer.Typer(
    help="Make a diffusers generation script fast, lean and trustworthy.",
    epilog="Exit codes: 0 done; 1 a plan cannot run, or an evaluation fails; 2 a mistake, and nothing was done; "
    "3 some pictures of a batch failed; 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

#: Loggers that warn, while their packages are imported, of kernels that this machine has no use for.
NOISY_WHEN_IMPORTED = ("torchao", "bitsandbytes.backends.cpu.ops", "torch.utils._pytree")

Model = Annotated[str | None, typer.Option(help="Pipeline folder or hub id; without it the embedded model.")]
PlannedModel = Annotated[
    str | None, typer.Option(help="Pipeline folder or hub id; without it the published ERNIE-Image-Turbo.")
]
Transformer = Annotated[
    Path | None, typer.Option(help="Single file with the transformer, as ComfyUI keeps it; the rest is the model's.")
]
Memory = Annotated[str | None, typer.Option(help="Device memory to use: auto, 12GiB, or -2GiB to leave that free.")]
PresetName = Annotated[
    str | None,
    typer.Option(help="Preset, see `ernie-accel info`; auto, the default: what pays here.", callback=none_if_auto),
]
Dtype = Annotated[str, typer.Option(help="Load weights as fp32, bf16 or fp16; auto: fp32 on the CPU, else bf16.")]
Device = Annotated[str | None, typer.Option(help="A device that need not be here: h200, rtx3060, ascend910b, ...")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the (first) picture.")]
Skip = Annotated[bool, typer.Option("--skip-unsupported", help="Leave out what cannot run here instead of refusing.")]
Lang = Annotated[
    str | None,
    typer.Option(help="Language of what is printed, but for help and evaluations: en or zh; default: the locale's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _language(name: str) -> str:
    if name not in LANGUAGES:
        raise UnknownNameError("language", name, LANGUAGES, note=f"It is given by --lang or {VARIABLE}.")
    return name


def _show_version(wanted: bool) -> None:
    if wanted:
        from ernie_accel.exports import VERSION

        typer.echo(f"ernie-accel {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
    lang: Lang = None,
) -> None:
    """Take the options that stand before a command; the help of the app is its own."""
    speak(_language(language_asked_for() if lang is None else lang))


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that takes `--lang`, too: on which side of a command it stands, nobody remembers."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def in_language(*, lang: str | None = None, **given: object) -> None:
            if lang is not None:
                speak(_language(lang))
            function(**given)

        signature = inspect.signature(function, eval_str=True)
        asked = inspect.Parameter("lang", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Lang)
        parameters = [*signature.parameters.values(), asked]
        in_language.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        app.command(name)(in_language)
        return function

    return declare


@command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where the contact sheet goes (PNG).")] = Path("ernie-accel-demo.png"),
    preset: PresetName = None,
) -> None:
    """Render the same prompts stock and optimized with the embedded model, and measure both."""
    from ernie_accel.common.text import width
    from ernie_accel.core.context import Context
    from ernie_accel.core.transform import Transform
    from ernie_accel.demo.show import STEPS, bfloat16_pays, race_dtypes, show
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.recipes.recommend import fitting_preset
    from ernie_accel.transforms.weights.cast_dtype import CastDtype

    check_file(out, ".png")
    context = Context.detect()
    chosen = find_preset(preset) if preset else fitting_preset(context)
    _load_quietly(None)
    beside: list[Transform] = []
    if preset is None and context.device == "cpu":
        race = race_dtypes()
        typer.echo(say("bfloat16 against float32 on this CPU, stock: {race}", race=race.text))
        if bfloat16_pays(race):
            beside.append(CastDtype("bfloat16"))
            request = f"optimize(pipe, {beside[0]!r}, preset={chosen.name!r})"
            typer.echo(
                say("So the optimized pipeline runs in bfloat16, and stock stays in float32: {call}", call=request)
            )

    def announce(what: str) -> None:
        request = listed((what, *map(repr, beside)))
        template = "Rendering on {machine} with {request}; the first optimized picture may compile ..."
        typer.echo(say(template, machine=context.localized(), request=request))

    showing = show(out, chosen, *beside, device=context.torch_device, announce=announce)
    typer.echo(f"\n{showing.plan}\n\n{showing.report}\n")
    times = showing.times
    count = len(times.first_ms)
    template = "Measured in this run: {count} pairs of pictures, 128x128 px, {steps} steps; median, min, max:"
    typer.echo(say(template, count=count, steps=STEPS))
    for name, series in ((say("stock"), times.first_ms), (say("optimized"), times.second_ms)):
        padding = " " * (10 - width(name))
        typer.echo(f"  {name}{padding}{statistics.median(series):8.1f} ms {min(series):8.1f} {max(series):8.1f}")
    typer.echo(say("  ratio         {times}", times=times.text))
    typer.echo(say("  the first optimized picture took {seconds:.1f} s", seconds=showing.first_call_s))
    typer.echo(say("Contact sheet: {sheet}", sheet=showing.sheet.resolve()))
    if context.device != "cuda":
        template = "The library is made for GPUs: figures for them are in docs/performance.md and the README."
        typer.echo(say(template))


@command("plan")
def plan_command(
    preset: PresetName = None,
    model: PlannedModel = None,
    transformer: Transformer = None,
    device: Device = None,
    memory: Memory = None,
    width: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 1024,
    height: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 1024,
    pictures: Annotated[int, typer.Option(min=1, help="How many at once.")] = 1,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what a preset would do, and what the device will hold, here or on a named device. Needs no weights.

    Exit code 1 if it cannot run, or does not fit.
    """
    from ernie_accel.api import plan
    from ernie_accel.batch.input.options import REAL_MODEL
    from ernie_accel.core.context import Context
    from ernie_accel.memory.call import Call
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.recipes.recommend import fitting_preset

    context = Context.named(device) if device else Context.detect()
    chosen = find_preset(preset) if preset else None
    if memory is None and context.torch_device in ("cuda", "npu"):
        memory = "auto"
    pipe = _to_plan(model, dtype, context, transformer)
    chosen = chosen or fitting_preset(context, pipe, model=model or REAL_MODEL)
    the_plan = plan(pipe, preset=chosen, context=context, memory=memory, call=Call(width, height, pictures))
    typer.echo(the_plan.to_json() if as_json else str(the_plan))
    if not the_plan.ok or (the_plan.memory is not None and not the_plan.memory.fits):
        raise typer.Exit(1)


@command("optimize")
def optimize_command(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Where the picture goes (PNG).")] = Path("picture.png"),
    preset: PresetName = None,
    model: Model = None,
    transformer: Transformer = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    width: Annotated[int | None, typer.Option(min=16, help="In pixels.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="In pixels.")] = None,
    skip_unsupported: Skip = False,
    as_json: AsJson = False,
) -> None:
    """Optimize a pipeline, draw one picture with it, and print the report."""
    from ernie_accel.batch import Row, produce
    from ernie_accel.batch.input.check import size_problem
    from ernie_accel.batch.input.gate import text_problem
    from ernie_accel.batch.input.options import REAL_MODEL
    from ernie_accel.embedded.captions import unknown_part

    usual = SIZE_PX if model is None else (None, None)
    width, height = width or usual[0], height or usual[1]
    if not prompt.strip():
        raise ErnieAccelError("the prompt is empty; write what to draw")
    if problem := text_problem(prompt):
        raise ErnieAccelError(f"the prompt {problem}")
    if problem := size_problem(width, height, 16):
        raise ErnieAccelError(problem)
    check_file(out, ".png")
    try:
        row = Row(line=1, index=0, prompt=prompt, file_name=out.name, seed=seed, width=width, height=height)
    except ValueError as error:  # the name of the picture
        raise ErnieAccelError(f"--out {out}: {error}") from error
    if model is None and (reason := unknown_part(prompt)) is not None:
        template = (
            "no model is named, and the embedded demo model draws nothing but flat shapes ({reason}); name one: {how}"
        )
        note = said(template, reason=reason, how=f"--model {REAL_MODEL}")
        typer.echo(say("note: {note}", note=note), err=True)
    pipe, the_report = load_and_optimize(model, dtype, preset, skip_unsupported, transformer)
    result = next(produce(pipe, [row], out.parent, overwrite=True, resume=False, progress=False))
    if result.error is not None:
        raise ErnieAccelError(f"the picture failed: {result.error}")
    typer.echo(the_report.to_json() if as_json else str(the_report))
    done = say("{path} in {seconds:.1f} s, compilation included", path=result.path, seconds=result.seconds)
    typer.echo(done, err=as_json)


command("batch")(batch_command)


command("evaluate")(evaluate_command)


@command("recommend")
def recommend_command(
    device: Device = None,
    model: PlannedModel = None,
    mode: Annotated[str | None, typer.Option(help="turbo (distilled) or quality (base).")] = None,
) -> None:
    """Name the preset that pays most, here or on a named device, and why none of the others does. Needs no weights."""
    from ernie_accel.api import plan
    from ernie_accel.batch.input.options import REAL_MODEL
    from ernie_accel.core.context import Context
    from ernie_accel.recipes.recommend import check_mode, mode_of, recommend

    context = Context.named(device) if device else Context.detect()
    check_mode(mode)
    pipe = _to_plan(model, "auto", context)
    found = recommend(context, pipe, mode=mode or mode_of(model or REAL_MODEL))
    typer.echo(say("For {model}:", model=model or REAL_MODEL))
    typer.echo(str(found))
    if context.torch_device in ("cuda", "npu"):
        planned = plan(pipe, preset=found.preset, context=context, memory="auto")
        typer.echo(f"\n{planned.memory}")


@command("info")
def info_command(model: PlannedModel = None) -> None:
    """Say what is installed, which presets can run here, and why others cannot. Needs no weights."""
    from ernie_accel.api import plan
    from ernie_accel.batch.input.options import REAL_MODEL
    from ernie_accel.core.context import OPTIONAL_PACKAGES, Context
    from ernie_accel.exports import VERSION
    from ernie_accel.families.published import CHECKPOINTS
    from ernie_accel.recipes.presets import presets

    context = Context.detect()
    pipe = _to_plan(model, "auto", context)
    typer.echo(say("ernie-accel {version} on {machine}", version=VERSION, machine=context.localized()))
    for package, version in context.versions.items():
        typer.echo(f"  {package:18} {version}")
    for package in OPTIONAL_PACKAGES:
        for reason in context.missing(package):
            typer.echo(f"  {package:18} - {localized(reason)}")
    typer.echo(say("Models that can be planned for without a download:"))
    for checkpoint in CHECKPOINTS:
        typer.echo(f"  {checkpoint.names[0]}")
    typer.echo(say("Presets for {model}:", model=model or REAL_MODEL))
    for preset in presets.values():
        the_plan = plan(pipe, preset=preset, context=context)
        verdict = said("can run here") if the_plan.ok else said("cannot run here")
        typer.echo(say("  {name:18} {verdict}: {summary}", name=preset.name, verdict=verdict, summary=preset.summary))
        for line in the_plan.problem_lines():
            typer.echo(f"    {line}")


def load_and_optimize(
    model: str | None, dtype: str, preset: str | None, skip_unsupported: bool, transformer: Path | None = None
) -> tuple[CallablePipeline, Report]:
    """Load and optimize a pipeline; a preset that does not exist is refused before anything is loaded."""
    from ernie_accel.api import optimize, report
    from ernie_accel.core.context import Context
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.recipes.recommend import fitting_preset
    from ernie_accel.storage.loading import load_pipeline

    chosen = find_preset(preset) if preset else None
    _load_quietly(model)
    pipe = load_pipeline(model, dtype, on_host=True, transformer=transformer)
    chosen = chosen or fitting_preset(Context.detect(), pipe, model=model)
    pipe.set_progress_bar_config(disable=True)
    # A preset that was not chosen by name may lose a part that cannot run here; the report names it.
    optimize(pipe, preset=chosen, on_unsupported="skip" if skip_unsupported or preset is None else "error")
    return pipe, report(pipe)


def _to_plan(model: str | None, dtype: str, context: Context, transformer: Path | None = None) -> CallablePipeline:
    """Return a pipeline to plan for, without its weights where its configuration is known or here.

    A single file must fit the model; what is quantized in it is decoded when it is loaded, so that plans are the same.
    """
    from ernie_accel.batch.input.options import REAL_MODEL
    from ernie_accel.core.dtypes import DTYPES, dtype_name
    from ernie_accel.families.published import published
    from ernie_accel.storage.loading import check_dtype, load_pipeline, refuse_transformer, was_saved_here
    from ernie_accel.storage.manifest import INDEX
    from ernie_accel.storage.single_file.transformer import check_fits
    from ernie_accel.storage.skeleton import cached, skeleton

    check_dtype(dtype)
    name = model or REAL_MODEL
    is_described = published(name) is not None or (Path(name) / INDEX).is_file() or cached(name) is not None
    if was_saved_here(name):
        refuse_transformer(name, transformer)
    if was_saved_here(name) or not is_described:
        return load_pipeline(name, dtype, on_host=True, transformer=transformer)
    usual = "float32" if context.device == "cpu" else "bfloat16"
    pipe = skeleton(name, DTYPES[usual if dtype == "auto" else dtype_name(dtype)])
    if transformer is not None:
        check_fits(pipe.transformer, transformer)
    return pipe


def _load_quietly(model: str | None) -> None:
    """Show no loading bar for the embedded model, which loads in a second; a large one keeps it."""
    if model is None:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()


def _spelt_out(arguments: Sequence[str]) -> list[str]:
    """Return arguments with ``--sift grid`` as the options that it is short for, ``--sift --grid 0.5``."""
    found = list(arguments)
    for at, each in enumerate(found):
        if "batch" not in found[:at]:
            continue
        if each == "--sift=grid" or found[at : at + 2] == ["--sift", "grid"]:
            from ernie_accel.fidelity.grid import VISIBLE

            rest = found[at + (1 if each == "--sift=grid" else 2) :]
            given = any(other == "--grid" or other.startswith("--grid=") for other in (*found[:at], *rest))
            return [*found[:at], "--sift", *(() if given else ("--grid", f"{VISIBLE:g}")), *rest]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of ours is one message and exit code 2, not a traceback."""
    # A command prints its own progress; the libraries' loading bars and notices would drown it.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for logger in NOISY_WHEN_IMPORTED:
        logging.getLogger(logger).setLevel(logging.ERROR)
    with speaking("en"):
        try:
            app(_spelt_out(sys.argv[1:] if arguments is None else arguments))
        except ErnieAccelError as error:
            text = str(error).replace("on_unsupported='skip'", "--skip-unsupported")
            typer.echo(say("error: {text}", text=text), err=True)
            raise SystemExit(2) from None
