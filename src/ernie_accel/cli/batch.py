"""The command ``ernie-accel batch``: options in, pictures and an exit code out."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ernie_accel.batch.errors import BatchInputError, BatchOutputError, shown
from ernie_accel.batch.input.job import EMBEDDED_MODEL, Job, key_in, plan_job
from ernie_accel.batch.input.options import OPTION_OF, OPTIONS, REAL_MODEL, Option
from ernie_accel.common.language import localized, said, say
from ernie_accel.common.text import one_line
from ernie_accel.embedded import SIZE_PX

if TYPE_CHECKING:
    from ernie_accel.batch.engines import Engine
    from ernie_accel.batch.errors import Problem
    from ernie_accel.batch.input.row import Row
    from ernie_accel.batch.watch.metrics import MetricsServer
    from ernie_accel.core.components import CallablePipeline
    from ernie_accel.transforms.scheduler.swap_scheduler import SwapScheduler

EXIT_FAILED, EXIT_SIGNAL = 3, 128
"""Exit codes: some rows failed; the number of a signal is added to the second, as shells do it: 130 for Ctrl-C."""

_POWER_EVERY_S = 5.0
_SHOWN_PROMPTS = 5  # of those the embedded model cannot draw
_COMPILING_SLOTS = ("compile", "vae-compile")
_REFINER_MODEL, _REFINER_PRESET = "refiner model", "refiner preset"
_FACTS = ("model", "transformer", "preset", "sampler", "prompt enhancer", _REFINER_MODEL, _REFINER_PRESET)


def batch_command(table: Path, **given: Any) -> None:
    """Make the pictures of a table; run it again to resume.

    Exit codes: 0 all done, 2 refused, 3 some failed, 130 interrupted, 143 terminated.
    """
    named = {option.name: given.get(option.command) for option in OPTIONS.values()}
    code = run_job(plan_job(table, {name: value for name, value in named.items() if value is not None}))
    if code:
        raise typer.Exit(code)


def _parameter(option: Option) -> inspect.Parameter:
    """Return an option as typer reads one; not given is None, so that a job file can say it."""
    declared: Any = list[str] if option.kind is tuple else option.kind
    annotation: object
    if option.name == "input_file":
        annotation, default = Annotated[declared, typer.Argument(help=option.help)], inspect.Parameter.empty
    else:
        flag = option.command.replace("_", "-")
        # A switch that is off can only be turned on.
        spelt = (f"--{flag}/--no-{flag}" if option.default else f"--{flag}",) if option.kind is bool else ()
        setting = typer.Option(*spelt, min=option.low, max=option.high, help=option.help)
        annotation, default = Annotated[declared | None, setting], None
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(option.command, kind, default=default, annotation=annotation)


batch_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads it
    [_parameter(option) for option in OPTIONS.values()], return_annotation=None
)


def run_job(job: Job) -> int:
    """Run a job, print how it went, and return the exit code."""
    with _removing_empty_folders(job):
        return _run_job(job)


@contextmanager
def _removing_empty_folders(job: Job) -> Iterator[None]:
    """If a with-block fails, remove the empty folders that it made."""
    files = (path for path in (job.log_json, job.prometheus) if path is not None)
    folders = {job.output_dir, *(path.parent for path in files)}
    missing = {each for folder in folders for each in (folder, *folder.parents) if not os.path.lexists(each)}
    with ExitStack() as on_failure:
        for folder in sorted(missing, key=lambda folder: len(folder.parts)):  # undone in reverse, the inmost first
            on_failure.callback(_remove_if_empty, folder)
        yield
        on_failure.pop_all()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or was not made
        folder.rmdir()


def _run_job(job: Job) -> int:
    from ernie_accel.batch.line.produce import check_folder, renew_manifest

    if job.uses_embedded:
        named = say(
            "Model: the {model}; for other pictures name one: --model {real}",
            model=said(EMBEDDED_MODEL),
            real=REAL_MODEL,
        )
        typer.echo(named)
    for note in job.notes():
        typer.echo(say("note: {note}", note=note), err=True)
    skipped: list[Problem] = []
    rows = job.rows(SIZE_PX if job.uses_embedded else None, skipped)
    for line, problem in skipped:
        typer.echo(say("{file}:{line}: left out: {problem}", file=job.input_file, line=line, problem=problem), err=True)
    for note in _unused(job, rows):
        typer.echo(say("note: {note}", note=note), err=True)
    if job.uses_embedded and not job.demo_model:
        _refuse_what_the_demo_cannot_draw(job, rows)
    power = _Power(job)
    _check_outputs(job)
    with _metrics(job) as metrics:
        facts = _facts(job)
        anything = check_folder(
            rows,
            job.output_dir,
            seed=job.seed,
            overwrite=job.overwrite,
            sift=job.sifting(),
            facts=dict.fromkeys(_FACTS) | facts,
            files=_written_files(job),
        )
        # With image servers there is no model to load, and only their engine can tell whether its settings have
        # changed.
        if not anything and not job.endpoint:
            renew_manifest(rows, job.output_dir, seed=job.seed, overwrite=job.overwrite)
            _report(job, power)
            typer.echo(
                say("Nothing to do, {count} rows were finished before: {where}", count=len(rows), where=_where(job))
            )
            return 0
        if reason := _skip_compile_reason(job, rows):
            typer.echo(say("Not compiled: {reason} (--preset {preset})", reason=reason, preset=facts["preset"]))
            job = job.model_copy(update={"compiled": False})
        engine = _engine(job, facts)
        refiner = _refiner(job, facts)
        start = time.perf_counter()
        with _interruptible() as interrupted:
            done, failed, rejected = _make(
                job, rows, engine, refiner, facts, metrics, lambda: bool(interrupted), power.look
            )
        seconds = time.perf_counter() - start
    before = len(rows) - done - failed - rejected
    _report(job, power)
    rest = say(", {count} rejected", count=rejected) if rejected else ""
    if before and interrupted:
        rest += say(", {count} not begun", count=before)
    elif before:
        rest += say(", {count} done before or not begun", count=before)
    summary = "{done} succeeded, {failed} failed{rest}, in {seconds:.1f} s: {where}"
    typer.echo(say(summary, done=done, failed=failed, rest=rest, seconds=seconds, where=_where(job)))
    if interrupted:
        typer.echo(say("Interrupted; run the same command again to resume."), err=True)
        return EXIT_SIGNAL + interrupted[0]
    return EXIT_FAILED if failed or rejected else 0


def _report(job: Job, power: _Power) -> None:
    from ernie_accel.batch.output.report import write_report

    if job.report:
        write_report(
            job.output_dir,
            gpu_price=job.gpu_price,
            power_price=job.power_price,
            watts=power.watts,
            overwrite=job.overwrite,
        )


def _written_files(job: Job) -> Sequence[str]:
    """Return the names of what a job writes beside its pictures."""
    from ernie_accel.batch.output.ledger import MANIFESTS
    from ernie_accel.batch.output.report import REPORTS

    return (*MANIFESTS, *REPORTS) if job.report else MANIFESTS


def _check_outputs(job: Job) -> None:
    """Refuse a folder or file that cannot be written before the model is loaded, not after."""
    from ernie_accel.batch.output.folder import OutputFolder
    from ernie_accel.batch.watch.telemetry import refuse_state_files

    OutputFolder(job.output_dir, create=True).close()
    for path in filter(None, (job.log_json, job.prometheus)):
        OutputFolder(path.parent, create=True).close()
    refuse_state_files(job.output_dir, job.log_json, job.prometheus)
    for name in _written_files(job):  # whatever may be overwritten: without its table no job can be resumed
        if (job.output_dir / name).resolve() == job.input_file.resolve():
            reason = said(
                "the job would replace its own table, {name}; rename the table, or choose another output",
                name=shown(name),
            )
            raise BatchOutputError(job.output_dir, [(None, reason)])


class _Power:
    """The power drawn while pictures are made, for their cost; afterwards the GPU would be idle."""

    def __init__(self, job: Job) -> None:
        from ernie_accel.batch.output import report

        self._given, self._samples, self._next = job.watts, list[float](), 0.0
        self._wanted = job.report and job.power_price is not None and job.watts is None
        if self._wanted and report.measured_watts() is None:
            raise report.no_watts()

    def look(self) -> None:
        """Measure, at most every few seconds."""
        from ernie_accel.batch.output import report

        if self._wanted and time.monotonic() >= self._next and (watts := report.measured_watts()) is not None:
            self._samples.append(watts)
            self._next = time.monotonic() + _POWER_EVERY_S

    @property
    def watts(self) -> float | None:
        """As given, or the mean of what was measured."""
        return statistics.fmean(self._samples) if self._samples else self._given


def _make(
    job: Job,
    rows: Sequence[Row],
    engine: Engine,
    refiner: Engine | None,
    facts: Mapping[str, str],
    metrics: MetricsServer | None,
    stop: Callable[[], bool],
    look: Callable[[], None],
) -> tuple[int, int, int]:
    """Make the pictures, name those that failed, and return how many were made, failed and were rejected."""
    from ernie_accel.batch.line.produce import produce_job

    done = failed = rejected = 0
    try:
        _note_run(job)
        results = produce_job(
            job,
            engine,
            rows,
            refiner=refiner,
            facts=facts,
            progress=say("demo model, shapes only") if job.uses_embedded else True,
            metrics=metrics,
            stop=stop,
        )
        for result in results:
            look()
            done += result.error is None
            rejected += result.rejected
            failed += result.error is not None and not result.rejected
            if result.error is not None:
                where = f"{job.input_file}:{result.row.line}: {result.row.path}"
                failure = result.error if result.rejected else say("failed: {error}", error=result.error)
                typer.echo(f"{where} {localized(failure)}", err=True)
    finally:
        with ExitStack() as closing:  # both, whatever one raises
            for each in filter(None, (engine, refiner)):
                closing.callback(each.close)
    return done, failed, rejected


@contextmanager
def _metrics(job: Job) -> Iterator[MetricsServer | None]:
    """Serve the job's metrics if that was asked for, from now: a port in use must not cost loading a model."""
    from ernie_accel.batch.watch.metrics import MetricsServer

    if job.metrics_port is None:
        yield None
        return
    with MetricsServer(job.metrics_port, host=job.metrics_host) as metrics:
        typer.echo(f"Metrics: {metrics.url}", err=True)
        yield metrics


