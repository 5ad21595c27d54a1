"""The embedded model's figures: what its trainer, its tests and its benchmark all report the same way."""

from __future__ import annotations

import dataclasses
import json
import platform
import random
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_accel.demo.judge import adherence, judge, summarize
from ernie_accel.embedded.captions import LANGUAGES, SceneRequest, caption, parse, random_request, same_content
from ernie_accel.embedded.scenes import CANVASES, random_scene, render

if TYPE_CHECKING:
    from diffusers import ErnieImagePipeline

TEMPERATURE, TOP_P = 0.6, 0.95
"""How the pipeline samples its prompt enhancer."""


def evaluate(
    pipe: ErnieImagePipeline,
    prompts: int,
    requests: int,
    steps: Sequence[int] = (8, 4, 20),
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measure the judge, the pictures and the prompt enhancer; plain data, ready for JSON.

    Args:
        pipe: The pipeline as users get it.
        prompts: Unseen captions to draw, for each number of steps.
        requests: Unseen short prompts to expand, and as many full captions to keep.
        steps: Numbers of denoising steps.
        batch_size: Prompts a call.
    """
    figures: dict[str, Any] = {"judge_on_true_drawings": judge_true_drawings(max(prompts // len(CANVASES), 1))}
    for n in steps:
        result = adherence(pipe, prompts, n, batch_size=batch_size)
        figures[f"adherence_{n}_steps"] = dataclasses.asdict(result)
    figures["prompt_enhancer"] = enhancer_success(pipe, requests)
    return figures


def judge_true_drawings(n_per_canvas: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return what the judge reads in the renderer's own drawings, by "height x width"."""
    import torch

    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    figures = {}
    for height, width in CANVASES:
        scenes = [random_scene(rng, (height, width)) for _ in range(n_per_canvas)]
        found = summarize(judge(render(scenes, generator), scenes), scenes)
        figures[f"{height}x{width}"] = {"objects": found.object_fraction, "pictures": found.picture_fraction}
    return figures


def enhancer_success(pipe: ErnieImagePipeline, n: int, seed: int = 0) -> dict[str, Any]:
    """Return how often the prompt enhancer does its work, with the pipeline's sampling.

    Returns:
        `expanded` by language: short prompts that became a full caption of the grammar which holds all that
        was asked and no other object. `kept` by language: full captions that came back with the same content.
        `failures`: up to ten pairs of prompt and answer.
    """
    rng = random.Random(f"unseen-{seed}")
    figures: dict[str, Any] = {"requests_per_language": n // 2, "expanded": {}, "kept": {}, "failures": []}
    for language in LANGUAGES:
        asked = [random_request(rng, language, held_out=True)[0] for _ in range(n // 2)]
        answers = expand(pipe, [r.text for r in asked], seed)
        good = [r.is_kept_by(parse(a)) for r, a in zip(asked, answers, strict=True)]
        figures["expanded"][language] = sum(good) / max(len(good), 1)
        scenes = [random_scene(rng, held_out=True) for _ in range(n // 2)]
        full = [SceneRequest(caption(s, rng, language), ()) for s in scenes]
        copies = expand(pipe, [r.text for r in full], seed)
        read = [parse(c) for c in copies]
        same = [r is not None and same_content(r, s) for r, s in zip(read, scenes, strict=True)]
        figures["kept"][language] = sum(same) / max(len(same), 1)
        tried = zip([*asked, *full], [*answers, *copies], [*good, *same], strict=True)
        figures["failures"] += [[r.text, a] for r, a, ok in tried if not ok][:5]
    return figures


def expand(pipe: ErnieImagePipeline, prompts: Sequence[str], seed: int = 0, batch_size: int = 128) -> list[str]:
    """Enhance prompts in batches, as the pipeline does one by one; the global random state is left as it
    was.
    """
    import torch

    tokenizer, enhancer = pipe.pe_tokenizer, pipe.pe
    answers: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            texts = [chat_text(tokenizer, p, 128, 128) for p in prompts[start : start + batch_size]]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(enhancer.device)
            made = enhancer.generate(
                **inputs,
                max_new_tokens=tokenizer.model_max_length,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            new = made[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def chat_text(tokenizer: Any, prompt: str, width: int, height: int) -> str:
    """Return the enhancer's input exactly as the pipeline writes it."""
    content = json.dumps({"prompt": prompt, "width": width, "height": height}, ensure_ascii=False)
    message = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=False))


def describe(pipe: ErnieImagePipeline, folder: Path) -> dict[str, Any]:
    """Return what figures depend on: hardware, versions, and the sizes of the model in `folder`."""
    import torch

    on_gpu = pipe.transformer.device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")},
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
        },
        "stored_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
    }


def summary(figures: dict[str, Any]) -> str:
    """Return one line for each figure, confusion left out."""
    lines = []
    for name, value in figures.items():
        short = {k: round(v, 4) if isinstance(v, float) else v for k, v in value.items() if k != "confusion"}
        lines.append(f"{name}: {json.dumps(short, ensure_ascii=False)}")
    return "\n".join(lines)
