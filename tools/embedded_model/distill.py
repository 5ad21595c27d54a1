"""Distill a few-step LoRA for the embedded model: ``python -m tools.embedded_model.distill --out FOLDER``.

The teacher draws training captions at 20 steps. From each latent that it passes at one of the student's few noise
levels, the student learns the one velocity that leads to the teacher's latent at the next (as progressive distillation
does, arXiv 2202.00512, in one round). Only a LoRA on the MLPs is trained, so the base model stays what it was.

Writes FOLDER/few_steps.safetensors, which ``load_lora_weights`` and `FewSteps` read, and FOLDER/distillation.json with
what was measured on held-out captions. Training takes two minutes of one CPU core; with ``--toy``, seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import ernie_accel
from ernie_accel.demo.judge import adherence, unseen_prompts
from ernie_accel.embedded.captions import LANGUAGES, caption
from ernie_accel.embedded.scenes import CANVASES, random_scene
from ernie_accel.quantization.layers import sqnr_db

ADAPTER = "few_steps"
LORA_FILE, FIGURES_FILE = "few_steps.safetensors", "distillation.json"
TARGETS = ("gate_proj", "up_proj", "linear_fc2")


@dataclass(frozen=True)
class Distillation:
    """All numbers of a run.

    Attributes:
        steps: Of the student.
        teacher_steps: A multiple of `steps`, so that the student's noise levels are among the teacher's.
        captions: Training captions, spread over canvases and languages.
        batch: Captions of one canvas in a batch.
        epochs: How often each caption and noise level is learnt from.
        rank: Of the LoRA; its alpha is the same.
        learning_rate: At the start; it falls to zero along a cosine.
        judged: Held-out captions that are drawn for the figures.
        seed: Of everything.
    """

    steps: int = 4
    teacher_steps: int = 20
    captions: int = 120
    batch: int = 12
    epochs: int = 3
    rank: int = 16
    learning_rate: float = 1e-3
    judged: int = 80
    seed: int = 0


TOY = Distillation(steps=2, teacher_steps=4, captions=2, batch=2, epochs=1, rank=2, judged=2)


@dataclass(frozen=True)
class Lesson:
    """One call of the transformer by the teacher, and what the student is to answer.

    Attributes:
        inputs: Arguments of the call.
        velocity: What leads to the teacher's latents at the student's next noise level [B, C, H, W].
    """

    inputs: dict[str, Any]
    velocity: torch.Tensor


def distill(pipe: Any, recipe: Distillation, out: Path) -> dict[str, Any]:
    """Train the LoRA, write it into `out`, and return what was measured; `pipe` keeps it as an adapter."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    started = time.process_time()
    lessons: list[Lesson] = []
    for batch in batches(recipe):
        lessons += teach(pipe, *batch, recipe)
        print(f"{len(lessons)} lessons", flush=True)
    teaching = time.process_time() - started
    torch.manual_seed(recipe.seed)
    pipe.transformer.add_adapter(
        LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=list(TARGETS)), adapter_name=ADAPTER
    )
    losses = train(pipe.transformer, lessons, recipe)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.transformer, adapter_name=ADAPTER))
    halves = {name: tensor.to(torch.float16).contiguous() for name, tensor in layers.items()}
    out.mkdir(parents=True, exist_ok=True)
    pipe.save_lora_weights(out, transformer_lora_layers=halves, weight_name=LORA_FILE)
    seconds = {"teaching": round(teaching), "training": round(time.process_time() - started - teaching)}
    return {
        "cpu_seconds": seconds,
        "loss": {"first_epoch": losses[0], "last_epoch": losses[-1]},
        **measure(pipe, recipe),
    }


