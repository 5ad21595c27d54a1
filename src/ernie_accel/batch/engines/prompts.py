"""Enhance and encode ERNIE-Image's prompts ahead of the denoiser, in batches, each row as if it were alone."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ernie_accel.batch.engines.base import PREPARE_BATCH, ROUND, Request, stop_if
from ernie_accel.batch.errors import Problem
from ernie_accel.core.components import CallablePipeline, Tokenizer, forget_kept, is_moved_in_parts
from ernie_accel.families import family_of
from ernie_accel.families.ernie_image import ERNIE_IMAGE
from ernie_accel.models.ministral.enhancer import EnhanceRequest, PromptEnhancer, length_problem, unsupported_reasons
from ernie_accel.models.ministral.stand_in import enhancer_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_K = TypeVar("_K")
_V = TypeVar("_V")
_KEPT = 1024  # prompts whose embeddings are kept in host memory

Packed: TypeAlias = "tuple[dict[Hashable, str], dict[str, Tensor]]"
"""What one request was enhanced to, and the embeddings of its texts; it can be pickled."""


class PromptStage:
    """Turns requests into `prompt_embeds` for an ERNIE-Image pipeline, and keeps them until they are used.

    Stock enhances and encodes prompts one by one, and draws the enhancer's words from torch's global random numbers,
    so that no seed covers them. Here each row's words come from its own seed, whatever else is in the batch, and the
    global random numbers are not touched.
    """

    def __init__(self, pipe: CallablePipeline, *, free: bool = False) -> None:
        self._pipe = pipe
        self._free = free
        self._kept = max(_KEPT, 4 * ROUND if free else 0)  # a row has a prompt, a negative one, and may be retried
        self._device = pipe._execution_device  # now, while every component is in its place
        self._freed: dict[str, tuple[nn.Module, torch.device]] = {}  # what was taken off the device, and off which
        self._enhancer: PromptEnhancer | None = None
        pe = getattr(pipe, "pe", None)  # now, because it may be off the device when another thread asks
        self._positions: int | None = None if pe is None else getattr(pe.config, "max_position_embeddings", None)
        self._texts: OrderedDict[Hashable, str] = OrderedDict()
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()  # [T, D] on the CPU

    @classmethod
    def of(cls, pipe: CallablePipeline, *, free: bool = False) -> PromptStage | None:
        """Return the stage for a pipe, or None where its family encodes prompts within the call."""
        family = family_of(pipe)
        return cls(pipe, free=free) if family is ERNIE_IMAGE else None

    def prepare(self, requests: Sequence[Request], expired: threading.Event | None = None) -> None:
        """Enhance and encode what is not yet.

        Args:
            requests: At least one.
            expired: Once it is set, `Expired` is raised at the enhancer's next word or before the next forward.
        """
        self._enhance_missing(requests, expired)
        texts = [self._text(request) for request in requests]
        texts += [request.negative_prompt or "" for request in requests if self._guided(request)]
        self._encode_missing(texts, expired)

    def problems(self, requests: Sequence[tuple[int, Request]]) -> list[Problem]:
        """Return which requests, each with its input line, have a prompt that is too long for the enhancer."""
        if self._positions is None or not self._enhances:
            return []
        found: list[Problem] = []
        asked = self._enhance_requests([request for _, request in requests])
        for (line, _), request in zip(requests, asked, strict=True):
            if problem := length_problem(self._positions, self._pipe.pe_tokenizer, request):
                found.append((line, problem))
        return found

    def length_class(self, request: Request) -> int:
        """Return the class of the encoded prompt's length, see there; 0 for one that is not encoded."""
        text = self._text_or_none(request) or request.prompt
        embeds = self._embeds.get(text)
        return length_class(len(embeds)) if embeds is not None else 0

    def arguments(self, requests: Sequence[Request], expired: threading.Event | None = None) -> dict[str, list[Tensor]]:
        """Return the embeddings of the requests as the pipeline's call takes them; encodes what is missing."""
        wanted = [self._text_or_none(request) for request in requests]
        if self._guided(requests[0]):
            wanted += [request.negative_prompt or "" for request in requests]
        if any(text not in self._embeds for text in wanted):
            self.prepare(requests, expired)
            self.free()
        arguments = {"prompt_embeds": [self._embeds[self._text(request)] for request in requests]}
        if self._guided(requests[0]):
            arguments["negative_prompt_embeds"] = [self._embeds[request.negative_prompt or ""] for request in requests]
        return arguments

    def enhanced(self, request: Request) -> str | None:
        """Return what a request that was rendered was enhanced to; None if it was not."""
        return self._texts.get(self._key(request)) if self._is_enhanced(request) else None

    def pack(self, request: Request) -> Packed:
        """Return what `prepare` made for a request, for the stage of another process."""
        texts = {self._key(request): self._text(request)} if self._is_enhanced(request) else {}
        wanted = [self._text(request), *([request.negative_prompt or ""] if self._guided(request) else [])]
        return texts, {text: self._embeds[text] for text in wanted}

    def unpack(self, packed: Packed) -> None:
        """Take in what another stage has packed, as if it had been prepared here."""
        texts, embeds = packed
        self._texts.update(texts)
        self._embeds.update(embeds)
        for key in texts:
            self._texts.move_to_end(key)
        for text in embeds:
            self._embeds.move_to_end(text)
        self._forget(self._texts)
        self._forget(self._embeds)

    def free(self) -> None:
        """Take the encoders off the device, if that was asked for; they come back when they are needed."""
        if not self._free:
            return
        for name in ("text_encoder", "pe"):
            part = getattr(self._pipe, name, None)
            if part is not None:
                self._freed[name] = (part, part.device)
                # Out of the pipe too: diffusers runs on the device of any component.
                setattr(self._pipe, name, None)
                forget_kept(part)
                part.to("cpu")
        # What enhancers keep beside the weights is on the device, too.
        if self._enhancer is not None:
            self._enhancer.forget()
        installed = enhancer_of(self._pipe)
        if installed is not None:
            installed.forget()

    def close(self) -> None:
        """Forget the embeddings, and put back on the device what was taken off it."""
        self._texts.clear()
        self._embeds.clear()
        for name in tuple(self._freed):
            self._put_back(name)

    @property
    def tokenizer(self) -> Tokenizer:
        """The text encoder's tokenizer."""
        tokenizer: Tokenizer = self._pipe.tokenizer
        return tokenizer

    @property
    def _enhances(self) -> bool:
        present = "pe" in self._freed or getattr(self._pipe, "pe", None) is not None
        return present and getattr(self._pipe, "pe_tokenizer", None) is not None

    def _guided(self, request: Request) -> bool:
        if request.guidance_scale is not None:
            return request.guidance_scale > 1
        return bool(_call_defaults(self._pipe)["guidance_scale"] > 1)

    def _key(self, request: Request) -> Hashable:
        """Return what an enhanced prompt depends on."""
        return (request.prompt, request.seed, request.width, request.height)

    def _is_enhanced(self, request: Request) -> bool:
        return self._enhances and request.enhance

    def _text(self, request: Request) -> str:
        return self._texts[self._key(request)] if self._is_enhanced(request) else request.prompt

    def _text_or_none(self, request: Request) -> str | None:
        return self._texts.get(self._key(request)) if self._is_enhanced(request) else request.prompt

    def _enhance_missing(self, requests: Sequence[Request], expired: threading.Event | None) -> None:
        enhanced = [request for request in requests if self._is_enhanced(request)]
        missing = {self._key(r): r for r in enhanced if self._key(r) not in self._texts}
        keys = sorted(missing, key=lambda key: len(missing[key].prompt))  # alike in length: little padding
        for some in _chunks(keys, PREPARE_BATCH):
            texts = self._enhance([missing[key] for key in some], expired)
            self._texts.update(zip(some, texts, strict=True))
        for request in enhanced:
            self._texts.move_to_end(self._key(request))
        self._forget(self._texts)

    def _enhance_requests(self, requests: Iterable[Request]) -> list[EnhanceRequest]:
        parameters = _call_defaults(self._pipe)
        width, height = parameters["width"], parameters["height"]
        return [EnhanceRequest(r.prompt, r.width or width, r.height or height, r.seed) for r in requests]

    def _enhance(self, requests: Sequence[Request], expired: threading.Event | None) -> list[str]:
        """Return the enhanced prompts, sampled as stock does but from each row's own seed."""
        import torch

        self._put_back("pe")
        asked = self._enhance_requests(requests)
        model, tokenizer = self._pipe.pe, self._pipe.pe_tokenizer
        if not unsupported_reasons(model, tokenizer) and not is_moved_in_parts(model):
            # RewriteEnhancer, where it was applied, has one already, with its own limit of tokens.
            installed = enhancer_of(self._pipe)
            enhance: Callable[..., list[str]]
            if installed is not None:
                enhance = installed.enhance
            else:
                if self._enhancer is None or not self._enhancer.enhances_with(model):
                    self._enhancer = PromptEnhancer(model, tokenizer)
                enhance = self._enhancer.enhance
            texts: list[str] = enhance(asked, between_tokens=functools.partial(stop_if, expired))
            return texts
        texts = []
        for each in asked:  # stock's own way, one by one
            stop_if(expired)
            with torch.random.fork_rng():
                torch.manual_seed(each.seed)
                size = {"width": each.width, "height": each.height}
                texts.append(self._pipe._enhance_prompt_with_pe(each.prompt, self._device, **size))
        return texts

    def _encode_missing(self, texts: Iterable[str], expired: threading.Event | None) -> None:
        wanted = dict.fromkeys(texts)
        missing = sorted((text for text in wanted if text not in self._embeds), key=len)
        for some in _chunks(missing, PREPARE_BATCH):
            stop_if(expired)
            self._embeds.update(zip(some, self._encode(some), strict=True))
        for text in wanted:
            self._embeds.move_to_end(text)
        self._forget(self._embeds)

    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the embeddings [T, D] of each text; padding on the right is masked and cannot be seen (causal)."""
        import torch

        self._put_back("text_encoder")
        pipe, device = self._pipe, self._device
        ids = [token_ids(pipe.tokenizer, text) for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        with torch.no_grad():
            output = pipe.text_encoder(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        hidden = output.hidden_states[-2].cpu()
        return [hidden[i, : len(row)].clone() for i, row in enumerate(ids)]

    def _forget(self, kept: OrderedDict[_K, _V]) -> None:
        while len(kept) > self._kept:
            kept.popitem(last=False)

    def _put_back(self, name: str) -> None:
        if name in self._freed:
            part, device = self._freed.pop(name)
            setattr(self._pipe, name, part.to(device))


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a prompt's tokens as `ErnieImagePipeline.encode_prompt` makes them; at least one."""
    ids: list[int] = tokenizer(text, add_special_tokens=True, truncation=True, padding=False)["input_ids"]
    return ids or [tokenizer.bos_token_id or 0]


def length_class(tokens: int) -> int:
    """Return a number of tokens rounded up to a power of two: within it, padding costs less than it saves."""
    return 1 << (tokens - 1).bit_length()


def _call_defaults(pipe: CallablePipeline) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(pipe).parameters.items()}


def _chunks(items: Sequence[_V], size: int) -> Iterable[Sequence[_V]]:
    return (items[i : i + size] for i in range(0, len(items), size))