def _facts(job: Job) -> dict[str, str]:
    """Return what a job's pictures say about how they were made; to know it, nothing is loaded."""
    if job.endpoint:
        return {"model": job.model} if job.model else {}
    facts = {"model": job.model or EMBEDDED_MODEL, "preset": _preset_name(job, job.model, job.preset)}
    if job.transformer is not None:
        facts["transformer"] = job.transformer.name
    if job.sampler is not None:
        facts["sampler"] = job.sampler
    if job.no_enhancer:
        facts["prompt enhancer"] = "off"
    if job.refine_model is not None:
        facts |= {_REFINER_MODEL: job.refine_model, _REFINER_PRESET: _preset_name(job, job.refine_model, None)}
    return facts


def _engine(job: Job, facts: Mapping[str, str]) -> Engine:
    """Return the engine that a job asks for."""
    from ernie_accel.batch.engines import LocalEngine

    if job.endpoint:
        from ernie_accel.batch.engines.http import HttpEngine

        return HttpEngine(
            job.endpoint,
            server=job.server,
            concurrency=job.max_concurrent,
            enhancer=job.enhancer,
            model=job.model,
            api_key=key_in(job.api_key_env),
            enhancer_api_key=key_in(job.enhancer_api_key_env),
        )
    load = functools.partial(_load, job, facts["preset"])
    if job.ray_actors:
        from ernie_accel.batch.engines.ray import RayEngine

        return RayEngine(load, actors=job.ray_actors, num_gpus=job.ray_gpus, max_batch=job.batch_size)
    if job.timeout is not None:
        from ernie_accel.batch.engines.process import ProcessEngine

        return ProcessEngine(load, max_batch=job.batch_size, free_encoders=job.free_encoders)
    from ernie_accel.api import report

    pipe = load()
    typer.echo(str(report(pipe)))
    return LocalEngine(pipe, max_batch=job.batch_size, free_encoders=job.free_encoders)


