"""Encode prompts with few launches: a rewritten forward of the text encoder, replayed as a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar, cast

from torch import nn

from ernie_accel.common.language import joined, said
from ernie_accel.core.components import Pipeline, is_moved_in_parts
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.stand_in import standing_in
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.families import family_of
from ernie_accel.models.language.architecture import LanguageModel
from ernie_accel.models.language.text_encoder import RewrittenForward, unsupported_reasons


@dataclass(frozen=True, repr=False)
class RewriteTextEncoder(Transform):
    """Replace the forward of the text encoder's language model by one of fewer kernels, replayed as a CUDA graph.

    It supports the language models of the text encoders of ERNIE-Image (``Ministral3Model``), Z-Image (``Qwen3Model``),
    Lumina 2 (``Gemma2Model``) and NewBie-image (``Gemma3TextModel``). Stock launches almost 50 kernels per layer of
    Ministral, which takes the host longer than the GPU needs to run them. Here a layer is 19 kernels, and a graph needs
    one launch for all layers. The first forward of a shape runs uncaptured, the second is captured, and the others are
    replays. Only the last few shapes are kept, and changes of the model are noticed.

    Z-Image and Lumina 2 pad every prompt, to 512 or 256 tokens. Only as many as the longest prompt has are computed;
    the hidden states of padding, which the pipeline's mask hides, are zero.

    Linear layers of other classes (adapters, some quantizers) are called unchanged, without graphs. The stock forward
    runs for layers that someone has changed, and for calls that want anything but hidden states of whole texts (padding
    on the left, caches, attentions, gradients, autocast). A key/value cache is returned only with ``use_cache=True``.

    In bfloat16, the distance of the hidden states from float32 is 0.85 to 0.97 of stock's (random weights, on a CPU),
    because a norm rounds once instead of twice.

    Pays:
        With every prompt, and most with few or short ones, whose encoding is limited by the host's launches.

    Attributes:
        max_tokens: Forwards of more tokens are not captured, counting all texts, each padded to a multiple of 64; >= 0.
        keep: How many shapes to keep graphs of, >= 1. A graph holds the hidden states of all layers.
    """

    phase: ClassVar[Phase] = Phase.COMPILE
    slot: ClassVar[str] = "text-encoder"
    effect: ClassVar[Effect] = Effect.ROUNDING

    max_tokens: int = field(default=1024, kw_only=True)
    keep: int = field(default=4, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_tokens < 0 or self.keep < 1:
            raise ValueError(f"max_tokens must be >= 0 and keep >= 1, got {self.max_tokens} and {self.keep}")

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return ("text_encoder",)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return []  # where it cannot stand in, stock encodes as before

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        model = _language_model(pipe)
        if model is None:
            return Preview(
                (), note=said("this {pipe} has no text encoder that is known here", pipe=type(pipe).__name__)
            )
        if _is_rewritten(model):
            return Preview((), note=said("the text encoder's forward is rewritten already"))
        if is_moved_in_parts(pipe.text_encoder) or context.planned(pipe).offload in ("sequential", "group"):
            why = said("text_encoder is offloaded or cast layer by layer: Offload('model') or 'stages' go with this")
            return Preview((), note=why)
        problems = unsupported_reasons(model)
        return Preview((), note=joined(problems)) if problems else Preview(_changes(pipe))

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        planned = context.planned(pipe)
        return planned.compiling(self.slot) if context.device == "cuda" and self.max_tokens > 0 else planned

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        model = _language_model(pipe)
        if model is None:
            raise LookupError(f"this {type(pipe).__name__} has no text encoder that is known here")
        with Undo() as undo:
            RewrittenForward(model, self.max_tokens, self.keep).install(undo)
        return Applied(_changes(pipe), undo=undo)


def _path(pipe: Pipeline) -> str | None:
    """Return where the language model of the pipe's text encoder is, or None where none is known."""
    how = family_of(pipe).prompt_encoding
    if how is None or getattr(pipe, "text_encoder", None) is None:
        return None
    layers = how.layers_of(pipe.text_encoder) or (how.layers if isinstance(how.layers, str) else how.layers[0])
    return f"text_encoder.{layers}".rpartition(".")[0]


def _language_model(pipe: Pipeline) -> LanguageModel | None:
    path = _path(pipe)
    return None if path is None else cast(LanguageModel, attrgetter(path)(pipe))


def _is_rewritten(model: nn.Module) -> bool:
    return standing_in(model, RewrittenForward) is not None


def _changes(pipe: Pipeline) -> tuple[str, ...]:
    return (f"{_path(pipe)}.forward",)
