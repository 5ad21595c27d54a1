"""Every pipeline has the family it should have; every transform runs on every family and back, or says why not."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import ernie_accel
from ernie_accel.families import UNKNOWN, families, family_of
from ernie_accel.models.rewritten import rewritten_model
from ernie_accel.samplers.solvers import SCHEDULERS
from tests.examples import EXAMPLES, differences, snapshot
from tests.pipelines import PIPELINES, picture, tiny_lumina2

FAMILY_NAMES = {"ernie": "ERNIE-Image", "z_image": "Z-Image", "lumina2": "NewBie-image", "newbie": "NewBie-image"}

every_pipeline = pytest.mark.parametrize("name", PIPELINES)


@every_pipeline
def test_each_pipeline_has_its_family(name):
    family = family_of(PIPELINES[name]())
    assert family.name == FAMILY_NAMES.get(name, "unknown")


def test_a_renamed_transformer_is_known_by_its_shape(monkeypatch):
    pipe = PIPELINES["newbie"]()
    assert "Lumina2" not in str(type(pipe.transformer).__mro__)
    assert family_of(pipe).name == "NewBie-image"
    pipe.transformer.config = {**pipe.transformer.config, "pooled_projection_dim": None}
    assert family_of(pipe) is UNKNOWN


def test_the_authors_code_is_known_by_its_layers():
    """It is a plain module, without a config."""
    pipe = PIPELINES["newbie"]()
    del pipe.transformer.config
    assert family_of(pipe) is UNKNOWN
    pipe.transformer.clip_text_pooled_proj = torch.nn.Linear(2, 2)
    pipe.transformer.time_text_embed = torch.nn.Linear(2, 2)
    assert family_of(pipe).name == "NewBie-image"
    assert family_of(pipe).rewritten is None  # the class is not theirs: these are Lumina 2's blocks


@pytest.mark.parametrize("name", ["ernie", "z_image", "lumina2"])
def test_a_forward_with_arguments_that_are_not_known_stays_as_it_is(name, monkeypatch):
    """As diffusers' pull request 12803 has it for NewBie-image: the rewritten forward would not take them."""
    pipe = PIPELINES[name]()
    expected, stock = picture(pipe), type(pipe.transformer).forward

    def forward(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    known, more = inspect.signature(stock), inspect.Parameter("pooled_projections", inspect.Parameter.KEYWORD_ONLY)
    forward.__signature__ = known.replace(parameters=[*known.parameters.values(), more])
    monkeypatch.setattr(type(pipe.transformer), "forward", forward)
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks())
    assert rewritten_model(pipe) is None
    assert torch.equal(picture(pipe), expected)


def test_the_pooled_embedding_is_really_used():
    plain, pooled = picture(tiny_lumina2()), picture(PIPELINES["newbie"]())
    assert (plain - pooled).abs().max() > 1e-4


def test_a_pipeline_without_a_transformer_has_no_family():
    assert family_of(object()) is family_of(None) is UNKNOWN
    assert not UNKNOWN.is_known and all(family.is_known for family in families())
    assert UNKNOWN not in families()


def test_of_the_unknown_family_nothing_is_known():
    """What a transform asks of it says "none" by the value that says so for any family."""
    for f in fields(UNKNOWN):
        assert f.name in ("name", "size_multiple") or not getattr(UNKNOWN, f.name), f.name


def test_messages_name_the_class_of_a_pipe_of_no_known_family_and_else_the_family(flux, ernie):
    assert UNKNOWN.name_for(flux) == "FluxPipeline"
    assert UNKNOWN.unknown_reasons(flux, "so on") == ["FluxPipeline is of no known family, and so on"]
    known = family_of(ernie)
    assert (known.name_for(ernie), known.unknown_reasons(ernie, "so on")) == ("ERNIE-Image", [])


def test_a_pipe_may_be_given_no_family(ernie):
    """Nothing is assumed of it then: its blocks are not rewritten, whatever its class."""
    plan = ernie_accel.plan(ernie, ernie_accel.RewriteBlocks(), family=UNKNOWN)
    (reasons,) = plan.problems.values()
    assert plan.family is None
    assert reasons == (f"{type(ernie).__name__} is of no known family, and blocks are rewritten family by family",)


