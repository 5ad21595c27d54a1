"""Trains a miniature from nothing: `python -m tools.embedded_model.train --out FOLDER [--architecture z-image]`.

Stages, each with its own seed and its own weights in FOLDER/stages, which `--resume` takes up again:

1. tokenizer: byte-level BPE on captions; and the captions themselves;
2. vae: reconstruct drawings, with a little noise on the latents; then the patchified latents' statistics;
Z-Image and Lumina 2 take that of the embedded model;
3. transformer: encode a pool of drawings once, then flow matching from the pool, together with the text
encoder, which can go on where an interrupted run has saved it last; 4. enhancer, of ERNIE-Image alone: next-token
prediction on short prompts answered by full captions; 5. save the pipeline in float16, load it again, and measure that.

Numbers of steps are fixed, not wall-clock budgets. On one NVIDIA H200 the full recipe takes about a quarter
of an hour; `--toy` runs every stage on a CPU in half a minute, and draws nothing recognisable.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import AutoTokenizer

from ernie_accel.common.atomic import write_atomically
from ernie_accel.core.undo import Undo
from ernie_accel.demo.judge import adherence, unseen_prompts
from ernie_accel.embedded.scenes import CANVASES, SceneBatch, render_batch
from ernie_accel.models.replays import Capture, Replays
from ernie_accel.models.token_layout import remember_lengths
from ernie_accel.storage.embedded import load_folder
from tools.embedded_model import architecture, miniatures
from tools.embedded_model.corpus import TEXT_TOKENS, CaptionedScenes, Dialogues, captioned_scenes, dialogues
from tools.embedded_model.evaluate import describe, evaluate, summary
from tools.embedded_model.miniatures import MINIATURES, PROMPT_START, Miniature, patchify

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2
    from transformers import Ministral3ForCausalLM

_TEXT_BUCKETS = (24, 48, TEXT_TOKENS)
"""Captions are padded to the first of these that holds them."""
_MOST_GRAPHS = 32
"""Of training steps; batches come in some 15 shapes."""


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training run.

    Attributes:
        scenes: Scenes in the pool, per canvas.
        captions: Captions of each scene.
        dialogues: Prompts with answers for the enhancer.
        vae_steps: Optimizer steps, likewise `dit_steps` and `pe_steps`.
        vae_batch: Pictures a step, likewise `dit_batch`; dialogues for `pe_batch`.
        vae_lr: Peak learning rate, likewise `dit_lr` and `pe_lr`; linear warm-up, then cosine to a hundredth.
        keep_every: Optimizer steps between checkpoints of the transformer stage, which `--resume` goes on from.
        empty_share: Captions replaced by the empty prompt, for guidance.
        ema: Decay of the averaged transformer and text encoder, which are what is saved.
        eval_prompts: Unseen prompts of the final measurement, at each number of steps.
        eval_requests: Short prompts of the final measurement.
        workers: Processes that write captions; 0 is this one.
        seed: Of everything.
    """

    scenes: int = 60_000
    captions: int = 4
    dialogues: int = 400_000
    vae_steps: int = 4_500
    vae_batch: int = 128
    vae_lr: float = 2e-3
    dit_steps: int = 20_000
    dit_batch: int = 512
    dit_lr: float = 1e-3
    keep_every: int = 500
    empty_share: float = 0.1
    ema: float = 0.999
    pe_steps: int = 20_000
    pe_batch: int = 256
    pe_lr: float = 2e-3
    eval_prompts: int = 1_000
    eval_requests: int = 500
    workers: int = 14
    seed: int = 0


_IN_COMMAND = ("scenes", "vae_steps", "dit_steps", "dit_batch", "pe_steps", "eval_prompts", "workers")
"""Numbers of a recipe that the command line can change."""

TOY = Recipe(
    scenes=8,
    captions=2,
    dialogues=16,
    vae_steps=3,
    vae_batch=2,
    dit_steps=3,
    dit_batch=4,
    pe_steps=3,
    pe_batch=4,
    eval_prompts=2,
    eval_requests=2,
    workers=0,
)


