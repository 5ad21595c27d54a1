"""Pipes whose components the user passed through torch.compile: the wrapper hides classes and changes paths."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import CallDefaults, CastDtype, CheckFinite, MakeContiguous, Quantize, SwapScheduler
from ernie_accel.families import family_of
from tests.examples import EXAMPLES
from tests.pipelines import picture

INSIDE = [transform for transform in EXAMPLES if transform.changes_inside]


def wrap(module: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("transform", INSIDE, ids=repr)
def test_what_changes_a_wrapped_component_is_refused_with_the_fix(ernie, transform):
    name = "vae.decoder" if transform.changes_inside == ("vae",) else "transformer"
    ernie.vae.decoder, ernie.transformer = wrap(ernie.vae.decoder), wrap(ernie.transformer)
    with pytest.raises(ernie_accel.UnsupportedError) as caught:
        ernie_accel.optimize(ernie, transform)
    assert f"{name} is a wrapper that torch.compile(...) returned" in str(caught.value)
    assert "pipe.transformer = pipe.transformer._orig_mod" in str(caught.value)
    assert not ernie_accel.report(ernie).entries
    ernie.transformer = ernie.transformer._orig_mod


def test_a_single_wrapped_block_is_noticed_too(ernie):
    ernie.transformer.layers[1] = wrap(ernie.transformer.layers[1])
    plan = str(ernie_accel.plan(ernie, Quantize("int8-weight-only")))
    assert "transformer.layers.1 is a wrapper" in plan


def test_modules_compiled_in_place_hide_nothing(ernie):
    ernie.transformer.compile(backend="eager")
    assert ernie_accel.plan(ernie, Quantize("int8-weight-only")).ok


def test_the_family_and_all_that_leaves_the_inside_alone_stay(ernie):
    family, want = family_of(ernie), picture(ernie)
    ernie.transformer = wrap(ernie.transformer)
    assert family_of(ernie) is family
    alone = (CastDtype("bf16"), MakeContiguous(), CheckFinite(), CallDefaults("turbo"), SwapScheduler("unipc"))
    plan = ernie_accel.plan(ernie, *alone)
    assert plan.ok, plan
    ernie_accel.optimize(ernie, CastDtype("bf16"), CheckFinite())
    assert {weight.dtype for weight in ernie.transformer.parameters()} == {torch.bfloat16}
    ernie_accel.restore(ernie)
    ernie.transformer = ernie.transformer._orig_mod
    assert torch.equal(picture(ernie), want)


def test_every_transform_of_the_denoiser_says_that_it_changes_it():
    for transform in EXAMPLES:
        if "denoiser" in type(transform).__module__:
            assert "transformer" in transform.changes_inside
