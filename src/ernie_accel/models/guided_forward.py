"""The forward of a rewritten transformer that computes both halves of guidance as one batch.

Some pipelines call their transformer twice a step: with the prompt, and with the negative prompt. The second call has
the latents and the time step of the first, so both can be computed at the first. What the second call will be is
predicted, and the prediction is checked when it comes: a call that was not predicted is computed on its own.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import starmap
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.core.captured import Fingerprint, version_of
from ernie_accel.core.stand_in import StandInForward, StandInMethod
from ernie_accel.core.wrap_call import Arguments, Call
from ernie_accel.families.family import GuidanceCalls
from ernie_accel.models.rewritten import RewrittenModel, named_object
from ernie_accel.models.token_layout import LAYOUT

#: What arguments may be beside tensors of the step and of the prompt.
_PLAIN = (bool, int, float, str, type(None))
#: Halves of a picture that may be computed for nothing; after that, its calls are computed one by one.
_MOST_WASTED = 2


class _Given:
    """Arguments as they were when they were given; `are` reads no device unless torch counts no changes."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self._versions = {name: version_of(x) for name, x in self.values.items() if isinstance(x, Tensor)}
        # Tensors of inference mode have no version, so their values are kept.
        self._copies = {name: self.values[name].clone() for name, known in self._versions.items() if known is None}

    def are(self, others: Mapping[str, object]) -> bool:
        """Return whether `others` are these arguments: the same tensors, unchanged, and otherwise equal values."""
        return others.keys() == self.values.keys() and all(
            self._is(name, value, others[name]) for name, value in self.values.items()
        )

    def _is(self, name: str, value: object, other: object) -> bool:
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            return value is other or (isinstance(value, _PLAIN) and type(value) is type(other) and value == other)
        if value is not other or version_of(other) != self._versions[name]:
            return False
        return name not in self._copies or torch.equal(self._copies[name], other)

    @property
    def are_unchanged(self) -> bool:
        """Whether no tensor was changed since."""
        return self.are(self.values)