def train(
    out: Path, recipe: Recipe, device: str, *, resume: bool = False, miniature: Miniature = MINIATURES["ernie-image"]
) -> Any:
    """Run every stage; leave the pipeline in out/model, figures in out/figures.json, pictures in
    out/sheet.png.

    Returns:
        The pipeline as loaded again from its files, in float32, on `device`.
    """
    clock = _Clock()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    stages = out / "stages"
    stages.mkdir(parents=True, exist_ok=True)

    with clock("tokenizer"):
        tokenizer = _tokenizer(stages / "tokenizer", recipe, resume, miniature)
    with clock("captions"):
        data = [_captions(stages, tokenizer, canvas, recipe, resume, miniature) for canvas in CANVASES]
        lengths = torch.cat([d.lengths.flatten() for d in data]).float()
        _log(f"caption tokens: mean {lengths.mean():.0f}, from {lengths.min():.0f} to {lengths.max():.0f}")
    with (
        clock("vae"),
        _stage(stages / "vae.safetensors", miniature.build_vae, recipe.seed, device, resume) as (vae, is_new),
    ):
        if is_new and miniature.trains_vae:
            train_vae(vae, data[0].scenes.to(device), recipe)
    with (
        clock("transformer"),
        _stage(stages / "transformer.safetensors", partial(_Denoiser, miniature), recipe.seed + 1, device, resume) as (
            denoiser,
            is_new,
        ),
    ):
        if is_new:
            empty = tokenizer(miniature.frame.empty)["input_ids"]
            pool = LatentPool(vae, data, recipe, device, miniature, empty)
            train_denoiser(denoiser, pool, recipe, stages / "unfinished.pt", resume)
    if not miniature.has_enhancer:
        miniatures.save(out / "model", denoiser.transformer, denoiser.text_encoder, tokenizer)
        with clock("evaluation"):
            pipe = miniatures.load(out / "model", miniature.name).to(device)
            pipe.set_progress_bar_config(disable=True)
            figures = {
                f"adherence_{n}_steps": asdict(
                    adherence(pipe, recipe.eval_prompts, n, guidance_scale=miniature.guidance_scale, batch_size=64)
                )
                for n in (9, 20)
            }
            save_sheet(pipe, out / "sheet.png", miniature.guidance_scale, columns=2 if recipe.workers == 0 else 8)
        _write_figures(out, pipe, figures, recipe, clock.seconds)
        return pipe
    enhancer_tokenizer = _enhancer_tokenizer(tokenizer)
    with (
        clock("enhancer"),
        _stage(
            stages / "enhancer.safetensors",
            architecture.build_prompt_enhancer,
            recipe.seed + 2,
            device,
            resume,
        ) as (enhancer, is_new),
    ):
        if is_new:
            lessons = dialogues(enhancer_tokenizer, recipe.dialogues, recipe.workers)
            train_enhancer(enhancer, lessons, recipe)
    save_pipeline(out / "model", vae, denoiser, enhancer, tokenizer, enhancer_tokenizer)
    with clock("evaluation"):
        pipe = _reload(out / "model", device)
        figures = evaluate(pipe, recipe.eval_prompts, recipe.eval_requests, batch_size=64)
        save_sheet(pipe, out / "sheet.png", miniature.guidance_scale, columns=2 if recipe.workers == 0 else 8)
    _write_figures(out, pipe, figures, recipe, clock.seconds)
    return pipe