def batches(recipe: Distillation) -> Iterator[tuple[list[str], tuple[int, int], list[int]]]:
    """Yield captions of one canvas, the canvas, and a seed for each."""
    rng = random.Random(recipe.seed)
    for start in range(0, recipe.captions, recipe.batch):
        canvas = CANVASES[start // recipe.batch % len(CANVASES)]
        count = min(recipe.batch, recipe.captions - start)
        scenes = [random_scene(rng, canvas) for _ in range(count)]
        texts = [caption(scene, rng, LANGUAGES[i % len(LANGUAGES)]) for i, scene in enumerate(scenes)]
        yield texts, canvas, [recipe.seed * 1_000_003 + 500_000 + start + i for i in range(count)]


def teach(
    pipe: Any, texts: list[str], canvas: tuple[int, int], seeds: Sequence[int], recipe: Distillation
) -> list[Lesson]:
    """Draw with the teacher; return a lesson for each of the student's steps."""
    if recipe.teacher_steps % recipe.steps:
        raise ValueError(f"teacher_steps={recipe.teacher_steps} must be a multiple of steps={recipe.steps}")
    stride, calls = recipe.teacher_steps // recipe.steps, []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        last = draw(pipe, texts, canvas, seeds, recipe.teacher_steps)
    finally:
        handle.remove()
    latents = [call["hidden_states"] for call in calls[::stride]] + [last]
    sigmas = pipe.scheduler.sigmas[::stride].tolist()
    return [
        Lesson(call, (latents[i + 1] - latents[i]) / (sigmas[i + 1] - sigmas[i]))
        for i, call in enumerate(calls[::stride])
    ]


def draw(pipe: Any, texts: list[str], canvas: tuple[int, int], seeds: Sequence[int], steps: int) -> torch.Tensor:
    """Return the latents [B, C, H, W] of the last step."""
    last = {}

    def keep(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = given["latents"]
        return given

    pipe(
        texts,
        height=canvas[0],
        width=canvas[1],
        num_inference_steps=steps,
        guidance_scale=1.0,
        use_pe=False,
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        callback_on_step_end=keep,
    )
    return last["latents"]


def train(transformer: Any, lessons: list[Lesson], recipe: Distillation) -> list[float]:
    """Fit the LoRA to the lessons; return the mean loss of each epoch."""
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * len(lessons))
    rng, means = random.Random(recipe.seed), []
    for epoch in range(recipe.epochs):
        total = 0.0
        for lesson in rng.sample(lessons, len(lessons)):
            optimizer.zero_grad()
            loss = F.mse_loss(transformer(**lesson.inputs)[0], lesson.velocity)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        means.append(total / len(lessons))
        print(f"epoch {epoch + 1} of {recipe.epochs}: loss {means[-1]:.5f}", flush=True)
    return means


def measure(pipe: Any, recipe: Distillation) -> dict[str, Any]:
    """Compare few steps with and without the LoRA with the teacher, on held-out captions."""
    figures: dict[str, Any] = {}
    for name, steps, on in _drawn(recipe):
        with adapter(pipe, on):
            found = adherence(pipe, recipe.judged, steps)
        figures[name] = {"objects": found.objects, "right": found.object_fraction, "pictures": found.picture_fraction}
    square = [text for text, scene in unseen_prompts(8 * 16) if (scene.height, scene.width) == CANVASES[0]]
    held_out = square[: min(16, recipe.judged)]
    latents = {}
    for name, steps, on in _drawn(recipe):
        with adapter(pipe, on):
            latents[name] = draw(pipe, held_out, CANVASES[0], range(len(held_out)), steps)
    for name in list(figures)[1:]:
        figures[name]["latents_db_of_teacher"] = round(sqnr_db(latents["teacher"], latents[name]), 2)
    return figures


def _drawn(recipe: Distillation) -> list[tuple[str, int, bool]]:
    return [("teacher", recipe.teacher_steps, False), ("base", recipe.steps, False), ("student", recipe.steps, True)]


@contextmanager
def adapter(pipe: Any, on: bool) -> Iterator[None]:
    """Draw with the LoRA or without, and without gradients."""
    pipe.transformer.enable_adapters() if on else pipe.transformer.disable_adapters()
    with torch.no_grad():
        yield
    pipe.transformer.enable_adapters()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the distillation from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.embedded_model.distill", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRA and its figures")
    parser.add_argument("--toy", action="store_true", help="a few seconds, to see that it runs")
    for name in ("steps", "teacher_steps", "captions", "epochs", "rank", "judged"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the recipe's")
    options = parser.parse_args(arguments)
    given = {name: value for name, value in vars(options).items() if name not in ("out", "toy") and value is not None}
    recipe = replace(TOY if options.toy else Distillation(), **given)
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    figures = {
        "recipe": asdict(recipe),
        "hardware": f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        **distill(pipe, recipe, options.out),
    }
    (options.out / FIGURES_FILE).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
