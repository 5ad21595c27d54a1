"""``pipe(prompt)`` gets other defaults; the caller's arguments win; the class is not touched."""

from __future__ import annotations

import inspect

import pytest
import torch

import ernie_accel
from ernie_accel import CallDefaults
from ernie_accel.core.outputs import images_of
from tests.pipelines import tiny_ernie


def call_of(pipe, monkeypatch, *args, **kwargs):
    """Return (steps, guidance) that a call really runs with."""
    calls = []
    set_timesteps = pipe.scheduler.set_timesteps
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", lambda *a, **k: calls.append(k) or set_timesteps(*a, **k))
    pipe(*args, **({"height": 64, "width": 64, "output_type": "latent"} | kwargs))
    return len(calls[0]["sigmas"]), pipe.guidance_scale


def test_turbo_runs_eight_steps_without_guidance(ernie, monkeypatch):
    ernie_accel.optimize(ernie, CallDefaults("turbo"))
    assert call_of(ernie, monkeypatch, "a red circle") == (8, 1.0)


def test_what_the_caller_passes_wins(ernie, monkeypatch):
    ernie_accel.optimize(ernie, CallDefaults("turbo"))
    assert call_of(ernie, monkeypatch, "a red circle", num_inference_steps=2, guidance_scale=3.0) == (2, 3.0)


def test_what_the_caller_passes_by_position_wins(ernie, monkeypatch):
    ernie_accel.optimize(ernie, CallDefaults("turbo"))
    calls = []
    set_timesteps = ernie.scheduler.set_timesteps
    monkeypatch.setattr(ernie.scheduler, "set_timesteps", lambda **k: calls.append(k) or set_timesteps(**k))
    ernie("a red circle", "", 64, 64, 3, output_type="latent")
    assert len(calls[0]["sigmas"]) == 3


def test_values_given_beside_a_mode_win_over_it(ernie, monkeypatch):
    ernie_accel.optimize(ernie, CallDefaults("turbo", num_inference_steps=4))
    assert call_of(ernie, monkeypatch, "a red circle") == (4, 1.0)


def test_the_instance_changes_and_never_the_class(ernie):
    other, cls = tiny_ernie(), type(ernie)
    ernie_accel.optimize(ernie, CallDefaults("turbo"))
    assert type(other) is cls
    assert inspect.signature(other.__call__).parameters["num_inference_steps"].default == 50
    assert isinstance(ernie, cls)
    assert type(ernie).__name__ == cls.__name__
    ernie_accel.restore(ernie)
    assert type(ernie) is cls


def test_the_signature_shows_the_new_defaults_and_keeps_the_rest(ernie):
    before = inspect.signature(ernie.__call__).parameters
    ernie_accel.optimize(ernie, CallDefaults("turbo"))
    after = inspect.signature(ernie.__call__).parameters
    assert list(after) == list(before)
    changed = {name: after[name].default for name in after if after[name].default != before[name].default}
    assert changed == {"num_inference_steps": 8, "guidance_scale": 1.0}
    assert ernie.__call__.__doc__ == type(tiny_ernie()).__call__.__doc__


def test_the_same_call_gives_the_same_picture(ernie):
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    before = images_of(ernie("a red circle", generator=torch.Generator().manual_seed(0), **arguments))
    ernie_accel.optimize(ernie, CallDefaults("turbo"))
    after = images_of(ernie("a red circle", generator=torch.Generator().manual_seed(0), **arguments))
    assert torch.equal(after, before)


def test_quality_is_what_the_pipe_does_anyway(ernie):
    (step,) = ernie_accel.plan(ernie, CallDefaults("quality")).steps
    assert step.verdict == "nothing to do"


def test_an_argument_that_the_pipe_does_not_take(flux):
    with pytest.raises(ernie_accel.UnsupportedError, match="FluxPipeline takes no argument 'use_pe'"):
        ernie_accel.optimize(flux, CallDefaults(use_pe=False))


def test_bad_calls_fail_as_they_did(ernie):
    ernie_accel.optimize(ernie, CallDefaults("turbo"))
    with pytest.raises(TypeError, match="promt"):
        ernie(promt="a red circle")