def _captions(
    stages: Path, tokenizer: Any, canvas: tuple[int, int], recipe: Recipe, resume: bool, miniature: Miniature
) -> CaptionedScenes:
    """Return the captioned scenes of a canvas (height, width), from an earlier run if there are as many; save them."""
    file = stages / f"captions_{canvas[0]}x{canvas[1]}.safetensors"
    if resume and file.exists():
        found = load_file(file)
        if found["lengths"].shape == (recipe.scenes, recipe.captions):
            scenes = SceneBatch(*(found[name] for name in ("objects", "in_front", "background")), *canvas)
            return CaptionedScenes(scenes, found["tokens"], found["lengths"])
    made = captioned_scenes(tokenizer, canvas, recipe.scenes, recipe.captions, recipe.workers, miniature.frame)
    scenes = made.scenes
    tensors = {"objects": scenes.objects, "in_front": scenes.in_front, "background": scenes.background}
    save_file(tensors | {"tokens": made.tokens, "lengths": made.lengths}, file)
    return made


class _Clock:
    """Logs and keeps the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        _log(f"== {name}")
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        _log(f"== {name}: {self.seconds[name]} s")


def _log(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _stage(file: Path, build: Callable[[], Any], seed: int, device: str, resume: bool) -> Iterator[tuple[Any, bool]]:
    """Yield a seeded module and whether it must be trained; save it at the end if it was."""
    torch.manual_seed(seed)
    module = build().to(device)
    if resume and file.exists():
        load_model(module, file)
        _log(f"took {file.name} from an earlier run")
        yield module, False
    else:
        yield module, True
        save_model(module, str(file))
    module.eval().requires_grad_(False)


def _cosine_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    warm_up = max(steps // 50, 1)
    rate = peak * min(1.0, (step + 1) / warm_up) * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = rate


class _Progress:
    """Logs the loss and the speed every so many steps."""

    def __init__(self, name: str, steps: int, every: int = 250) -> None:
        self._name, self._steps, self._every = name, steps, every
        self._since = time.monotonic()

    def __call__(self, step: int, loss: torch.Tensor) -> None:
        if (step + 1) % self._every == 0 or step + 1 == self._steps:
            value, now = loss.item(), time.monotonic()
            speed = self._every / (now - self._since)
            _log(f"{self._name} {step + 1}/{self._steps} loss {value:.4f} {speed:.1f} steps/s")
            self._since = now


def _descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _compiled(function: Callable[..., torch.Tensor], device: str) -> Callable[..., torch.Tensor]:
    """Compile for a GPU; a toy run on a CPU ends before a compiler would have started."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function