def _refiner(job: Job, facts: Mapping[str, str]) -> Engine | None:
    """Return the engine of second passes, if they have a model of their own."""
    if job.refine_model is None:
        return None
    from ernie_accel.batch.engines import LocalEngine

    load = functools.partial(_load_refiner, job, job.refine_model, facts[_REFINER_PRESET])
    if job.timeout is not None:
        from ernie_accel.batch.engines.process import ProcessEngine

        return ProcessEngine(load, max_batch=job.batch_size, free_encoders=job.free_encoders)
    return LocalEngine(load(), max_batch=job.batch_size, free_encoders=job.free_encoders)


def _preset_name(job: Job, model: str | None, asked_for: str | None) -> str:
    """Return the preset to use; one that does not exist is refused before anything is loaded.

    What `save` wrote has its transforms already, and gets no other preset unless one is named.
    """
    from ernie_accel.core.context import Context
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.recipes.recommend import fitting_preset
    from ernie_accel.storage.loading import saved_name, was_saved_here

    if asked_for:
        return find_preset(asked_for).name
    if model is not None and was_saved_here(model):
        return saved_name(model)
    return find_preset(job.preset).name if job.preset else fitting_preset(Context.detect(), model=model).name


def _load(job: Job, preset: str) -> CallablePipeline:
    """Load and optimize a pipeline as the job says, here or in another process."""
    from ernie_accel.api import load
    from ernie_accel.storage.loading import check_makes_pictures, was_saved_here
    from ernie_accel.transforms.scheduler.swap_scheduler import SwapScheduler

    swaps = () if job.sampler is None else (SwapScheduler(job.sampler),)
    if job.model is not None and was_saved_here(job.model):
        check_makes_pictures(job.model)
        saved = load(
            job.model, *swaps, preset=job.preset or "auto", prompt_enhancer=not job.no_enhancer, dtype=job.dtype,
            on_unsupported="skip" if job.skip_unsupported else "error", transformer=job.transformer,
        )  # fmt: skip
        saved.set_progress_bar_config(disable=True)
        return saved
    if job.model is None:  # it loads in a second; a large one keeps its loading bar
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
    return _load_plain(job, job.model, preset, swaps, transformer=job.transformer, prompt_enhancer=not job.no_enhancer)