@dataclass
class _Pair:
    """The encoded prompts of the two calls of a step.

    Attributes:
        first: Of the call that comes first.
        second: Of the other.
        joined: Both as one batch, in the same tensors at each step, by which a picture is recognised; None before the
            first one.
    """

    first: _Given
    second: _Given
    joined: dict[str, Tensor] | None = None

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has changed a tensor in place."""
        return self.first.are_unchanged and self.second.are_unchanged


@dataclass
class _Half:
    """What was computed for a call that is to come: its arguments, what the module was, and the sample."""

    step: _Given
    text: _Given
    of: Fingerprint
    sample: Tensor


@dataclass
class _Picture:
    """What is known during one call of a pipe.

    Attributes:
        of: The stand-in whose pipe is called.
        pair: The prompts that are asked for one after the other.
        pairs: Whether the last step asked for both.
        waiting: The half that the next call is expected to ask for.
        last: Arguments of the last call, if it was computed on its own: those of the step, and its prompt.
        wasted: Halves that were computed and not asked for.
    """

    of: GuidedForward
    pair: _Pair | None = None
    pairs: bool = True
    waiting: _Half | None = None
    last: tuple[_Given, _Given] | None = None
    wasted: int = 0


#: The call that is running. Of this thread: another one may draw with the same transformer and another pipe.
_picture: contextvars.ContextVar[_Picture | None] = contextvars.ContextVar("guided_picture", default=None)


class GuidedForward(StandInForward):
    """The forward of a rewritten transformer that computes the second call of a step along with the first.

    Which prompts belong together is known from the pipeline's own encoding (`EncodeBoth`), or from the first step that
    asks for one after the other. Once a step does not ask for the second (guidance that is truncated), steps are
    computed one by one until one asks for both again.
    """

    def __init__(self, transformer: nn.Module, rewritten: object, calls: GuidanceCalls) -> None:
        """Stand in for the forward of `transformer`.

        Args:
            transformer: With rewritten blocks.
            rewritten: Its family's rewritten model, or the name of it: a module can be neither copied nor pickled.
            calls: How its pipeline guides.
        """
        self._rewritten, self._prompt = rewritten, calls.prompt_of(transformer)
        super().__init__(transformer)

    def around(self, call: Call, arguments: Arguments) -> object:
        """Call the pipe; whatever is known of the picture is forgotten afterwards."""
        before = _picture.set(_Picture(self))
        try:
            return call(arguments)
        finally:
            _picture.reset(before)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what the transformer computes."""
        picture = _picture.get()
        if picture is None or picture.of is not self or torch.compiler.is_compiling():
            return self.inner_forward(*args, **kwargs)
        model = self._model
        arguments = self.named(args, kwargs)
        text = {name: arguments[name] for name in self._prompt if arguments.get(name) is not None}
        step = {name: x for name, x in arguments.items() if name not in text and name != "return_dict"}
        now = Fingerprint.of(self.module, places=False)  # offloading may move the weights at every step
        half, picture.waiting = picture.waiting, None
        if half is not None:
            if half.of == now and half.step.are(step) and half.text.are(text):
                return model.as_output(half.sample, arguments)
            picture.pairs, picture.wasted = False, picture.wasted + 1
        pair = picture.pair
        if pair is not None and picture.pairs and pair.first.are(text) and self._is_joinable(step, pair):
            picture.last = None
            sample: Tensor = self.inner_forward(**self._joined(step, pair))[0]
            rows = len(sample) // 2
            picture.waiting = _Half(_Given(step), pair.second, now, sample[rows:])
            return model.as_output(sample[:rows], arguments)
        self._learn(picture, step, text)
        return self.inner_forward(**arguments)

    @property
    def _model(self) -> RewrittenModel:
        return cast(RewrittenModel, named_object(self._rewritten))

    def _learn(self, picture: _Picture, step: dict[str, object], text: dict[str, object]) -> None:
        """Remember a call that is computed on its own, and what it says about the steps to come."""
        last, picture.last = picture.last, (_Given(step), _Given(text))
        if picture.wasted < _MOST_WASTED and last is not None and last[0].are(step) and not last[1].are(text):
            picture.pair, picture.pairs = _Pair(last[1], picture.last[1]), True

    def _is_joinable(self, step: Mapping[str, object], pair: _Pair) -> bool:
        """Return whether both calls can be one batch, without a mask that slows attention down."""
        model, first, second = self._model, pair.first.values, pair.second.values
        inputs = [step[name] for name in model.STEP_INPUTS if name in step]
        others = [x for name, x in step.items() if name not in model.STEP_INPUTS]
        texts = list(zip(first.values(), second.values(), strict=True))
        if not pair.is_unchanged or not all(map(_is_plain, others)) or not all(starmap(_are_alike, texts)):
            return False
        rows = texts[0][0].shape[0]
        if not all(isinstance(x, Tensor) and x.ndim and x.shape[0] == rows for x in (*inputs, *first.values())):
            return False
        layout = LAYOUT.of(self.module)
        if layout is not None and layout.padding_rule().padding_input == "lengths":
            return True
        lengths = {*model.host_facts({**step, **first}), *model.host_facts({**step, **second})}
        return len(lengths) == 1 or texts[0][0].device.type == "cpu"

    def _joined(self, step: Mapping[str, Any], pair: _Pair) -> dict[str, object]:
        """Return the arguments of one call that computes both."""
        if pair.joined is None:
            second = pair.second.values
            pair.joined = {name: _stacked(x, second[name]) for name, x in pair.first.values.items()}
        inputs = {name: torch.cat((step[name], step[name])) for name in self._model.STEP_INPUTS if name in step}
        return {**step, **inputs, **pair.joined, "return_dict": False}


class EncodeBoth(StandInMethod):
    """A pipeline's method that returns its encoded prompts: those of the call, then the negative ones."""

    def __init__(self, pipe: object, name: str, prompt: tuple[str, ...]) -> None:
        self._prompt = prompt
        super().__init__(pipe, name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        found, picture, count = self.call_inner(*args, **kwargs), _picture.get(), len(self._prompt)
        if picture is not None and isinstance(found, tuple) and [*map(_is_tensor, found)] == [True] * 2 * count:
            first, second = (dict(zip(self._prompt, some, strict=True)) for some in (found[:count], found[count:]))
            picture.pair = _Pair(_Given(first), _Given(second))
        return found


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is_plain(value: object) -> bool:
    """Return whether an argument means the same to a batch of two as to each of them."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _are_alike(one: object, other: object) -> bool:
    """Return whether two encoded prompts [B, T, ...] differ in their tokens alone."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or min(one.ndim, other.ndim) < 2:
        return False
    kinds = [(x.dtype, x.device, x.shape[0], x.shape[2:]) for x in (one, other)]
    return kinds[0] == kinds[1]


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """Return two encoded prompts [B, T, ...] as one batch, padded with zeros to the longer one."""
    tokens = max(one.shape[1], other.shape[1])
    padded = (F.pad(x, (*(0, 0) * (x.ndim - 2), 0, tokens - x.shape[1])) for x in (one, other))
    return torch.cat(list(padded))