def train_vae(vae: AutoencoderKLFlux2, scenes: SceneBatch, recipe: Recipe) -> None:
    """Fit the VAE to drawings, then set its batch-norm statistics to those of the patchified latents, in
    place.

    A little noise on the latents and a weak pull to zero keep the latent space smooth, so that the
    transformer's small errors stay small in pixels.
    """
    device = vae.device.type
    generator = torch.Generator(device).manual_seed(recipe.seed)
    vae.train().to(memory_format=torch.channels_last)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.vae_lr, betas=(0.9, 0.95), fused=device == "cuda")
    progress = _Progress("vae", recipe.vae_steps)

    def loss_of(pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean = vae.encode(pictures).latent_dist.mean
        rebuilt = vae.decode(mean + 0.1 * noise).sample.float()
        error = F.l1_loss(rebuilt, pictures) + F.mse_loss(rebuilt, pictures)
        loss: torch.Tensor = error + 2e-4 * mean.float().pow(2).mean()
        return loss

    compute_loss = _compiled(loss_of, device)
    for step in range(recipe.vae_steps):
        _cosine_lr(optimizer, recipe.vae_lr, step, recipe.vae_steps)
        rows = torch.randint(len(scenes), (recipe.vae_batch,), device=device, generator=generator)
        pictures = render_batch(scenes.take(rows), generator) * 2 - 1
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        latent_shape = (recipe.vae_batch, architecture.LATENT_CHANNELS, scenes.height // 8, scenes.width // 8)
        noise = torch.randn(latent_shape, device=device, generator=generator)
        with torch.autocast(device, torch.bfloat16):
            loss = compute_loss(pictures, noise)
        _descend(optimizer, loss, parameters)
        progress(step, loss)
    vae.eval()
    rows = torch.randint(len(scenes), (min(4096, 4 * len(scenes)),), device=device, generator=generator)
    latents = patchify(encode(vae, scenes.take(rows), generator))
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, scenes: SceneBatch, generator: torch.Generator, batch: int = 256) -> torch.Tensor:
    """Draw scenes and return their latents before normalization: float32 [N, C, H / 8, W / 8]."""
    device = vae.device
    latents = []
    for start in range(0, len(scenes), batch):
        rows = torch.arange(start, min(start + batch, len(scenes)), device=device)
        pictures = render_batch(scenes.take(rows), generator) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            mean = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        latents.append(mean.float())
    return torch.cat(latents)


@dataclass(frozen=True)
class TrainingBatch:
    """`latents` as the transformer sees them, `tokens` int64 [B, T] padded at the right, `lengths` int64 [B]."""

    latents: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor


class LatentPool:
    """All scenes encoded once, on the training device. A batch has one canvas and one padded caption length.

    One caption of each batch is as long as any of its bucket, so that the batches of a bucket are of one shape.
    """

    def __init__(
        self,
        vae: Any,
        data: Sequence[CaptionedScenes],
        recipe: Recipe,
        device: str,
        miniature: Miniature,
        empty: Sequence[int],
    ) -> None:
        """Encode all scenes.

        Args:
            vae: Encodes them.
            data: The scenes.
            recipe: How many are drawn.
            device: Where they are kept.
            miniature: Normalizes them.
            empty: The tokens of an empty prompt.
        """
        generator = torch.Generator(device).manual_seed(recipe.seed + 10)
        self._empty = torch.tensor(empty, device=device)
        self._latents = [
            miniature.normalized(vae, encode(vae, d.scenes.to(device), generator)).bfloat16() for d in data
        ]
        self._tokens = [d.tokens.flatten(0, 1).to(device) for d in data]
        self._lengths = [d.lengths.flatten() for d in data]  # on the host, which positions are computed from
        self._captions, self._recipe, self._device = recipe.captions, recipe, device
        self._generator = torch.Generator().manual_seed(recipe.seed + 10)
        self._rng = random.Random(recipe.seed)
        self._buckets: list[tuple[int, int, torch.Tensor]] = []
        for canvas, lengths in enumerate(self._lengths):
            for shortest, longest in zip((0, *_TEXT_BUCKETS), _TEXT_BUCKETS, strict=False):
                rows = ((lengths > shortest) & (lengths <= longest)).nonzero()[:, 0]
                if len(rows):
                    self._buckets.append((canvas, longest, rows))

    def skip(self, batches: int) -> None:
        """Draw others from now on than the first so many."""
        self._rng.seed(f"{self._recipe.seed} after {batches}")
        self._generator.manual_seed(self._recipe.seed + 11 + batches)

    def draw(self) -> TrainingBatch:
        """Draw a batch; buckets come up as often as they are large."""
        sizes = [len(rows) for _, _, rows in self._buckets]
        canvas, longest, rows = self._rng.choices(self._buckets, sizes)[0]
        lengths, n = self._lengths[canvas][rows], self._recipe.dit_batch
        order = torch.randint(len(rows), (n,), generator=self._generator)
        order[0] = self._rng.choice((lengths == lengths.max()).nonzero()[:, 0].tolist())
        empty = torch.rand(n, generator=self._generator) < self._recipe.empty_share
        empty[0] = False
        rows, lengths = rows[order], lengths[order].masked_fill(empty, len(self._empty))
        tokens = self._tokens[canvas][rows.to(self._device), :longest].long()
        empty = empty.to(self._device)
        tokens[:, : len(self._empty)] = torch.where(empty[:, None], self._empty, tokens[:, : len(self._empty)])
        latents = self._latents[canvas][(rows // self._captions).to(self._device)].float()
        there = lengths.to(self._device)
        remember_lengths(there, tuple(lengths.tolist()))
        return TrainingBatch(latents, tokens, there)


@dataclass(frozen=True)
class _Inputs:
    """What the graph of a step reads: noisy latents, noise levels, target, tokens, lengths, and positions."""

    tensors: tuple[torch.Tensor, ...]
    at: Any


class _Denoiser(nn.Module):
    """The transformer and its text encoder, which are trained together."""

    def __init__(self, miniature: Miniature) -> None:
        super().__init__()
        self.miniature = miniature
        self.transformer: Any = miniature.build_transformer()
        self.text_encoder: Any = miniature.build_text_encoder()

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, batch: TrainingBatch, at: Any | None = None
    ) -> torch.Tensor:
        """Predict the velocity, from text encoded as the pipeline does.

        The text encoder is causal and padding is at the right, so no embedding depends on the padding.

        Args:
            noisy: Latents with noise.
            sigma: Noise levels [B].
            batch: The captions.
            at: What `Miniature.positions` returned, so that nothing is read back from the device; None computes it.
        """
        language_model = self.miniature.language_model(self.text_encoder)
        states = language_model(input_ids=batch.tokens, output_hidden_states=True, use_cache=False)
        return self.miniature.velocity(self.transformer, noisy, sigma, states.hidden_states[-2], batch.lengths, at)


class _Gradients:
    """Leaves the gradients of batches in ``.grad``; the batches of each shape replay a CUDA graph of it.

    A miniature's kernels are so short that launching them one by one takes four times as long as running them.
    """

    def __init__(
        self, denoiser: _Denoiser, parameters: Sequence[nn.Parameter], device: str, capture: Capture | None = None
    ) -> None:
        """Compute nothing yet.

        Args:
            denoiser: The model, in which only values of `parameters` change from now on.
            parameters: Those that are trained.
            device: Where they are; the graphs are for "cuda".
            capture: Makes graphs, in place of CUDA.
        """
        self._denoiser, self._parameters, self._device = denoiser, parameters, device
        self._replays: Replays[_Inputs, torch.Tensor] = Replays(_MOST_GRAPHS, capture)
        self._is_graphed = capture is not None or device == "cuda"

    def __call__(self, noisy: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor, batch: TrainingBatch) -> Any:
        """Return the loss of a batch: a tensor that the next batch overwrites."""
        at = self._denoiser.miniature.positions(self._denoiser.transformer, noisy, batch.lengths, batch.tokens.shape[1])
        if at is None or not self._is_graphed:
            return self._work(noisy, sigma, target, batch.tokens, batch.lengths, at=at)
        given = (noisy, sigma, target, batch.tokens, batch.lengths, *at.tensors)
        key = tuple((x.shape, x.dtype) for x in given)
        # Positions refer to their tensors by name: those of the first batch of a shape stay, and are overwritten.
        inputs = self._replays.inputs(key, lambda: _Inputs(tuple(x.clone() for x in given[:5]), at.clone()))
        for static, x in zip((*inputs.tensors, *inputs.at.tensors), given, strict=True):
            static.copy_(x)
        return self._replays.run(key, partial(self._work, *inputs.tensors, at=inputs.at))

    @torch.enable_grad()
    def _work(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        target: torch.Tensor,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        at: Any | None,
    ) -> torch.Tensor:
        # Weights that autocast has cast must not outlive a graph, which would read them where they no longer are.
        with torch.autocast(self._device, torch.bfloat16, cache_enabled=False):
            velocity = self._denoiser(noisy, sigma, TrainingBatch(noisy, tokens, lengths), at)
        loss = F.mse_loss(velocity.float(), target)
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        pairs = [(p, grad) for p, grad in zip(self._parameters, found, strict=True) if grad is not None]
        for parameter, _ in pairs:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        torch._foreach_copy_([p.grad for p, _ in pairs], [grad for _, grad in pairs])
        return loss.detach()


def train_denoiser(
    denoiser: _Denoiser, pool: LatentPool, recipe: Recipe, unfinished: Path | None = None, resume: bool = False
) -> None:
    """Fit transformer and text encoder by flow matching, and leave their running average, in place.

    Args:
        denoiser: The two.
        pool: Draws batches.
        recipe: How long, and how fast.
        unfinished: File that keeps the state of the training every so many steps; it is removed at the end.
        resume: Go on from that file, if there is one; the batches that follow are new ones.
    """
    language_model = denoiser.miniature.language_model(denoiser.text_encoder)
    parameters = [*denoiser.transformer.parameters(), *language_model.parameters()]
    device = parameters[0].device.type
    denoiser.train()
    if device == "cuda" and denoiser.miniature.has_enhancer:  # the others are replayed as graphs
        denoiser.transformer.compile_repeated_blocks(dynamic=True)
        for layer in language_model.layers:
            layer.compile(dynamic=True)
    generator = torch.Generator(device).manual_seed(recipe.seed + 20)
    optimizer = torch.optim.AdamW(
        parameters, recipe.dit_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda"
    )
    average = [p.detach().clone() for p in parameters]
    progress, first = _Progress("transformer", recipe.dit_steps), 0
    if resume and unfinished is not None and unfinished.exists():
        kept = torch.load(unfinished, map_location=device, weights_only=True)
        first = kept["step"]
        optimizer.load_state_dict(kept["optimizer"])
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept["parameters"])
            torch._foreach_copy_(average, kept["average"])
        pool.skip(first)
        generator.manual_seed(recipe.seed + 20 + first)
        _log(f"going on after step {first}")
    with Undo() as undo:
        denoiser.miniature.made_faster(denoiser.transformer, undo)
        gradients = _Gradients(denoiser, parameters, device)
        for step in range(first, recipe.dit_steps):
            _cosine_lr(optimizer, recipe.dit_lr, step, recipe.dit_steps)
            batch = pool.draw()
            sigma = _random_sigmas(recipe.dit_batch, generator)
            noise = torch.randn(batch.latents.shape, device=device, generator=generator)
            noisy = torch.lerp(batch.latents, noise, sigma.view(-1, 1, 1, 1))
            loss = gradients(noisy, sigma, noise - batch.latents, batch)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decay = min(recipe.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - decay)
            progress(step, loss)
            if unfinished is not None and (step + 1) % recipe.keep_every == 0:
                state = {"step": step + 1, "optimizer": optimizer.state_dict(), "average": average}
                write_atomically(unfinished, _as_bytes(state | {"parameters": [p.detach() for p in parameters]}))
    undo()
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)


