"""Shorten prompts that are too long and say so, instead of cutting them without a word; refuse empty ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError, UnknownNameError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.stand_in import StandInMethod
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import Arguments, Call, wrap_call

KEEP = ("head", "tail")


@dataclass(frozen=True, repr=False)
class TruncatePrompts(Transform):
    """Shorten every prompt to a number of tokens, as the pipe's own tokenizer counts them, special tokens included.

    A shortened prompt is named in ``result.warnings`` and in a UserWarning, and its picture is drawn. A prompt without
    any token raises an error that names it (stock draws something for it, or crashes); an empty negative prompt is
    fine. Enhanced prompts are shortened after enhancing. Prompts that are short enough do not change.

    Pays:
        For batches of prompts that nobody has read: a prompt that is too long or empty does not silently spoil others.

    Attributes:
        max_tokens: The largest number of tokens to keep.
        keep: "head" keeps the beginning, "tail" the end.
    """

    phase: ClassVar[Phase] = Phase.REWRITE
    slot: ClassVar[str] = "prompt-length"
    effect: ClassVar[Effect] = Effect.RESAMPLES

    max_tokens: int
    keep: str = field(default="head", kw_only=True)

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise UnknownNameError("end of a prompt to keep", self.keep, KEEP)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        tokenizer = getattr(pipe, "tokenizer", None)
        if tokenizer is None:
            return [said("{pipe} has no tokenizer (component 'tokenizer') to count with", pipe=type(pipe).__name__)]
        if not hasattr(pipe, "encode_prompt"):
            return [said("{pipe} has no encode_prompt that could be given shorter prompts", pipe=type(pipe).__name__)]
        special = len(tokenizer("")["input_ids"])
        if self.max_tokens <= special:
            return [
                said(
                    "max_tokens={max_tokens} leaves nothing beside the tokenizer's {special} special tokens",
                    max_tokens=self.max_tokens,
                    special=special,
                )
            ]
        if self.max_tokens > tokenizer.model_max_length:
            most = tokenizer.model_max_length
            return [
                said(
                    "max_tokens={max_tokens}, but the tokenizer itself cuts at {most}: use at most {most}",
                    max_tokens=self.max_tokens,
                    most=most,
                )
            ]
        return []

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return Preview(self._changes(pipe), note=said("prompts within the limit are not touched"))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        return replace(context.planned(pipe), prompt_limit=self.max_tokens)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        changes, limit = self._changes(pipe), _Limit(self, pipe)
        with Undo() as undo:
            undo.setattr(pipe, "encode_prompt", _ShortPrompts(pipe, limit))
            wrap_call(pipe, "lengths", limit.around, undo)
        return Applied(changes, undo=undo, note=said("prompts within the limit are not touched"))

    def _changes(self, pipe: Pipeline) -> tuple[str, ...]:
        return (
            said(
                "prompt tokens {most} -> {max_tokens}",
                most=pipe.tokenizer.model_max_length,
                max_tokens=self.max_tokens,
            ),
        )


class _Limit:
    """Shortens the prompts of one pipe and collects what it did during a call."""

    def __init__(self, wanted: TruncatePrompts, pipe: Pipeline) -> None:
        self._wanted, self._pipe = wanted, pipe
        self._warnings: list[str] = []

    def around(self, call: Call, arguments: Arguments) -> object:
        """Call the pipe with prompts that have tokens, and attach the warnings to its result."""
        prompt = arguments.get("prompt")
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        for number, text in enumerate(prompts, start=1):
            if not self._pipe.tokenizer(text, add_special_tokens=False)["input_ids"]:
                raise ErnieAccelError(
                    f"prompt {number} of {len(prompts)}, {text!r}, has no tokens: there is nothing to draw. Write what "
                    "the picture should show."
                )
        if arguments.get("negative_prompt"):
            arguments = {**arguments, "negative_prompt": self.shorten_all(arguments["negative_prompt"])}
        try:
            result = call(arguments)
            if hasattr(result, "images"):
                result.warnings = tuple(dict.fromkeys(self._warnings))
            return result
        finally:
            self._warnings = []

    def shorten_all(self, prompt: str | list[str]) -> str | list[str]:
        """Return one prompt, or several, none of them longer than the limit."""
        return self._shorten(prompt) if isinstance(prompt, str) else [self._shorten(text) for text in prompt]

    def _shorten(self, text: str) -> str:
        before = self._count(text)
        if before <= self._wanted.max_tokens:
            return text
        room = self._wanted.max_tokens - self._count("")
        short = self._cut(text, room)
        while self._count(short) > self._wanted.max_tokens and room > 1:  # a cut may split into more tokens
            room -= 1
            short = self._cut(text, room)
        lost = "end" if self._wanted.keep == "head" else "beginning"
        start = text if len(text) <= 40 else f"{text[:40]}..."
        warning = f"prompt {start!r} has {before} tokens; its {lost} was cut to leave {self._count(short)}"
        self._warnings.append(warning)
        warnings.warn(warning, UserWarning, stacklevel=2)
        return short

    def _count(self, text: str) -> int:
        return len(self._pipe.tokenizer(text)["input_ids"])

    def _cut(self, text: str, room: int) -> str:
        """Return the part of `text` that its first or last `room` tokens cover."""
        tokenizer, head = self._pipe.tokenizer, self._wanted.keep == "head"
        if not tokenizer.is_fast:  # knows no character offsets
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return str(tokenizer.decode(ids[:room] if head else ids[-room:]))
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: offsets[room - 1][1]] if head else text[offsets[-room][0] :]


class _ShortPrompts(StandInMethod):
    """A pipeline's ``encode_prompt`` that shortens its prompts."""

    def __init__(self, pipe: Pipeline, limit: _Limit) -> None:
        super().__init__(pipe, "encode_prompt")
        self._limit = limit

    def __call__(self, prompt: Any, *args: object, **kwargs: object) -> object:
        return self.call_inner(prompt if prompt is None else self._limit.shorten_all(prompt), *args, **kwargs)
