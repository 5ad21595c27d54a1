"""The training data: scenes with their captions, and the enhancer's dialogues, as tensors.

Captions are written by worker processes, once, before training; pictures are drawn on the training device.
Each chunk has its own seed, so the data does not depend on the number of workers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from tokenizers import Tokenizer

from ernie_accel.embedded.captions import LANGUAGES, caption, full_caption, language_of, random_request
from ernie_accel.embedded.scenes import CANVASES, Scene, SceneBatch, random_scene, to_batch
from tools.embedded_model.architecture import MAX_ENHANCED_TOKENS
from tools.embedded_model.evaluate import chat_text
from tools.embedded_model.miniatures import Frame

TEXT_TOKENS = 88
"""No training caption is longer; one that would be is written again."""
DIALOGUE_TOKENS = 192
PLAIN = Frame()
_CHUNK = 4000
_SHORT_PROMPT_SHARE = 0.2
_COPY_SHARE = 0.3
_PAD, _EOS = 0, 2


@dataclass(frozen=True)
class CaptionedScenes:
    """Scenes of one canvas.

    Attributes:
        scenes: N scenes.
        tokens: int16 [N, captions, TEXT_TOKENS], padded at the right.
        lengths: int64 [N, captions].
    """

    scenes: SceneBatch
    tokens: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Dialogues:
    """The enhancer's inputs and answers.

    Attributes:
        tokens: int16 [N, DIALOGUE_TOKENS], padded at the right.
        is_answer: bool [N, DIALOGUE_TOKENS]: the tokens to learn, the end included.
    """

    tokens: torch.Tensor
    is_answer: torch.Tensor


def captioned_scenes(
    tokenizer: Any, canvas: tuple[int, int], count: int, captions: int, workers: int, frame: Frame = PLAIN
) -> CaptionedScenes:
    """Draw `count` scenes of one canvas from the training split, each with several captions in both
    languages, within what the pipeline writes around them.
    """
    seed = f"captions-{canvas}"
    jobs = [(_caption_chunk, tokenizer, seed, (canvas, captions, frame), n, i) for i, n in enumerate(_chunks(count))]
    scenes, tokens, lengths = zip(*_run(jobs, workers), strict=True)
    batch = SceneBatch(
        torch.cat([s.objects for s in scenes]),
        torch.cat([s.in_front for s in scenes]),
        torch.cat([s.background for s in scenes]),
        *canvas,
    )
    return CaptionedScenes(batch, torch.cat(tokens), torch.cat(lengths))


def dialogues(tokenizer: Any, count: int, workers: int) -> Dialogues:
    """Write dialogues: short prompts answered by full captions, and full captions answered by themselves."""
    jobs = [(_dialogue_chunk, tokenizer, "dialogues", (), n, i) for i, n in enumerate(_chunks(count))]
    tokens, is_answer = zip(*_run(jobs, workers), strict=True)
    return Dialogues(torch.cat(tokens), torch.cat(is_answer))


def _chunks(count: int) -> list[int]:
    return [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]


def _run(jobs: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    if workers == 0:
        return [_run_job(job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_run_job, jobs))


def _run_job(job: tuple[Any, ...]) -> Any:
    make, tokenizer, seed, arguments, count, index = job
    torch.set_num_threads(1)
    write: Callable[..., Any] = make
    return write(tokenizer, random.Random(f"{seed}-{index}"), count, *arguments)


def _pad(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    return torch.tensor([[*row, *[_PAD] * (width - len(row))] for row in rows], dtype=torch.int16)


def _caption_chunk(
    tokenizer: Any, rng: random.Random, count: int, canvas: tuple[int, int], captions: int, frame: Frame
) -> tuple[SceneBatch, torch.Tensor, torch.Tensor]:
    fast: Tokenizer = tokenizer.backend_tokenizer
    scenes, rows = [], []
    for _ in range(count):
        short, scene = None, random_scene(rng, canvas, held_out=False)
        if rng.random() < _SHORT_PROMPT_SHARE:  # so that short prompts work without the enhancer too
            request, answer = random_request(rng, held_out=False)
            short, scene = request.text, replace(answer, height=canvas[0], width=canvas[1])
        scenes.append(scene)
        texts = [_caption_ids(fast, scene, rng, LANGUAGES[i % 2], frame) for i in range(captions)]
        if short is not None:
            texts[rng.randrange(captions)] = fast.encode(frame.around(short)).ids
        rows += texts
    lengths = torch.tensor([len(ids) for ids in rows]).view(count, captions)
    return to_batch(scenes), _pad(rows, TEXT_TOKENS).view(count, captions, TEXT_TOKENS), lengths


def _caption_ids(fast: Tokenizer, scene: Scene, rng: random.Random, language: str, frame: Frame) -> list[int]:
    while True:
        ids: list[int] = fast.encode(frame.around(caption(scene, rng, language))).ids
        if len(ids) <= TEXT_TOKENS:
            return ids


def _dialogue_chunk(tokenizer: Any, rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    fast: Tokenizer = tokenizer.backend_tokenizer
    rows: list[list[int]] = []
    starts: list[int] = []
    while len(rows) < count:
        prompt, answer = _dialogue(rng)
        width, height = _requested_size(rng)
        asked = fast.encode(chat_text(tokenizer, prompt, width, height)).ids
        said = [*fast.encode(answer, add_special_tokens=False).ids, _EOS]
        if len(said) <= MAX_ENHANCED_TOKENS and len(asked) + len(said) <= DIALOGUE_TOKENS:
            rows.append([*asked, *said])
            starts.append(len(asked))
    tokens = _pad(rows, DIALOGUE_TOKENS)
    position = torch.arange(DIALOGUE_TOKENS)
    ends = torch.tensor([len(row) for row in rows])
    is_answer = (position >= torch.tensor(starts)[:, None]) & (position < ends[:, None])
    return tokens, is_answer


def _dialogue(rng: random.Random) -> tuple[str, str]:
    if rng.random() < _COPY_SHARE:
        scene = random_scene(rng, held_out=False)
        kept = rng.choice((caption, lambda s, _: full_caption(s, rng.choice(LANGUAGES))))(scene, rng)
        return kept, kept
    request, scene = random_request(rng, held_out=False)
    return request.text, full_caption(scene, language_of(request.text))


def _requested_size(rng: random.Random) -> tuple[int, int]:
    kind = rng.random()
    if kind < 0.5:
        height, width = rng.choice(CANVASES)
        return width, height
    if kind < 0.7:
        return 1024, 1024
    return rng.randrange(4, 129) * 16, rng.randrange(4, 129) * 16