def _as_bytes(state: object) -> bytes:
    """Return what ``torch.load(weights_only=True)`` reads."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _random_sigmas(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels [n] in 0..1: logit-normal, then the scheduler's shift (Esser et al. 2024)."""
    u = torch.sigmoid(torch.randn(n, device=generator.device, generator=generator))
    return architecture.SHIFT * u / (1 + (architecture.SHIFT - 1) * u)


def train_enhancer(enhancer: Ministral3ForCausalLM, lessons: Dialogues, recipe: Recipe) -> None:
    """Fit the prompt enhancer to the answers of dialogues, in place."""
    device = enhancer.device.type
    tokens, is_answer = lessons.tokens.to(device), lessons.is_answer.to(device)
    generator = torch.Generator(device).manual_seed(recipe.seed + 30)
    enhancer.train()
    parameters = list(enhancer.parameters())
    optimizer = torch.optim.AdamW(
        parameters, recipe.pe_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda"
    )
    progress = _Progress("enhancer", recipe.pe_steps)

    def loss_of(ids: torch.Tensor, learn: torch.Tensor) -> torch.Tensor:
        logits = enhancer(input_ids=ids, use_cache=False).logits[:, :-1].float()
        errors = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (errors * learn[:, 1:]).sum() / learn[:, 1:].sum()

    compute_loss = _compiled(loss_of, device)
    for step in range(recipe.pe_steps):
        _cosine_lr(optimizer, recipe.pe_lr, step, recipe.pe_steps)
        rows = torch.randint(len(tokens), (recipe.pe_batch,), device=device, generator=generator)
        with torch.autocast(device, torch.bfloat16):
            loss = compute_loss(tokens[rows].long(), is_answer[rows])
        _descend(optimizer, loss, parameters)
        progress(step, loss)


