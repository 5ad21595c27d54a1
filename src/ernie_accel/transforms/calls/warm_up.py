"""Make throw-away pictures first, so that the first real one does not pay for compiling and capturing."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar, cast

import torch

from ernie_accel.common.language import joined, listed, said
from ernie_accel.core.components import (
    CallablePipeline,
    Pipeline,
    Tokenizer,
    device_of,
    is_compiled_wrapper,
    modules_of,
)
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.core.wrap_call import leaving_no_trace
from ernie_accel.families import family_of
from ernie_accel.models.ministral.enhancer import EnhanceRequest
from ernie_accel.models.ministral.stand_in import EnhancerStandIn, enhancer_of

#: The first step compiles, the second of the same shape is the one that `CaptureGraphs` records.
STEPS = 2
#: Of an enhanced prompt: the first runs as it is, the second is captured, the third is a replay.
TOKENS = 3
#: Words from which prompts of a given length are made; one that is a token of its own is in every vocabulary.
WORDS = ("a", "red", "the", "x")
#: In the names of pipelines that need a picture, whatever their signature says.
_NEED_PICTURES = ("ControlNet", "Edit", "ImageToVideo", "Image2Video", "I2V", "Img2Img", "Pix2Pix", "Upscale")
#: What is drawn where no length is asked for.
PROMPT = "small small on small big"


class Combination(NamedTuple):
    """One kind of picture to be ready for.

    Attributes:
        width: In pixels.
        height: In pixels.
        batch: Prompts of one call.
        tokens: Of each prompt; None: whatever a short one has.
    """

    width: int
    height: int
    batch: int
    tokens: int | None

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else said(", {tokens} tokens", tokens=self.tokens)
        return said(
            "{width}x{height}, batch {batch}{tokens}",
            width=self.width,
            height=self.height,
            batch=self.batch,
            tokens=tokens,
        )


_V = TypeVar("_V")


@dataclass(frozen=True, repr=False)
class Warmup(Transform):
    """Call the pipe once for every size, batch size and prompt length, so that no later call compiles or captures.

    Each call runs two steps with the pipe's own call defaults (including guidance, if that is the default), but without
    the prompt enhancer. The first call of a size and batch size is decoded; the others stop at the latents.

    With `RewriteEnhancer`, a batch of short prompts is enhanced first, to a few tokens each. This compiles its kernels,
    and captures its graphs for prompts of about that length. With `RewriteTextEncoder`, each call is made twice, the
    second time without decoding, which captures its graphs.

    No picture is kept. Global random states, the scheduler and the prompts that `BatchPromptEncoding` has cached do not
    change. The receipt gives the milliseconds of each call. ``restore`` drops compiled code together with the transform
    that compiled it. If an earlier transform is applied again, the warm-up runs again, too.

    Pays:
        For services, and before you time anything: the first picture takes as long as the second. The warm-up takes
        the time that the first picture would have taken longer (8 to 10 s for compiled blocks, 15 s for the VAE), and
        more if you list sizes that are never used.

    Attributes:
        sizes: (width, height) in pixels; None for all that the family's authors recommend, or for the pipe's default.
        batch_sizes: Numbers of prompts per call.
        prompt_lengths: Tokens of a prompt, special ones included, as the pipe's tokenizer counts them; None for one
            short prompt. Only captured graphs depend on the length; compiled blocks accept any.
    """

    phase: ClassVar[Phase] = Phase.WARMUP
    slot: ClassVar[str] = "warm-up"
    effect: ClassVar[Effect] = Effect.EXACT

    sizes: tuple[tuple[int, int], ...] | None = field(default=None, kw_only=True)
    batch_sizes: tuple[int, ...] = field(default=(1,), kw_only=True)
    prompt_lengths: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.sizes is not None:
            _check("sizes", self.sizes, "(width, height) in pixels, as in sizes=((1024, 1024),)", _is_size)
        _check("batch_sizes", self.batch_sizes, "whole numbers >= 1, as in batch_sizes=(1, 4)", _is_count)
        if self.prompt_lengths is not None:
            _check("prompt_lengths", self.prompt_lengths, "token counts >= 1, as in prompt_lengths=(16, 64)", _is_count)

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        kind = type(pipe).__name__
        accepted = _call_parameters(pipe)
        reasons = [
            said("{kind} takes no argument {name!r}, and a warm-up passes it", kind=kind, name=name)
            for name in ("prompt", "height", "width", "num_inference_steps", "generator", "output_type")
            if name not in accepted
        ]
        inputs = _more_inputs(pipe)
        if inputs:
            reasons.append(
                said(
                    "{kind} draws from {inputs} beside the prompt, and a warm-up has none: warm it up by a call of "
                    "your own",
                    kind=kind,
                    inputs=listed(inputs),
                )
            )
        if getattr(pipe, "tokenizer", None) is None or getattr(pipe, "text_encoder", None) is None:
            reasons.append(
                said("{kind} was loaded without text encoder or tokenizer, and a warm-up draws a prompt", kind=kind)
            )
            return reasons
        if context.planned(pipe).freed_to == "nowhere":
            reasons.append(
                said("FreeAfterUse('nowhere') allows one call, and a warm-up would be that one: use to='disk'")
            )
        return reasons + self._bad_sizes(pipe) + self._bad_lengths(pipe, context) + self._too_many(pipe, context)

    def _too_many(self, pipe: Pipeline, context: Context) -> list[str]:
        """Return the reason if graphs of the first combinations would be dropped for those of the last."""
        planned = context.planned(pipe)
        if not planned.keeps_graphs:
            return []
        captured_ones = (each for each in self._combinations(pipe) if _image_tokens(each) <= planned.graph_tokens)
        captured = len({_shape(each, planned.tokens_multiple_of) for each in captured_ones})
        if captured <= planned.keeps_graphs:
            return []
        return [
            said(
                "{captured} of these pictures are captured, and {keeps_graphs} graphs are kept: use "
                "CaptureGraphs(keep={captured})",
                captured=captured,
                keeps_graphs=planned.keeps_graphs,
            )
        ]

    def _bad_sizes(self, pipe: Pipeline) -> list[str]:
        multiple = math.lcm(family_of(pipe).size_multiple, int(getattr(pipe, "vae_scale_factor", 1)))
        return [
            said(
                "{pipe} draws sizes divisible by {multiple}, got {width}x{height}: use "
                "{nearest_width}x{nearest_height}",
                pipe=type(pipe).__name__,
                multiple=multiple,
                width=width,
                height=height,
                nearest_width=_nearest(width, multiple),
                nearest_height=_nearest(height, multiple),
            )
            for width, height in self.sizes or ()
            if width % multiple or height % multiple
        ]

    def _bad_lengths(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons, limit = [], context.planned(pipe).prompt_limit
        for length in self.prompt_lengths or ():
            if limit is not None and length > limit:
                reasons.append(
                    said(
                        "prompts are cut at {limit} tokens, so none has {length}: leave that length out",
                        limit=limit,
                        length=length,
                    )
                )
            elif length > pipe.tokenizer.model_max_length:
                most = pipe.tokenizer.model_max_length
                reasons.append(
                    said(
                        "the tokenizer of {pipe} cuts at {most} tokens, got {length}",
                        pipe=type(pipe).__name__,
                        most=most,
                        length=length,
                    )
                )
            elif prompt_of(pipe.tokenizer, length) is None:
                special = len(pipe.tokenizer("")["input_ids"])
                reasons.append(
                    said(
                        "no prompt of exactly {length} tokens was found for the tokenizer of {pipe}, which adds "
                        "{special} special tokens: take another length",
                        length=length,
                        pipe=type(pipe).__name__,
                        special=special,
                    )
                )
        return reasons

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        if not context.planned(pipe).on_first_call and not _is_compiled(pipe):
            why = said(
                "nothing is compiled or captured on {device}: the first picture takes as long as the others",
                device=context.device,
            )
            return Preview((), note=why)
        return Preview(self._changes(pipe), note=said("{steps} steps each", steps=STEPS))

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        spent: list[str] = []
        with preserving_state(pipe), leaving_no_trace(pipe):
            decoded: set[tuple[int, int, int]] = set()
            pending = context.planned(pipe).on_first_call
            enhancer = enhancer_of(pipe)
            if enhancer is not None and "enhancer" in pending:
                spent += [_enhance(enhancer, default_sizes(pipe)[0], batch) for batch in self.batch_sizes]
            encodes_twice = "text-encoder" in pending
            for combination in self._combinations(pipe):
                shape = combination[:3]
                start = time.perf_counter()
                _draw(pipe, combination, decode=shape not in decoded)
                if encodes_twice:  # what is encoded for the second time is captured
                    _draw(pipe, combination, decode=False)
                spent.append(
                    said(
                        "{combination}: {ms:.0f} ms",
                        combination=str(combination),
                        ms=1000 * (time.perf_counter() - start),
                    )
                )
                decoded.add(shape)
        note = said(
            "{times}. Nothing to undo: compiled code goes with the undo of what compiled it", times=joined(spent)
        )
        return Applied(self._changes(pipe), undo=Undo(), note=note)

    def _changes(self, pipe: Pipeline) -> tuple[str, ...]:
        return tuple(map(str, self._combinations(pipe)))

    def _combinations(self, pipe: Pipeline) -> Iterator[Combination]:
        for width, height in self.sizes or default_sizes(pipe):
            for batch in self.batch_sizes:
                for tokens in self.prompt_lengths or (None,):
                    yield Combination(width, height, batch, tokens)


def _image_tokens(each: Combination) -> int:
    return each.width * each.height * each.batch // 256


def _shape(each: Combination, multiple: int) -> Combination:
    """Return a combination that is the same for all that share a graph, where tokens are made a multiple of that."""
    if each.tokens is None:
        return each
    return each._replace(tokens=math.ceil((each.width * each.height // 256 + each.tokens) / multiple))


def _more_inputs(pipe: Pipeline) -> list[str]:
    """Return the arguments that a call of the pipe needs beside a prompt: a picture to start from, a mask, ...

    Many pipelines declare them as optional and raise without them. A `strength` or a mask says that a picture is
    needed; a class that edits or animates pictures, or is guided by them, says so in its name.
    """
    parameters = _call_parameters(pipe)
    named = any(word in type(pipe).__name__ for word in _NEED_PICTURES)
    needs_picture = named or not {"strength", "mask_image"}.isdisjoint(parameters)
    return [
        name
        for name, parameter in parameters.items()
        if (name in ("image", "video") and needs_picture)
        or name in ("mask_image", "control_image")
        or (
            parameter.default is inspect.Parameter.empty
            and parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            and name not in ("self", "prompt")
        )
    ]


def default_sizes(pipe: Pipeline) -> tuple[tuple[int, int], ...]:
    """Return the (width, height) that the family's authors recommend, else the pipe's default."""
    sizes = family_of(pipe).sizes
    if sizes:
        return sizes
    parameters = _call_parameters(pipe)
    width, height = parameters["width"].default, parameters["height"].default
    if not (isinstance(width, int) and isinstance(height, int)):
        side = int(getattr(pipe, "default_sample_size", 128)) * int(getattr(pipe, "vae_scale_factor", 8))
        width = height = side
    return ((width, height),)


def prompt_of(tokenizer: Tokenizer, length: int) -> str | None:
    """Return a prompt of exactly `length` tokens, special ones included; None if none was found."""
    for word in WORDS:
        per_word = max(1, _count(tokenizer, f"{word} {word}") - _count(tokenizer, word))
        words = max(1, (length - _count(tokenizer, "")) // per_word)
        for number in {words, words - 1, words + 1} - {0}:
            prompt = " ".join([word] * number)
            if _count(tokenizer, prompt) == length:
                return prompt
    return None


def _enhance(enhancer: EnhancerStandIn, size: tuple[int, int], batch: int) -> str:
    """Enhance as many prompts as `batch`, twice, and forget them; return what it took, in words.

    Reading a prompt happens once in an enhancement, and what happens for the second time is what is captured.
    """
    start = time.perf_counter()
    for _ in range(2):
        enhancer.enhance([EnhanceRequest(PROMPT, *size, seed) for seed in range(batch)], max_new_tokens=TOKENS)
    return said("prompts enhanced, batch {batch}: {ms:.0f} ms", batch=batch, ms=1000 * (time.perf_counter() - start))


def _draw(pipe: Pipeline, combination: Combination, *, decode: bool) -> None:
    """Make one picture of two steps and forget it; wait until the device has."""
    prompt = PROMPT if combination.tokens is None else prompt_of(pipe.tokenizer, combination.tokens)
    arguments: dict[str, object] = {
        "prompt": [prompt] * combination.batch,
        "width": combination.width,
        "height": combination.height,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt" if decode else "latent",
    }
    if "use_pe" in _call_parameters(pipe):
        arguments["use_pe"] = False
    cast(CallablePipeline, pipe)(**arguments)
    device = device_of(pipe)
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@contextlib.contextmanager
def preserving_state(pipe: Pipeline) -> Iterator[None]:
    """Leave global random states, the scheduler and the pipe's own attributes as they are, whatever the block draws.

    The progress bar is hidden meanwhile.
    """
    device = device_of(pipe)
    on_device = device.type != "cpu"
    index = torch.get_device_module(device).current_device() if on_device and device.index is None else device.index
    before = [(owner, dict(vars(owner))) for owner in (pipe, pipe.scheduler)]
    with torch.random.fork_rng([index] if on_device else [], device_type=device.type if on_device else "cuda"):
        try:
            pipe.set_progress_bar_config(disable=True)
            yield
        finally:
            for owner, attributes in before:
                for name in vars(owner).keys() - attributes.keys():
                    object.__delattr__(owner, name)
                owner.__dict__.update(attributes)


def _call_parameters(pipe: Pipeline) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def _is_compiled(pipe: Pipeline) -> bool:
    """Return whether any module of the pipe was compiled, by this library or otherwise."""
    return any(
        part._compiled_call_impl is not None or is_compiled_wrapper(part)
        for module in modules_of(pipe).values()
        for part in module.modules()
    )


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def _nearest(pixels: int, multiple: int) -> int:
    return max(1, round(pixels / multiple)) * multiple


def _is_count(value: int) -> bool:
    return value >= 1


def _is_size(value: Sequence[int]) -> bool:
    return all(map(_is_count, value))


def _check(name: str, values: Sequence[_V], expected: str, is_right: Callable[[_V], bool]) -> None:
    """Refuse an empty tuple and wrong values; types are checked before.

    Raises:
        ValueError: It is not.
    """
    if not values or not all(map(is_right, values)):
        raise ValueError(f"{name} takes {expected}; got {values!r}")
