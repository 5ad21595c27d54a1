"""Encode the prompts of a batch together, and each one once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of


@dataclass(frozen=True, repr=False)
class BatchPromptEncoding(Transform):
    """Run the text encoder on all prompts of a call at once instead of one by one, and on equal prompts once.

    Prompts are padded on the right; the encoder is causal, so no real token sees the padding. A single prompt goes
    the stock way, bit for bit.

    Attributes:
        max_batch: Most prompts to encode at once.
    """

    phase: ClassVar[Phase] = Phase.CALL
    slot: ClassVar[str] = "encode_prompts"
    effect: ClassVar[Effect] = Effect.ROUNDING

    max_batch: int = field(default=16, kw_only=True)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        family = family_of(pipe)
        if family is None or not family.encodes_one_by_one:
            return []  # nothing to do
        return [] if getattr(pipe, "text_encoder", None) is not None else ["the pipe has no text encoder"]

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        family = family_of(pipe)
        if family is None or not family.encodes_one_by_one:
            return Preview((), note=f"{type(pipe).__name__} encodes the prompts of a batch together already")
        if "encode_prompt" in vars(pipe):
            return Preview((), note="encode_prompt is replaced already")
        return Preview(("encode_prompt",))

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        with Undo() as undo:
            undo.setattr(pipe, "encode_prompt", _batched(pipe, pipe.encode_prompt, self.max_batch))
        return Applied(("encode_prompt",), undo=undo)


def _batched(pipe: Any, stock: Callable[..., list[Tensor]], max_batch: int) -> Callable[..., list[Tensor]]:
    """Return an ``encode_prompt`` of ErnieImagePipeline that encodes up to `max_batch` different prompts at once."""

    @wraps(stock)
    @torch.no_grad()
    def encode_prompt(prompt: str | list[str], device: torch.device, num_images_per_prompt: int = 1) -> list[Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        different = list(dict.fromkeys(prompts))
        encoded: dict[str, Tensor] = {}
        for start in range(0, len(different), max_batch):
            some = different[start : start + max_batch]
            if len(some) == 1:
                encoded[some[0]] = stock(some[0], device, 1)[0]
                continue
            ids = [_token_ids(pipe.tokenizer, text) for text in some]
            longest = max(map(len, ids))
            padded = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in ids], device=device)
            hidden_bth = pipe.text_encoder(input_ids=padded, output_hidden_states=True).hidden_states[-2]
            encoded |= {text: hidden_bth[i, : len(ids[i])] for i, text in enumerate(some)}
        return [encoded[text] for text in prompts for _ in range(num_images_per_prompt)]

    return encode_prompt


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens as the stock pipeline makes them; never none."""
    ids: list[int] = tokenizer(text, add_special_tokens=True, truncation=True, padding=False)["input_ids"]
    return ids or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0]