def _tokenizer(folder: Path, recipe: Recipe, resume: bool, miniature: Miniature) -> Any:
    """Train the tokenizer, or take an earlier run's: weights know tokens by number."""
    if resume and folder.exists():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    more = () if miniature.has_enhancer else (PROMPT_START,)
    tokenizer = architecture.build_tokenizer(architecture.corpus(recipe.seed, 20_000), more)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _enhancer_tokenizer(tokenizer: Any) -> Any:
    twin = copy.deepcopy(tokenizer)
    twin.chat_template = architecture.CHAT_TEMPLATE
    twin.model_max_length = architecture.MAX_ENHANCED_TOKENS
    return twin


def save_pipeline(
    folder: Path, vae: Any, denoiser: _Denoiser, enhancer: Any, tokenizer: Any, enhancer_tokenizer: Any
) -> None:
    """Save the pipeline as float16 safetensors; the VAE's statistics stay float32."""
    from diffusers import ErnieImagePipeline

    pipe = ErnieImagePipeline(
        transformer=denoiser.transformer,
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        scheduler=architecture.build_scheduler(),
        pe=enhancer,
        pe_tokenizer=enhancer_tokenizer,
    )
    statistics = copy.deepcopy(vae.bn).cpu()
    for part in (vae, denoiser, enhancer):
        part.to("cpu", torch.float16)
    vae.bn = statistics
    vae.to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(folder, safe_serialization=True)
    _name_rope_as_all_releases_do(folder / "text_encoder" / "config.json")