def _load_refiner(job: Job, model: str, preset: str) -> CallablePipeline:
    """Load and optimize the pipeline of second passes, likewise; prompts come to it as they were enhanced before."""
    from ernie_accel.api import load
    from ernie_accel.storage.loading import check_makes_pictures, was_saved_here

    if was_saved_here(model):
        check_makes_pictures(model)
        saved = load(model, preset="auto", prompt_enhancer=False)
        saved.set_progress_bar_config(disable=True)
        return saved
    # Its steps and guidance are those of second passes, so those that a preset would give it are of no use.
    return _load_plain(job, model, preset, prompt_enhancer=False, without=("call-defaults",))


def _load_plain(
    job: Job,
    model: str | None,
    preset: str,
    swaps: tuple[SwapScheduler, ...] = (),
    *,
    transformer: Path | None = None,
    prompt_enhancer: bool,
    without: tuple[str, ...] = (),
) -> CallablePipeline:
    """Load a pipeline that `save` did not write, and apply a preset; `without` names slots that are left out."""
    from ernie_accel.api import optimize, plan
    from ernie_accel.core.errors import UnsupportedError
    from ernie_accel.recipes.presets import find_preset
    from ernie_accel.storage.loading import load_pipeline

    pipe = load_pipeline(
        model, job.dtype, prompt_enhancer=prompt_enhancer, pictures=True, on_host=True, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    if swaps and not (the_plan := plan(pipe, *swaps)).ok:
        raise UnsupportedError(the_plan)  # even where a preset's parts may be left out, a sampler asked for may not
    chosen = find_preset(preset)
    without += () if job.compiled else _COMPILING_SLOTS
    chosen = replace(chosen, transforms=tuple(t for t in chosen.transforms if t.slot not in without))
    # A preset that was not chosen by name may lose a part that cannot run here; the report names it.
    lenient = job.skip_unsupported or job.preset is None
    return optimize(pipe, *swaps, preset=chosen, on_unsupported="skip" if lenient else "error")


def _where(job: Job) -> str:
    folder = str(job.output_dir.resolve())
    if not job.uses_embedded:
        return folder
    return say("{folder}, made with the {model}", folder=folder, model=said(EMBEDDED_MODEL))


def _unused(job: Job, rows: Sequence[Row]) -> list[str]:
    """Return the options that say what every row says itself, in words."""
    notes = []
    columns = {name: option for name, option in OPTION_OF.items() if name in job.defaults()}
    if job.seed:
        columns["seed"] = "seed"
    for name, option in columns.items():
        if all(row.columns.get(name, "").strip() for row in rows):
            notes.append(said("{option} has no effect: every row has a {name} of its own", option=option, name=name))
    if job.template is not None and "{prompt}" not in job.template and any("prompt" in row.columns for row in rows):
        notes.append(
            said("the column 'prompt' has no effect: template makes the prompts; to use both, write {{prompt}} in it")
        )
    return notes


def _refuse_what_the_demo_cannot_draw(job: Job, rows: Sequence[Row]) -> None:
    """Refuse prompts that are not about the embedded model's few shapes; it would draw some shape or other.

    Raises:
        BatchInputError: There are such prompts.
    """
    from ernie_accel.embedded.captions import unknown_part

    unknown = [(row, reason) for row in rows if (reason := unknown_part(row.prompt)) is not None]
    if not unknown:
        return
    problems: list[Problem] = [
        (
            None,
            said(
                "no model is named, and the embedded demo model draws nothing but flat shapes, such as 'a large red "
                "circle in the center on a cream background'; name a model (--model {model}), or see its shapes all "
                "the same (--demo-model)",
                model=REAL_MODEL,
            ),
        )
    ]
    problems += [(row.line, f"{reason}: {one_line(row.prompt, 80)!r}") for row, reason in unknown[:_SHOWN_PROMPTS]]
    if len(unknown) > _SHOWN_PROMPTS:
        more = len(unknown) - _SHOWN_PROMPTS
        problems.append((None, said("{more:,} more prompts of {all:,} are like these", more=more, all=len(rows))))
    raise BatchInputError(job.input_file, problems)


def _skip_compile_reason(job: Job, rows: Sequence[Row]) -> str | None:
    """Return why the default preset should not be compiled for this job; None if it should, or one was chosen."""
    if not job.uses_embedded or job.preset is not None:
        return None
    from ernie_accel.batch.line.compile_rule import skip_compile_reason
    from ernie_accel.core.context import Context

    return skip_compile_reason(rows, Context.detect())


def _note_run(job: Job) -> None:
    """Remember for the report what makes the pictures."""
    from ernie_accel.batch.output.runs import note_run

    if job.endpoint:
        servers = "1 image server" if len(job.endpoint) == 1 else f"{len(job.endpoint)} image servers"
        note_run(job.output_dir, f"{servers} ({job.server})", {})
        return
    from ernie_accel.core.context import Context

    context = Context.detect()
    actors = f"{job.ray_actors} Ray actors, started from " if job.ray_actors else ""
    note_run(job.output_dir, f"{actors}{context}", context.versions)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Finish the batch on Ctrl-C or SIGTERM, noted in the list yielded; a second one ends the process immediately.

    That is safe: a job can be killed at any moment and resumed from its ledger.
    """
    signals: list[int] = []
    finishing = say("Finishing the batch under way; Ctrl-C again to stop at once.")

    def note(number: int, frame: FrameType | None) -> None:
        if signals:
            os._exit(EXIT_SIGNAL + number)
        signals.append(number)
        typer.echo(f"\n{finishing}", err=True)

    with ExitStack() as handlers:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers.callback(signal.signal, number, signal.getsignal(number))
            signal.signal(number, note)
        yield signals
