"""Callbacks at the end of a step: as on a stock pipe, and a call that one of them ends leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

import ernie_accel
from ernie_accel import (
    Autocast,
    BatchPromptEncoding,
    CacheSteps,
    CallDefaults,
    CheckFinite,
    Effect,
    FreeAfterUse,
    RewriteBlocks,
    SwapScheduler,
    Transform,
    TruncatePrompts,
)
from tests.pipelines import PIPELINES, picture

AROUND: tuple[Transform, ...] = (
    Autocast("bfloat16"),
    BatchPromptEncoding(cache=2),
    CacheSteps(),
    CallDefaults(num_inference_steps=20),
    CheckFinite(),
    FreeAfterUse(),
    RewriteBlocks(),
    SwapScheduler("unipc"),
    TruncatePrompts(64),
)
every_family = pytest.mark.parametrize("family", PIPELINES)
every_transform = pytest.mark.parametrize("transform", AROUND, ids=repr)


class Halved(PipelineCallback):
    """A callback of diffusers' kind that changes the latents at every step."""

    tensor_inputs: ClassVar[list[str]] = ["latents"]

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        return {"latents": callback_kwargs["latents"] * 0.5}


class StopError(Exception):
    """What a script's own callback raises."""


CALLBACKS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "changes latents": Halved,
    "guidance off": lambda: SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
    "guidance off as in SDXL": lambda: SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
    "adapter off": lambda: IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
    "two": lambda: MultiPipelineCallbacks([Halved(), Halved()]),
    "of a script": lambda: lambda pipe, step, timestep, tensors: tensors,
}


def applied(family: str, transform: Transform) -> Any:
    pipe = PIPELINES[family]()
    try:
        return ernie_accel.optimize(pipe, transform)
    except ernie_accel.UnsupportedError:
        assert family == "flux", "a family that the library knows takes all of them"
        pytest.skip(f"{transform!r} is refused for {family}")


def outcome(pipe: Any, **kwargs: Any) -> torch.Tensor | str:
    """Return the picture, or what the pipe raised."""
    try:
        return picture(pipe, steps=2, **kwargs)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def stock() -> Callable[[str, str, bool], torch.Tensor | str]:
    """Return (family, callback, whether inputs are None) -> what a stock pipe gives; each is asked once."""
    known: dict[tuple[str, str, bool], torch.Tensor | str] = {}

    def asked(family: str, callback: str, none: bool) -> torch.Tensor | str:
        key = family, callback, none
        if key not in known:
            known[key] = outcome(PIPELINES[family](), **arguments(family, callback, none))
        return known[key]

    return asked


def arguments(family: str, callback: str, none: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"callback_on_step_end": CALLBACKS[callback]()}
    if none:
        given["callback_on_step_end_tensor_inputs"] = None
    if family != "flux":
        given["guidance_scale"] = 4.0
    return given


@every_family
@every_transform
def test_callbacks_do_what_they_do_on_a_stock_pipe(family, transform, stock):
    pipe = applied(family, transform)
    for callback in CALLBACKS:
        for none in (False, True):
            if none and callback != "none":  # which stock refuses
                continue
            expected = stock(family, callback, none)
            found = outcome(pipe, **arguments(family, callback, none))
            what = f"{callback}, inputs None: {none}"
            assert type(found) is type(expected), (what, found, expected)
            if isinstance(expected, str):
                assert found == expected, what
            elif transform.effect is Effect.EXACT:
                assert torch.equal(found, expected), what
            else:
                assert torch.isfinite(found).all(), what


@every_family
@every_transform
def test_a_call_that_a_callback_ends_leaves_nothing_behind(family, transform):
    pipe = applied(family, transform)
    steps = 20 if isinstance(transform, CacheSteps) else 3
    expected = picture(pipe, steps=steps)

    def raises(pipe, step, timestep, tensors):
        if step == steps // 2:
            raise StopError
        return tensors

    def interrupts(pipe, step, timestep, tensors):
        if step == steps // 2:
            pipe._interrupt = True
        return tensors

    with pytest.raises(StopError):
        picture(pipe, steps=steps, callback_on_step_end=raises, seed=3)
    assert torch.equal(picture(pipe, steps=steps), expected)
    assert torch.isfinite(picture(pipe, steps=steps, callback_on_step_end=interrupts, seed=3)).all()
    assert torch.equal(picture(pipe, steps=steps), expected)
    with pytest.raises(StopError):
        picture(pipe, steps=steps, callback_on_step_end=raises, seed=3)
    ernie_accel.restore(pipe)
    if transform.effect is Effect.EXACT:
        assert torch.equal(picture(pipe, steps=steps), expected)
