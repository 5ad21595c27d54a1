"""The command line: ``ernie-accel demo | plan | optimize | batch | evaluate | info``: thin shells of the API."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ernie_accel.batch.command import batch_command
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.fidelity.command import evaluate_command

if TYPE_CHECKING:
    from ernie_accel.core.components import Pipeline
    from ernie_accel.core.report import Report

app = typer.Typer(
    help="Make a diffusers generation script fast, lean and trustworthy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

#: Width and height of the embedded model's pictures where nobody asks for others; diffusers' default is 1024.
EMBEDDED_SIZE_PX = (128, 128)

Model = Annotated[str | None, typer.Option(help="Pipeline folder or hub id; without it the embedded model.")]
PresetName = Annotated[str | None, typer.Option(help="Preset, see `ernie-accel info`; default: what pays here.")]
Dtype = Annotated[str, typer.Option(help="Load weights as float32, bfloat16, float16; auto: float32 on the CPU.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the (first) picture.")]
Skip = Annotated[bool, typer.Option("--skip-unsupported", help="Leave out what cannot run here instead of refusing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path("ernie-accel-demo.png"),
    preset: PresetName = None,
) -> None:
    """Render the same prompts stock and optimized with the embedded model, and measure both."""
    from ernie_accel.core.context import Context
    from ernie_accel.demo.show import STEPS, show
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.recipes.recommend import fitting_preset

    _load_quietly(None)
    context = Context.detect()
    chosen = find_preset(preset) if preset else fitting_preset(context)
    typer.echo(f"Rendering on {context} with preset {chosen.name!r}; the first optimized picture compiles ...")
    showing = show(out, chosen, device=context.device)
    typer.echo(f"\n{showing.plan}\n\n{showing.report}\n")
    count = len(showing.stock_ms)
    typer.echo(f"Measured in this run: {count} pairs of pictures, 128x128 px, {STEPS} steps; median, min, max:")
    for name, times in (("stock", showing.stock_ms), ("optimized", showing.optimized_ms)):
        typer.echo(f"  {name:10}{statistics.median(times):8.1f} ms {min(times):8.1f} {max(times):8.1f}")
    low, high = showing.ratio_quartiles
    verdict = "faster" if low > 1 else "slower on this machine" if high < 1 else "no measurable difference"
    typer.echo(
        f"  ratio     {showing.ratio:8.2f} x  {verdict} (median of the pairs; quartiles {low:.2f} to {high:.2f})"
    )
    typer.echo(f"  the first optimized picture took {showing.first_call_s:.1f} s")
    typer.echo(f"Contact sheet: {showing.sheet.resolve()}")


@app.command("plan")
def plan_command(
    preset: PresetName = None,
    model: Model = None,
    device: Annotated[str | None, typer.Option(help="Plan for a device: h200, rtx3060, ascend910b, ...")] = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what a preset would do to a pipeline, here or on a named device. Exit code 1 if it cannot run."""
    from ernie_accel.api import plan
    from ernie_accel.core.context import Context
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.recipes.recommend import fitting_preset
    from ernie_accel.storage.loading import load_pipeline

    context = Context.named(device) if device else Context.detect()
    chosen = find_preset(preset) if preset else fitting_preset(context)
    _load_quietly(model)
    the_plan = plan(load_pipeline(model, dtype), preset=chosen, context=context)
    typer.echo(the_plan.to_json() if as_json else str(the_plan))
    if not the_plan.ok:
        raise typer.Exit(1)


