"""The forward of a rewritten transformer that is replayed as CUDA graphs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ernie_accel.core.captured import Fingerprint, bring_whole, version_of
from ernie_accel.models.replayed_forward import ReplayedForward
from ernie_accel.models.replays import Capture
from ernie_accel.models.rewritten import PreparedPositions, RewrittenModel
from ernie_accel.models.token_layout import LAYOUT

#: Images of more tokens, times the batch, keep a GPU busy unless the host is slow.
FEW_TOKENS = 2048
#: Larger ones, up to here, are captured where that costs no time and there is memory: a host that is busy with other
#: things, or a LoRA, may need as long to launch a step as the GPU to run it. Two pictures of about 1024 x 1024 pixels,
#: or one with guidance.
MANY_TOKENS = 8448
#: Bytes that have to be free on the device for that. ERNIE-Image's graph of 4224 tokens keeps 0.6 GiB.
FREE_FOR_MANY = 8 * 2**30


#: What a step of a rewritten model may be given: a tensor, one for each picture, or one for each of some blocks.
_Given = Tensor | Sequence[Tensor] | Mapping[int, Tensor]


@dataclass(frozen=True)
class _Inputs:
    """What a graph reads beside the weights, where it reads it."""

    steps: Mapping[str, _Given]
    text: Tensor
    at: PreparedPositions


class GraphedForward(ReplayedForward[_Inputs, Tensor]):
    """The forward of a rewritten transformer that replays graphs where it can; same arguments, same result.

    At every step it checks whether the transformer is what it was. Steps of a picture are recognised by their text,
    which is the same tensor in each.

    Images of up to `max_tokens` tokens, times the batch, are captured. None: up to `FEW_TOKENS`; up to `MANY_TOKENS`
    where attention takes lengths anyway (in bfloat16 cuDNN's kernel without them, which no graph uses, is the faster
    one) and `FREE_FOR_MANY` are free when such an image is drawn. What runs out of memory while it is captured is not
    captured again until the transformer changes.
    """

    captured: ClassVar[tuple[str, ...]] = (
        *ReplayedForward.captured, "_picture", "_given", "_prepared", "_filled", "_large", "_too_large"
    )  # fmt: skip

    def __init__(
        self,
        transformer: torch.nn.Module,
        blocks: RewrittenModel,
        max_tokens: int | None,
        keep: int,
        capture: Capture | None = None,
    ) -> None:
        # A module can be neither copied nor pickled, so its name is kept instead.
        self._named = blocks.__name__ if isinstance(blocks, ModuleType) else blocks
        self._max_tokens = max_tokens
        super().__init__(transformer, keep, capture)

    def _forget_inputs(self) -> None:
        self._picture: tuple[object, ...] = ()  # what is known of the picture under way
        self._given: tuple[Tensor, ...] = ()  # its encoded prompts, which identify it
        self._prepared: tuple[Tensor, PreparedPositions] | None = None  # its text and positions
        self._filled: _Inputs | None = None  # the inputs that have them
        self._large: set[tuple[torch.device, int]] = set()  # more tokens than a few, which are captured
        self._too_large: set[tuple[torch.device, int]] = set()  # tokens for whose graph there was no memory

    @property
    def _blocks(self) -> RewrittenModel:
        named = self._named
        return cast(RewrittenModel, importlib.import_module(named) if isinstance(named, str) else named)

    def __call__(self, *args: Any, **kwargs: object) -> object:
        arguments = self.named(args, kwargs)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._blocks.serves(arguments):
            return self.inner_forward(**arguments)
        steps = {name: x for name in self._blocks.STEP_INPUTS if (x := arguments.get(name)) is not None}
        device = _tensors(*steps.values())[0].device
        tokens = self._blocks.token_count(self.module, arguments)
        if not self._captures(device, tokens):
            return self.inner_forward(**arguments)
        if torch.is_autocast_enabled(device.type):  # what it casts is kept for as long as the context lasts
            return self.inner_forward(**arguments)
        now = Fingerprint.of(self.module)
        if now.is_hooked:  # weights that come and go, and hooks that have to run, cannot be captured
            return self.inner_forward(**arguments)
        if not bring_whole(self.module):  # a graph reads all weights where they lie
            return self.inner_forward(**arguments)
        with self._lock, torch.cuda.device_of(_tensors(*steps.values())[0]):  # type: ignore[no-untyped-call]
            self._forget_if_stale(now)
            if (device, tokens) not in self._too_large:
                try:
                    return self._blocks.as_output(self._sample(arguments, steps), arguments)
                except torch.OutOfMemoryError:
                    self._too_large.add((device, tokens))
        return self.inner_forward(**arguments)  # which needs less; if not, this error is the one to see

    def _captures(self, device: torch.device, tokens: int) -> bool:
        """Return whether images of so many tokens, times the batch, are captured."""
        large, which = self._large, (device, tokens)  # another thread may put an empty set in its place
        if self._max_tokens is not None:
            return tokens <= self._max_tokens
        if tokens <= FEW_TOKENS or which in large:
            return True
        always_lengths = LAYOUT.required(self.module).padding_rule().always_lengths
        if tokens > MANY_TOKENS or not always_lengths or free_bytes(device) <= FREE_FOR_MANY:
            return False
        large.add(which)
        return True

    def _sample(self, arguments: Mapping[str, Any], steps: Mapping[str, _Given]) -> Tensor:
        blocks = tuple(tuple(each) if isinstance(each, Mapping) else () for each in steps.values())
        shapes = (*steps, *blocks, *((x.shape, x.dtype, x.device) for x in _tensors(*steps.values())))
        given = _tensors(arguments[self._blocks.PICTURE_INPUT])
        versions = tuple(map(version_of, given))
        picture = (shapes, self._blocks.host_facts(arguments), versions)
        if self._picture != picture or not _same(self._given, given) or None in versions:
            self._picture, self._given = (), ()  # until all of the following is known
            self._filled = None
            self._prepared = None
        if self._prepared is None:
            self._prepared = self._blocks.prepare(self.module, arguments)
            self._picture, self._given = picture, given

        text, at = self._prepared
        key = (shapes, text.shape, text.dtype, tuple((x.shape, x.dtype) for x in at.tensors))
        inputs = self._graphs.inputs(
            key, lambda: _Inputs({name: _clone(x) for name, x in steps.items()}, text.clone(), at.clone())
        )
        if self._filled is not inputs:
            for static, x in zip((inputs.text, *inputs.at.tensors), (text, *at.tensors), strict=True):
                static.copy_(x)
            self._filled = inputs
        for static, x in zip(_tensors(*inputs.steps.values()), _tensors(*steps.values()), strict=True):
            static.copy_(x)
        return self._graphs.run(key, partial(self._work, arguments, inputs)).clone()

    def _work(self, arguments: Mapping[str, object], inputs: _Inputs) -> Tensor:
        static = {**inputs.steps, self._blocks.PICTURE_INPUT: inputs.text, "at": inputs.at, "return_dict": False}
        sample: Tensor = self.inner_forward(**{**arguments, **static})[0]
        return sample


def free_bytes(device: torch.device) -> int:
    """Return the bytes that torch could still give this process on a CUDA device; 0 on any other."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # newer than torch 2.6
    allowed = total if fraction is None else int(total * fraction(device))
    return min(free, allowed - held) + held - torch.cuda.memory_allocated(device)


def _tensors(*given: _Given) -> tuple[Tensor, ...]:
    """Return tensors, and those of lists and mappings, as one tuple."""
    found: list[Tensor] = []
    for each in given:
        found += [each] if isinstance(each, Tensor) else each.values() if isinstance(each, Mapping) else each
    return tuple(found)


def _clone(given: _Given) -> _Given:
    if isinstance(given, Mapping):
        return {name: x.clone() for name, x in given.items()}
    return given.clone() if isinstance(given, Tensor) else [x.clone() for x in given]


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Return whether the tensors are the same objects."""
    return len(one) == len(other) and all(map(is_, one, other))