def test_a_family_without_modes_is_told_to_give_values(ernie):
    bare = replace(family_of(ernie), name="bare", modes={}, text_argument=None)
    plan = ernie_accel.plan(ernie, ernie_accel.CallDefaults("turbo"), ernie_accel.CacheSteps(), family=bare)
    text = str(plan)
    assert "no turbo settings are known for bare: give values" in text
    assert "bare does not say which argument holds the prompts (Family.text_argument)" in text


def test_no_code_asks_whether_there_is_a_family():
    """`UNKNOWN` is asked like any other; only an argument that was not given is None."""
    asks = re.compile(r"\bfamily is (not )?None|family_of\w*\([^)]*\) is (not )?None|\bif family (else|and)\b")
    source = Path(ernie_accel.__file__).parent
    found = {
        path.relative_to(source).as_posix() for path in source.rglob("*.py") if asks.search(path.read_text("utf-8"))
    }
    assert found == {"api.py", "families/registry.py"}


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_what_is_known_of_a_family_is_usable(family):
    assert family.modes
    assert set(family.schedulers) <= set(SCHEDULERS)
    for settings in family.modes.values():
        assert settings.source
        assert 1 <= settings.num_inference_steps <= 100
    for width, height in family.sizes:
        assert width % family.size_multiple == height % family.size_multiple == 0


@pytest.mark.parametrize(
    ("name", "steps", "guidance"), [("ERNIE-Image", 8, 1.0), ("Z-Image", 9, 0.0)], ids=lambda value: str(value)
)
def test_each_turbo_has_its_steps_and_guidance(name, steps, guidance):
    turbo = next(family for family in families() if family.name == name).modes["turbo"]
    assert (turbo.num_inference_steps, turbo.guidance_scale) == (steps, guidance)


def test_newbie_has_no_turbo_but_its_schedulers():
    newbie = next(family for family in families() if family.name == "NewBie-image")
    assert set(newbie.modes) == {"quality"}
    assert 20 <= newbie.modes["quality"].num_inference_steps <= 28
    assert newbie.schedulers == ("unipc", "dpmpp_2m_sde")


def names_on(pipe):
    """Return the names by which a reason can say what it found: of the pipe, its family, its parts."""
    return {
        family_of(pipe).name_for(pipe),
        type(pipe).__name__,
        *(type(part).__name__ for part in pipe.components.values()),
    } - {"NoneType"}


def draws(transform):
    """Return whether a pipe with this transform draws, and does so in milliseconds.

    A cast of one component alone leaves two dtypes, which stock pipelines do not run; compiling every family takes
    longer than all the rest, and is tested on one.
    """
    alone = transform.slot == "dtype" and transform.components is not None
    return not alone and transform.phase is not ernie_accel.Phase.COMPILE


@pytest.mark.parametrize("transform", EXAMPLES, ids=repr)
@every_pipeline
def test_every_transform_on_every_family_runs_and_is_undone_bit_for_bit_or_refuses_with_a_reason(transform, name):
    check_contract(PIPELINES[name](), transform)


def check_contract(pipe, transform, *, found=(), **call):
    """Plan, apply, draw, undo; or be refused for what this pipe is, which a reason may also name as in `found`."""
    original, before = picture(pipe, steps=2, **call), snapshot(pipe)
    the_plan = ernie_accel.plan(pipe, transform)
    assert differences(before, snapshot(pipe)) == []
    if the_plan.ok:
        ernie_accel.optimize(pipe, transform)
        if draws(transform):
            assert picture(pipe, steps=2, **call).isfinite().all()
        ernie_accel.restore(pipe)
    else:
        reasons = [reason for reasons in the_plan.problems.values() for reason in reasons]
        # What runs on ERNIE-Image and not here is refused because of this pipe, so the reason names what it found.
        assert all(any(word in reason for word in names_on(pipe) | {*found}) for reason in reasons), reasons
        with pytest.raises(ernie_accel.UnsupportedError):
            ernie_accel.optimize(pipe, transform)
    assert torch.equal(
        picture(pipe, steps=2, **call), original
    )  # first: a call leaves its number of timesteps on a pipe
    assert differences(before, snapshot(pipe)) == []