def _name_rope_as_all_releases_do(config_file: Path) -> None:
    """Write "default" for the vision tower's RoPE: transformers before 5.17 refuses "axial"; all read this."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["vision_config"]["rope_parameters"]["rope_type"] = "default"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _reload(folder: Path, device: str) -> Any:
    """Load the stored files as users do, for strict float32 on `device`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = load_folder(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def save_sheet(pipe: Any, file: Path, guidance_scale: float = 1.0, columns: int = 8, rows: int = 4) -> None:
    """Draw unseen prompts at 8 steps and save the pictures side by side, prompts in a text file beside it."""
    from PIL import Image

    prompts = [text for text, _ in unseen_prompts(columns * rows, seed=1)]
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pictures = pipe(
        prompts,
        height=128,
        width=128,
        num_inference_steps=8,
        guidance_scale=guidance_scale,
        generator=noise,
        **({"use_pe": False} if hasattr(pipe, "pe") else {}),
    ).images
    sheet = Image.new("RGB", (columns * 132, rows * 132), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * 132 + 2, i // columns * 132 + 2))
    sheet.save(file)
    file.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def _write_figures(out: Path, pipe: Any, figures: dict[str, Any], recipe: Recipe, seconds: dict[str, float]) -> None:
    record = {
        "recipe": vars(recipe),
        "stage_seconds": seconds,
        **describe(pipe, out / "model"),
        "figures": figures,
    }
    (out / "figures.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _log(summary(figures))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the trainer from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.embedded_model.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its figures and the stages")
    parser.add_argument("--toy", action="store_true", help="a few steps of each stage, on the CPU")
    parser.add_argument("--resume", action="store_true", help="take up stages that an earlier run has finished")
    parser.add_argument("--architecture", choices=MINIATURES, default="ernie-image", help="ernie-image by default")
    for name in _IN_COMMAND:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="instead of the recipe's")
    options = parser.parse_args(arguments)
    given = {name: value for name, value in vars(options).items() if name in _IN_COMMAND and value is not None}
    device = "cuda" if torch.cuda.is_available() and not options.toy else "cpu"
    recipe = replace(TOY if options.toy else Recipe(), **given)
    train(options.out, recipe, device, resume=options.resume, miniature=MINIATURES[options.architecture])


if __name__ == "__main__":
    main()