@app.command("optimize")
def optimize_command(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Where the picture goes (PNG).")] = Path("picture.png"),
    preset: PresetName = None,
    model: Model = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    width: Annotated[int | None, typer.Option(min=16, help="In pixels.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="In pixels.")] = None,
    skip_unsupported: Skip = False,
    as_json: AsJson = False,
) -> None:
    """Optimize a pipeline, draw one picture with it, and print the report."""
    from ernie_accel.batch import Row, produce
    from ernie_accel.batch.check import size_problem
    from ernie_accel.batch.gate import text_problem
    from ernie_accel.batch.job import REAL_MODEL
    from ernie_accel.embedded.captions import unknown_part

    usual = EMBEDDED_SIZE_PX if model is None else (None, None)
    width, height = width or usual[0], height or usual[1]
    if not prompt.strip():
        raise ErnieAccelError("the prompt is empty; write what to draw")
    if problem := text_problem(prompt):
        raise ErnieAccelError(f"the prompt {problem}")
    if problem := size_problem(width, height, 16):
        raise ErnieAccelError(problem)
    try:
        row = Row(line=1, index=0, prompt=prompt, file_name=out.name, seed=seed, width=width, height=height)
    except ValueError as error:  # the name of the picture
        raise ErnieAccelError(f"--out {out}: {error}") from error
    if model is None and (reason := unknown_part(prompt)) is not None:
        why = f"no model is named, and the embedded demo model draws nothing but flat shapes ({reason})"
        typer.echo(f"note: {why}; name one: --model {REAL_MODEL}", err=True)
    pipe, the_report = load_and_optimize(model, dtype, preset, skip_unsupported)
    result = next(produce(pipe, [row], out.parent, overwrite=True, resume=False, progress=False))
    if result.error is not None:
        raise ErnieAccelError(f"the picture failed: {result.error}")
    typer.echo(the_report.to_json() if as_json else str(the_report))
    typer.echo(f"{result.path} in {result.seconds:.1f} s, compilation included", err=as_json)


app.command("batch")(batch_command)


app.command("evaluate")(evaluate_command)


@app.command("info")
def info_command() -> None:
    """Say what is installed, which presets can run here, and why others cannot."""
    from ernie_accel import __version__, demo
    from ernie_accel.api import plan
    from ernie_accel.core.context import OPTIONAL_PACKAGES, Context
    from ernie_accel.recipes.presets import presets

    context = Context.detect()
    typer.echo(f"ernie-accel {__version__} on {context}")
    for package, version in context.versions.items():
        typer.echo(f"  {package:16} {version}")
    for package in OPTIONAL_PACKAGES:
        for reason in context.missing(package):
            typer.echo(f"  {package:16} - {reason}")
    _load_quietly(None)
    pipe = demo.load()
    typer.echo("Presets:")
    for preset in presets.values():
        the_plan = plan(pipe, preset=preset, context=context)
        typer.echo(f"  {preset.name:16} {'can run here' if the_plan.ok else 'cannot run here'}: {preset.summary}")
        for line in the_plan.problem_lines():
            typer.echo(f"    {line}")


def load_and_optimize(
    model: str | None, dtype: str, preset: str | None, skip_unsupported: bool
) -> tuple[Pipeline, Report]:
    """Load and optimize a pipeline; a preset that does not exist is refused before anything is loaded."""
    from ernie_accel.api import optimize, report
    from ernie_accel.core.context import Context
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.recipes.recommend import fitting_preset
    from ernie_accel.storage.loading import load_pipeline

    chosen = find_preset(preset) if preset else fitting_preset(Context.detect())
    _load_quietly(model)
    pipe = load_pipeline(model, dtype)
    pipe.set_progress_bar_config(disable=True)
    # A preset that nobody chose by name may lose a part that cannot run here; the report names it.
    optimize(pipe, preset=chosen, on_unsupported="skip" if skip_unsupported or preset is None else "error")
    return pipe, report(pipe)


def _load_quietly(model: str | None) -> None:
    """Show no loading bar for the embedded model, which loads in a second; a large one keeps it."""
    if model is None:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of ours is one message and exit code 2, not a traceback."""
    # A command prints its own progress; the libraries' loading bars and notices would drown it.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(arguments)
    except ErnieAccelError as error:
        text = str(error).replace("pass on_unsupported='skip'", "pass --skip-unsupported")
        typer.echo(f"error: {text}", err=True)
        raise SystemExit(2) from None
