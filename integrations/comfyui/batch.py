"""Run a batch job inside ComfyUI: its table is in the input folder, its pictures go to the output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_accel.batch.input.job import EMBEDDED_MODEL, Job, plan_text
from ernie_accel.batch.line.produce import produce_job
from ernie_accel.batch.output.report import write_report

from . import host
from .held import HeldPipe, as_written

#: Options that a workflow may not give: the loader chooses the model, and files and servers are none of its business.
_REFUSED = (
    "model", "transformer", "demo_model", "sampler", "no_enhancer", "preset", "dtype", "skip_unsupported", "endpoint",
    "server", "enhancer", "api_key_env", "enhancer_api_key_env", "ray_actors", "ray_gpus", "refine_model", "log_json",
    "prometheus", "metrics_port", "metrics_host",
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What a job came to.

    Attributes:
        folder: Where the pictures are.
        pictures: Those that were made now.
        summary: In words.
    """

    folder: Path
    pictures: list[Path]
    summary: str


def run_batch(held: HeldPipe, text: str) -> Made:
    """Run the job that `text` describes, in the JSON of job files.

    Raises:
        BatchInputError: With everything that is wrong with the job or its table.
        ErnieAccelError: All rows failed, or what `produce` raises.
        HostError: A path leads out of ComfyUI's folders.
    """
    job = _placed(plan_text(text))
    recipe = held.recipe
    rows = job.rows(held.default_size())
    facts = {"model": EMBEDDED_MODEL if recipe.is_embedded else recipe.model, "preset": recipe.preset}
    if recipe.transformer is not None:
        facts["transformer"] = recipe.transformer.name
    if recipe.loras:
        facts["loras"] = ", ".join(f"{each.path.name} x {each.scale:g}" for each in recipe.loras)
    progress = host.Progress(len(rows))
    done: dict[int, Path] = {}
    failed: list[str] = []
    with as_written():
        results = produce_job(job, held.pipe(), rows, facts=facts, progress=False, stop=host.is_interrupted)
        for result in results:
            if result.path is not None and result.error is None:
                done[result.row.index] = result.path
            else:
                failed.append(f"line {result.row.line}: {result.error}")
            if not host.is_interrupted():  # else the iterator ends by itself, with its ledger in order
                progress.show(len(done) + len(failed), len(rows))
    if job.report:
        write_report(job.output_dir, gpu_price=job.gpu_price, overwrite=job.overwrite)
    host.check_interrupt()
    before = len(rows) - len(done) - len(failed)
    lines = [f"{len(done)} pictures made, {len(failed)} failed or rejected, {before} done before"]
    lines += [*failed[:20], f"... and {len(failed) - 20} more"] if len(failed) > 20 else failed
    return Made(job.output_dir, [done[row] for row in sorted(done)], "\n".join([*job.notes(), *lines]))


def _placed(job: Job) -> Job:
    """Return a job whose paths are in ComfyUI's folders."""
    refused = [name for name in _REFUSED if name in job.asked_for]
    if refused:
        raise host.HostError(f"a job in ComfyUI cannot have {', '.join(refused)}: remove it; the loader sets the pipe")
    places: dict[str, Any] = {
        "input_file": host.in_input(job.input_file),
        "output_dir": host.in_output(job.output_dir),
        "image_root": None if job.image_root is None else host.in_input(job.image_root),
        "lora_root": None if job.lora_root is None else host.in_input(job.lora_root),
    }
    return job.model_copy(update=places)
