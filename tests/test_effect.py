"""Every declared effect is earned: EXACT bitwise, ROUNDING within the declared distance, LOSSY above its floor."""

from __future__ import annotations

import json

import pytest
import torch

import ernie_accel
from ernie_accel import (
    Autocast,
    CallDefaults,
    CastDtype,
    Compile,
    Effect,
    FreeAfterUse,
    Quantize,
    SetAttention,
    SliceVae,
)
from ernie_accel.core.outputs import images_of
from ernie_accel.core.transform import ROUNDING_REL
from ernie_accel.recipes.presets import presets
from tests.examples import EXAMPLES, make_awkward
from tests.pipelines import picture, tiny_ernie

TWO_PROMPTS = ["a red circle", "a big blue square on red"]


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def db(a: torch.Tensor, b: torch.Tensor) -> float:
    return (20 * torch.log10(b.norm() / (a - b).norm())).item()


@pytest.mark.parametrize("transform", [t for t in EXAMPLES if t.effect is Effect.EXACT], ids=repr)
def test_exact_is_bitwise(transform, ernie):
    make_awkward(ernie)
    before = picture(ernie, prompt=TWO_PROMPTS, guidance_scale=3.0)
    ernie_accel.optimize(ernie, transform)
    assert torch.equal(picture(ernie, prompt=TWO_PROMPTS, guidance_scale=3.0), before)


def test_the_exact_preset_holds_exact_transforms_only():
    assert all(transform.effect is Effect.EXACT for transform in presets["exact"].transforms)


@pytest.mark.parametrize("transform", [SliceVae(), Compile()], ids=repr)
def test_rounding_stays_within_the_spread(transform, ernie):
    assert transform.effect is Effect.ROUNDING
    before = picture(ernie, prompt=TWO_PROMPTS)
    ernie_accel.optimize(ernie, transform)
    assert rel(picture(ernie, prompt=TWO_PROMPTS), before) < ROUNDING_REL["float32"]


@pytest.mark.parametrize(
    "transform",
    [Autocast("bfloat16"), CastDtype("bfloat16"), CastDtype("float16"), Quantize("int8-weight-only")],
    ids=repr,
)
def test_lossy_stays_above_its_floor(transform, ernie):
    before = picture(ernie, output_type="latent", steps=8)
    ernie_accel.optimize(ernie, transform)
    assert db(picture(ernie, output_type="latent", steps=8), before) > transform.floor_db


def drawn_by_default(pipe, **settings):
    """Return a picture that leaves to the pipe all that it can: words of the enhancer, steps, guidance."""
    torch.manual_seed(0)  # stock draws the enhancer's words from the global random numbers
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 64, "width": 64, "generator": generator, "output_type": "pt"}
    return images_of(pipe(" ".join(TWO_PROMPTS), **arguments, **settings)).float()


@pytest.mark.parametrize("transform", [t for t in EXAMPLES if t.effect is Effect.RESAMPLES], ids=repr)
def test_what_resamples_really_gives_another_picture(transform):
    """One that does nothing would be seen."""
    pipe = tiny_ernie(enhancer=transform.slot == "enhancer")
    settings = {} if isinstance(transform, CallDefaults) else {"num_inference_steps": 3}
    before = drawn_by_default(pipe, **settings)
    ernie_accel.optimize(pipe, transform)
    assert rel(drawn_by_default(pipe, **settings), before) > 1e-3
    ernie_accel.restore(pipe)
    assert torch.equal(drawn_by_default(pipe, **settings), before)


def test_an_effect_may_depend_on_the_arguments(ernie):
    """As a property; plan, JSON and the catalogue go by the value of the transform that was asked for."""
    assert SetAttention("sage").effect is Effect.LOSSY and SetAttention("sage").floor_db is not None
    assert SetAttention().effect is Effect.ROUNDING and SetAttention().floor_db is None
    for backend, effect in (("math", "rounding"), ("sage", "lossy")):
        plan = ernie_accel.plan(ernie, SetAttention(backend))
        assert [step["effect"] for step in json.loads(plan.to_json())["steps"]] == [effect]
    with pytest.raises(AttributeError):
        SetAttention().effect = Effect.LOSSY


def test_a_plan_has_the_strongest_effect_of_what_it_would_apply(ernie):
    assert ernie_accel.plan(ernie, FreeAfterUse()).effect is Effect.EXACT
    assert ernie_accel.plan(ernie, FreeAfterUse(), SliceVae()).effect is Effect.ROUNDING
    assert ernie_accel.plan(ernie, CastDtype("bf16"), SliceVae()).effect is Effect.LOSSY
    assert ernie_accel.plan(ernie, CastDtype("fp32"), SliceVae()).effect is Effect.ROUNDING  # float32 already
    assert ernie_accel.plan(ernie, preset="turbo-bf16").effect is Effect.RESAMPLES


def test_a_cast_of_the_trained_model_stays_above_its_floor():
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a large red circle in the center on a grey background", "height": 128, "width": 128}
    before = picture(pipe, output_type="latent", steps=8, **call)
    ernie_accel.optimize(pipe, CastDtype("bfloat16"))
    assert db(picture(pipe, output_type="latent", steps=8, **call), before) > CastDtype("bfloat16").floor_db
