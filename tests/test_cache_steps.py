"""`CacheSteps`: which steps are computed, how near the others come, and what it does not go with."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch._dynamo.testing

import ernie_accel
from ernie_accel import (
    CacheSteps,
    CallDefaults,
    CastDtype,
    Compile,
    Context,
    Offload,
    RewriteBlocks,
    SwapScheduler,
    Warmup,
)
from ernie_accel.recipes.presets import presets
from ernie_accel.transforms.denoiser.cache_steps.cache_steps import LEAST_STEPS
from ernie_accel.transforms.denoiser.cache_steps.forecast import FLOORS_DB
from tests.examples import differences, snapshot
from tests.pipelines import PIPELINES, after, interrupt_at, picture, tiny_ernie
from tests.test_graphs import H200, Recorder

CPU = Context.named("cpu")


def db(a, b):
    return (20 * torch.log10(b.norm() / (a - b).norm())).item()


def count_forwards(pipe):
    """Return a list that grows with every block 0 that runs."""
    ran = []
    pipe.transformer.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    return ran


@pytest.mark.parametrize("steps", [LEAST_STEPS, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (30, 50))])
@pytest.mark.parametrize("beside", [(), (CastDtype("bfloat16"),), (SwapScheduler("unipc"),)], ids=repr)
def test_on_the_trained_model_it_stays_above_its_floor_and_really_skips(trained, steps, beside):
    for every in FLOORS_DB:
        cache = CacheSteps(every)
        after, computed = trained(steps, *beside, cache)
        assert computed == sum(cache.computes(step, steps) for step in range(steps)) < steps
        assert cache.floor_db < db(after, trained(steps, *beside)[0]) < 90


def test_the_figures_of_its_docstring(trained):
    cast = CastDtype("bfloat16")
    for every, computed, measured_db, bfloat16_db in ((2, 27, 62.9, 35.0), (3, 19, 42.9, 32.0)):
        ernie_accel.optimize(trained.pipe, CacheSteps(every))
        assert ernie_accel.report(trained.pipe).entries[-1].applied.note.startswith(f"computes {computed} of 50 steps")
        assert db(trained(50, CacheSteps(every))[0], trained(50)[0]) == pytest.approx(measured_db, abs=1.0)
        in_bfloat16 = db(trained(30, cast, CacheSteps(every))[0], trained(30, cast)[0])
        assert in_bfloat16 == pytest.approx(bfloat16_db, abs=1.0)


@pytest.mark.parametrize(("every", "steps"), [(2, 30), (3, 30), (3, 20), (2, 19)])
def test_it_computes_the_steps_it_says(every, steps, ernie):
    cache = CacheSteps(every)
    expected = [step for step in range(steps) if cache.computes(step, steps)]
    assert set(expected) >= {0, 1, 2, steps - 1}
    assert (len(expected) == steps) == (steps < LEAST_STEPS)
    ernie_accel.optimize(ernie, CallDefaults(num_inference_steps=max(steps, LEAST_STEPS)), cache)
    ran = count_forwards(ernie)
    picture(ernie, steps=steps)
    assert len(ran) == len(expected)


def test_a_call_of_few_steps_is_computed_whole(ernie):
    before = picture(ernie, steps=8)
    ernie_accel.optimize(ernie, CacheSteps())
    assert torch.equal(picture(ernie, steps=8), before)


@pytest.mark.parametrize("name", ["ernie", "z_image", "lumina2", "newbie"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_no_picture_knows_of_the_one_before(name, guidance_scale):
    pipe = PIPELINES[name]()
    stock = picture(pipe, steps=24, guidance_scale=guidance_scale)
    ernie_accel.optimize(pipe, CacheSteps())
    first = picture(pipe, steps=24, guidance_scale=guidance_scale)
    picture(pipe, steps=24, guidance_scale=guidance_scale, prompt="a big blue square", seed=3)
    ran = count_forwards(pipe)
    assert torch.equal(picture(pipe, steps=24, guidance_scale=guidance_scale), first)
    assert not torch.equal(first, stock)
    halves = 2 if name in ("lumina2", "newbie") and guidance_scale > 1 else 1
    assert len(ran) == halves * sum(CacheSteps().computes(step, 24) for step in range(24))


@pytest.mark.parametrize("name", ["ernie", "z_image", "lumina2", "newbie"])
def test_what_changes_evenly_is_forecast_exactly(name):
    """A stand-in for the transformer whose output is a line over the noise level, another one for each picture."""
    pipe = PIPELINES[name]()

    def forward(*args, **kwargs):
        x, t = (kwargs["hidden_states"], kwargs["timestep"]) if kwargs.keys() > {"timestep"} else args[:2]
        lines = [torch.full_like(one, 0.3 + 0.1 * i) - 0.4 * t.flatten()[i] / 1000 for i, one in enumerate(x)]
        return (lines if isinstance(x, list) else torch.stack(lines),)

    pipe.transformer.forward = forward
    names = type(pipe.transformer).forward
    forward.__signature__ = inspect.signature(names.__get__(pipe.transformer))
    before = picture(pipe, steps=24, guidance_scale=4.0, output_type="latent")
    ernie_accel.optimize(pipe, CacheSteps(3))
    after = picture(pipe, steps=24, guidance_scale=4.0, output_type="latent")
    assert ((after - before).norm() / before.norm()).item() < 1e-5


def test_a_picture_that_failed_leaves_nothing_behind(ernie):
    ernie_accel.optimize(ernie, CacheSteps())
    first = picture(ernie, steps=24)

    with pytest.raises(KeyboardInterrupt):
        picture(ernie, steps=24, callback_on_step_end=interrupt_at(9))
    assert torch.equal(picture(ernie, steps=24), first)


def test_the_transformer_by_itself_computes(ernie):
    arguments = (torch.randn(1, 16, 4, 4), torch.full((1,), 500.0), torch.randn(1, 3, 64), torch.tensor([3]))
    expected = ernie.transformer(*arguments, return_dict=False)[0]
    ernie_accel.optimize(ernie, CacheSteps())
    for _ in range(4):
        assert torch.equal(ernie.transformer(*arguments, return_dict=False)[0], expected)
        assert torch.equal(ernie.transformer(*arguments).sample, expected)


def test_a_copy_of_the_pipe_caches_for_itself(ernie):
    ernie_accel.optimize(ernie, CacheSteps())
    first, other = picture(ernie, steps=24), copy.deepcopy(ernie)
    ran = count_forwards(ernie)
    assert torch.equal(picture(other, steps=24), first)
    assert ran == []


def test_rewritten_blocks_are_cached_alike(ernie):
    expected = picture(ernie_accel.optimize(tiny_ernie(), CacheSteps()), steps=24)
    assert torch.equal(picture(ernie_accel.optimize(ernie, RewriteBlocks(), CacheSteps()), steps=24), expected)


def test_a_captured_forward_is_replayed_at_the_computed_steps_only(monkeypatch):
    """A graph that had recorded the forecast would repeat it for ever: so the cache comes after the capture."""
    assert CacheSteps.phase == ernie_accel.CaptureGraphs.phase and CacheSteps.slot > ernie_accel.CaptureGraphs.slot
    assert CacheSteps.slot > Compile.slot
    recorder = Recorder()
    monkeypatch.setattr("ernie_accel.models.replays.capture_cuda", recorder)
    expected = picture(ernie_accel.optimize(tiny_ernie(), RewriteBlocks(), CacheSteps()), steps=24)
    pipe = ernie_accel.optimize(tiny_ernie(), RewriteBlocks(), ernie_accel.CaptureGraphs(), CacheSteps(), context=H200)
    assert torch.equal(picture(pipe, steps=24), expected)
    computed = sum(CacheSteps().computes(step, 24) for step in range(24))
    assert (recorder.captures, recorder.replays) == (1, computed - 1)


def test_compiled_blocks_keep_their_one_graph(ernie, monkeypatch):
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **(k | {"backend": count, "mode": None})))
    expected = picture(ernie_accel.optimize(tiny_ernie(), CacheSteps()), steps=24)
    ernie_accel.optimize(ernie, Compile(), CacheSteps(), Warmup(sizes=((64, 64),)))
    compiled = count.frame_count
    assert db(picture(ernie, steps=24), expected) > 80
    assert count.frame_count <= compiled + 1  # the warm-up has guidance, and so another batch size
    torch._dynamo.reset()


def test_hooks_of_diffusers_below_it_stay(ernie):
    before = snapshot(ernie)
    expected = picture(ernie_accel.optimize(tiny_ernie(), CacheSteps()), steps=24)
    applied = Offload("group").apply(ernie, CPU)
    ernie_accel.optimize(ernie, CacheSteps())
    assert torch.equal(picture(ernie, steps=24), expected)
    ernie_accel.restore(ernie)
    assert ernie.transformer.layers[0]._diffusers_hook.hooks
    applied.undo()
    assert [key for key in differences(before, snapshot(ernie)) if key in ("class", "methods", "components")] == []


def test_no_preset_of_few_steps_has_it():
    assert not [p.name for p in presets.values() if any(isinstance(t, CacheSteps) for t in p.transforms)]


@pytest.mark.parametrize(
    ("planned", "reason"),
    [
        ((CallDefaults("turbo"),), "8 steps are planned, and a cache pays from 20 on"),
        ((CallDefaults(num_inference_steps=19),), "19 steps are planned"),
        ((SwapScheduler("euler_ancestral"),), "SwapScheduler('euler_ancestral') adds noise at every step"),
        ((SwapScheduler("dpmpp_2m_sde"),), "adds noise at every step"),
        ((SwapScheduler("lcm"),), "adds noise at every step"),
        ((CallDefaults(num_inference_steps=20), SwapScheduler("dpmpp_3m")), None),
        ((CallDefaults("quality"), SwapScheduler("heun")), None),
        ((), None),
    ],
    ids=repr,
)
def test_what_it_does_not_go_with_is_a_reason(planned, reason, ernie):
    problems = ernie_accel.plan(ernie, CacheSteps(), *planned).problems
    reasons = [reason for reasons in problems.values() for reason in reasons]
    assert (len(reasons) == 1 and reason in reasons[0]) if reason else reasons == []


def test_what_the_pipe_has_already_is_a_reason_too(ernie, flux):
    ernie.scheduler.register_to_config(stochastic_sampling=True)
    assert "the scheduler (stochastic_sampling=True) adds noise" in CacheSteps().unsupported(ernie, CPU)[0]
    assert CacheSteps().unsupported(ernie, after(CPU, ernie, SwapScheduler("unipc"))) == []
    pipe = PIPELINES["ernie"]()
    pipe.transformer._context_manager = object()  # what cache-dit leaves on a transformer
    assert "has a cache of diffusers or cache-dit: disable it first" in CacheSteps().unsupported(pipe, CPU)[0]
    assert "FluxPipeline is of no known family" in CacheSteps().unsupported(flux, CPU)[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheSteps(1), r"every must be 2, 3 \(steps\), got 1"),
        (lambda: CacheSteps(first=1), "a line takes two points; got 1"),
        (lambda: CacheSteps(last=-1), "last must be >= 0, got -1"),
    ],
)
def test_bad_values_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()
