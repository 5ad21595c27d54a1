"""`CacheSteps` through cache-dit and through the hooks of diffusers: near enough, and nothing of them stays behind."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from dataclasses import replace

import cache_dit
import pytest
import torch
import torch._dynamo.testing
from accelerate.hooks import ModelHook, add_hook_to_module
from cache_dit.caching.block_adapters import FakeDiffusionPipeline
from diffusers import ErnieImagePipeline
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from peft import LoraConfig

import ernie_accel
from ernie_accel import (
    CacheSteps,
    CallDefaults,
    CaptureGraphs,
    CastDtype,
    Compile,
    Context,
    ElideMask,
    Offload,
    RewriteBlocks,
    SwapScheduler,
    UnknownNameError,
)
from ernie_accel.models.ernie_image import blocks as ernie_image_blocks
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.transforms.denoiser.cache_steps.db_cache import _quiet
from tests.examples import differences, snapshot
from tests.pipelines import PIPELINES, after, interrupt_at, picture, tiny_ernie
from tests.test_cache_steps import db
from tests.test_graphs import H200, Recorder

CPU = Context.named("cpu")
BACKENDS = ["cache-dit", "diffusers"]
both = pytest.mark.parametrize("backend", BACKENDS)
every_family = pytest.mark.parametrize("name", ["ernie", "z_image", "lumina2", "newbie"])


def count_last_blocks(pipe):
    """Return a list that grows with every last block that runs: the first runs at every step."""
    ran = []
    pipe.transformer.layers[-1].register_forward_pre_hook(lambda *_: ran.append(1))
    return ran


@pytest.fixture
def often(monkeypatch):
    """Return backend -> a cache that leaves much out of the tiny models too: random weights change a lot in a step."""
    monkeypatch.setattr("ernie_accel.transforms.denoiser.cache_steps.blocks.MOST_THRESHOLD", 9.0)
    return lambda backend, **settings: CacheSteps(backend=backend, threshold=9.0, **settings)


@both
@pytest.mark.parametrize("steps", [20, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (30, 50))])
@pytest.mark.parametrize("beside", [(), (CastDtype("bfloat16"),), (SwapScheduler("unipc"),)], ids=repr)
def test_on_the_trained_model_it_stays_above_its_floor_and_really_skips(trained, steps, beside, backend):
    cache = CacheSteps(backend=backend)
    (before, whole), (after, computed) = trained(steps, *beside), trained(steps, *beside, cache)
    assert whole == steps
    assert computed < steps - 1
    assert cache.floor_db < db(after, before) < 90


@pytest.mark.parametrize(
    ("backend", "computed", "measured_db", "bfloat16_db"),
    [("cache-dit", 29, 57.0, 34.5), ("diffusers", 25, 50.1, 34.6)],
)
def test_the_figures_of_its_docstring(trained, backend, computed, measured_db, bfloat16_db):
    cache = CacheSteps(backend=backend)
    after, ran = trained(50, cache)
    assert ran == computed
    assert db(after, trained(50)[0]) == pytest.approx(measured_db, abs=1.0)
    cast = CastDtype("bfloat16")
    assert db(trained(30, cast, cache)[0], trained(30, cast)[0]) == pytest.approx(bfloat16_db, abs=1.0)


@both
def test_less_is_nearer_and_saves_less(trained, backend):
    (before, _), (near, more), (far, fewer) = (
        trained(50, *cache)
        for cache in ((), (CacheSteps(backend=backend, threshold=0.02),), (CacheSteps(backend=backend),))
    )
    assert more > fewer
    assert db(near, before) > db(far, before) + 10


@both
@every_family
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_every_family_is_cached_and_no_picture_knows_of_the_one_before(name, guidance_scale, backend, often):
    pipe = PIPELINES[name]()
    ran = count_last_blocks(pipe)
    stock = picture(pipe, steps=24, guidance_scale=guidance_scale)
    whole = len(ran)
    ernie_accel.optimize(pipe, often(backend))
    ran.clear()
    first = picture(pipe, steps=24, guidance_scale=guidance_scale)
    computed = len(ran)
    assert 0 < computed < 0.6 * whole
    assert not torch.equal(first, stock)
    picture(pipe, steps=24, guidance_scale=guidance_scale, prompt="a big blue square", seed=3)
    ran.clear()
    assert torch.equal(picture(pipe, steps=24, guidance_scale=guidance_scale), first)
    assert len(ran) == computed


@both
def test_guidance_that_ends_half_way_mixes_no_prompts(backend, often):
    """Lumina 2 can leave the negative prompt out of the last steps: who counts calls takes one prompt for the other."""
    pipe = PIPELINES["lumina2"]()
    request = {"steps": 24, "guidance_scale": 4.0, "cfg_trunc_ratio": 0.5, "output_type": "latent"}
    before = picture(pipe, **request)
    ernie_accel.optimize(pipe, often(backend))
    with_both = db(picture(pipe, **request | {"cfg_trunc_ratio": 1.0}), picture(PIPELINES["lumina2"](), **request))
    assert db(picture(pipe, **request), before) > with_both


@both
def test_first_and_last_steps_and_calls_of_few_are_computed_whole(ernie, backend, often):
    ernie_accel.optimize(ernie, often(backend, first=10, last=11))
    seen = []
    ernie.transformer.layers[-1].register_forward_pre_hook(lambda *_: seen.append(ernie.scheduler.step_index or 0))
    picture(ernie, steps=24)
    assert set(range(24)) - set(seen) == ({10, 12} if backend == "cache-dit" else {10, 11, 12})
    seen.clear()
    stock = picture(tiny_ernie(), steps=19)
    assert torch.equal(picture(ernie, steps=19), stock)
    assert len(seen) == 19


def traces(pipe):
    """Return all that either package is known to leave on a pipe, its class, its transformer or its blocks."""
    transformer = pipe.transformer
    owners = [pipe, transformer, *transformer.modules()]
    return (
        [sorted(vars(owner)) for owner in owners],
        [list(module._modules) for module in transformer.modules()],
        list(transformer.state_dict()),
        {name: id(value) for name, value in vars(ErnieImagePipeline).items()},
        dict(vars(FakeDiffusionPipeline)),
        {name: id(value) for name, value in vars(type(transformer)).items()},
    )


@both
def test_nothing_of_it_is_on_the_pipe_but_during_a_call(ernie, backend, often):
    picture(ernie, steps=24)  # its first call makes transformers note things on the text encoder
    before, plain = traces(ernie), snapshot(ernie)
    ernie_accel.optimize(ernie, often(backend))
    optimized = traces(ernie)
    picture(ernie, steps=24)

    with pytest.raises(KeyboardInterrupt):
        picture(ernie, steps=24, callback_on_step_end=interrupt_at(9))
    assert traces(ernie) == optimized
    ernie_accel.restore(ernie)
    assert traces(ernie) == before
    assert differences(plain, snapshot(ernie)) == []


@both
def test_a_block_that_fails_leaves_the_transformer_whole(ernie, backend, often):
    ernie_accel.optimize(ernie, often(backend))
    picture(ernie)
    before, ran = traces(ernie), []

    def fail(*_):
        ran.append(1)
        if len(ran) == 7:
            raise RuntimeError("out of memory")

    hook = ernie.transformer.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        picture(ernie, steps=24)
    hook.remove()
    assert traces(ernie) == before


@both
def test_two_pipes_and_a_copy_know_nothing_of_each_other(backend, often):
    pipe, other, plain = tiny_ernie(), tiny_ernie(), tiny_ernie()
    stock = picture(plain, steps=24)
    for each in (pipe, other):
        ernie_accel.optimize(each, often(backend))
    first = picture(pipe, steps=24)
    twin = copy.deepcopy(pipe)
    ran = {name: count_last_blocks(each) for name, each in (("pipe", pipe), ("other", other), ("plain", plain))}
    assert torch.equal(picture(twin, steps=24), first)
    assert not any(ran.values())
    # One within the other, as two threads would have it.
    inner = []
    draw_other = lambda p, step, t, tensors: inner.append(picture(other, steps=24)) or tensors if step == 5 else tensors  # noqa: E731
    assert torch.equal(picture(pipe, steps=24, callback_on_step_end=draw_other), first)
    assert torch.equal(inner[0], first)
    ernie_accel.restore(pipe)
    ernie_accel.restore(other)
    ran["plain"].clear()
    assert torch.equal(picture(plain, steps=24), stock)
    assert len(ran["plain"]) == 24


@both
def test_rewritten_blocks_without_a_mask_are_cached_alike(ernie, backend, often):
    plain = picture(ernie_accel.optimize(tiny_ernie(), often(backend)), steps=24)
    ernie_accel.optimize(ernie, RewriteBlocks(), ElideMask(), often(backend))
    ran = count_last_blocks(ernie)
    assert db(picture(ernie, steps=24), plain) > 90
    assert 0 < len(ran) < 24


@both
def test_compiled_blocks_keep_their_one_graph(ernie, monkeypatch, backend, often):
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **(k | {"backend": count, "mode": None})))
    expected = picture(ernie_accel.optimize(tiny_ernie(), often(backend)), steps=24)
    ernie_accel.optimize(ernie, Compile(), often(backend))
    assert db(picture(ernie, steps=24), expected) > 80
    assert count.frame_count == 1
    torch._dynamo.reset()


@both
def test_hooks_of_accelerate_and_what_is_around_them_run_at_every_step(ernie, backend, often):
    """As ``enable_model_cpu_offload`` hangs them onto the transformer."""
    log = []

    class Notes(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            log.append("hook")
            return args, kwargs

    add_hook_to_module(ernie.transformer, Notes())
    hooked = ernie.transformer.forward

    @functools.wraps(hooked)
    def around(*args, **kwargs):
        log.append("around")
        return hooked(*args, **kwargs)

    ernie.transformer.forward = around
    before = traces(ernie)
    ernie_accel.optimize(ernie, often(backend))
    ran = count_last_blocks(ernie)
    picture(ernie, steps=24)
    assert len(ran) < 15
    assert log == ["around", "hook"] * 24
    ernie_accel.restore(ernie)
    assert traces(ernie)[1:] == before[1:]
    assert ernie.transformer.forward is around


def test_cache_dit_prints_nothing_into_a_program_s_output(ernie, capfd):
    handlers = logging.getLogger("CACHE_DIT").handlers
    levels = [handler.level for handler in handlers]
    picture(ernie_accel.optimize(ernie, CacheSteps(backend="cache-dit")), steps=24)
    assert capfd.readouterr().out == ""
    assert levels and [handler.level for handler in handlers] == levels


def test_threads_leave_the_log_levels_of_cache_dit_as_they_were():
    """The second begins while the first has them changed, and ends after it."""
    handlers = logging.getLogger("CACHE_DIT").handlers
    levels = [handler.level for handler in handlers]
    first, second = (_quiet() for _ in range(2))
    entered = threading.Event()

    def enter_and_leave():
        with second:
            entered.set()

    with first:
        thread = threading.Thread(target=enter_and_leave)
        thread.start()
        overtook = entered.wait(0.2)
    thread.join()
    assert not overtook, "two threads changed them at the same time"
    assert levels and [handler.level for handler in handlers] == levels


@pytest.mark.parametrize(
    ("backend", "context", "planned", "reason"),
    [
        (
            "cache-dit",
            Context("cpu", "cpu", versions={}),
            (),
            "cache_dit is not installed: pip install 'ernie-accel[cache-dit]'",
        ),
        ("cache-dit", Context.named("ascend910b"), (), "an attention kernel of its own on an NPU"),
        ("diffusers", CPU, (), None),
        ("forecast", CPU, (), None),
        ("cache-dit", H200, (RewriteBlocks(), CaptureGraphs()), "captured graphs replay all blocks"),
        ("diffusers", H200, (RewriteBlocks(), CaptureGraphs()), "captured graphs replay all blocks"),
        ("forecast", H200, (RewriteBlocks(), CaptureGraphs()), None),
        ("diffusers", CPU, (RewriteBlocks(), CaptureGraphs()), None),  # nothing to do on a CPU
        ("diffusers", H200, (Offload("group"),), "Offload('group') fetches the next block while one runs"),
        ("diffusers", H200, (Offload("model"),), None),
        ("diffusers", CPU, (CallDefaults("turbo"),), "8 steps are planned, and a cache pays from 20 on"),
        ("cache-dit", CPU, (SwapScheduler("dpmpp_2m_sde"),), "adds noise at every step"),
    ],
)
def test_what_it_does_not_go_with_is_a_reason(backend, context, planned, reason, ernie):
    if reason is None or "not installed" not in reason:
        context = replace(context, versions={"cache_dit": "1.5.3"})
    reasons = CacheSteps(backend=backend).unsupported(ernie, after(context, ernie, *planned))
    assert (len(reasons) == 1 and reason in reasons[0]) if reason else reasons == []


@both
def test_what_the_pipe_is_may_be_a_reason_too(backend, flux):
    cache = CacheSteps(backend=backend)
    assert "has no list 'layers' of two blocks or more" in cache.unsupported(tiny_ernie(layers=1), CPU)[0]
    assert cache.unsupported(flux, CPU) == CacheSteps().unsupported(flux, CPU)
    pipe = ernie_accel.optimize(tiny_ernie(), RewriteBlocks())
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 64, 2, Recorder())
    assert "captured graphs replay all blocks" in cache.unsupported(pipe, CPU)[0]
    pipe = tiny_ernie()
    Offload("group").apply(pipe, CPU)
    assert "group offloading, which is on, fetches the next block" in cache.unsupported(pipe, CPU)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cachedit"}, "Unknown backend of CacheSteps 'cachedit'. Did you mean 'cache-dit'.*diffusers"),
        ({"every": 3, "backend": "cache-dit"}, "every=3 is for backend='forecast', not for 'cache-dit': leave it out"),
        ({"threshold": 0.01}, "threshold=0.01 is for backend='cache-dit' or 'diffusers', not for 'forecast'"),
        ({"threshold": 0.2, "backend": "diffusers"}, "at most 0.05, because no floor was found for more; got 0.2"),
        ({"threshold": 0.0, "backend": "cache-dit"}, "threshold must be above 0"),
        ({"every": 9, "backend": "diffusers", "last": -1}, "every=9 is for .*; last must be >= 0, got -1"),
    ],
)
def test_bad_values_are_refused_at_once_and_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        CacheSteps(**arguments)


def test_an_unknown_backend_lists_those_there_are():
    with pytest.raises(UnknownNameError) as caught:
        CacheSteps(backend="magic")
    assert caught.value.valid == ("forecast", "cache-dit", "diffusers")


# Why neither package is used as it comes; docs/concepts.md says so, and this says when it is no longer true.


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("ernie", "ErnieImageSharedAdaLNBlock'> not registered"),
        ("z_image", "Parameter 'hidden_states' not found"),
        ("lumina2", "Lumina2TransformerBlock'> not registered"),
        ("newbie", "Lumina2TransformerBlock'> not registered"),
    ],
)
def test_diffusers_by_itself_carries_no_family(name, error):
    pipe = PIPELINES[name]()
    assert not hasattr(pipe.transformer, "enable_cache")

    def first_block(pipe):
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(0.05))
        return pipe

    with pytest.raises(ValueError, match=error):
        picture(first_block(pipe))


def test_cache_dit_by_itself_leaves_the_class_and_the_transformer_changed():
    cls = type("ErnieImagePipeline", (ErnieImagePipeline,), {})  # not the class that other tests use
    stock, pipes = cls.__call__, [tiny_ernie(), tiny_ernie()]
    children = list(pipes[0].transformer._modules)
    for pipe in pipes:
        pipe.__class__ = cls
        cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    assert cls.__call__ is not stock
    picture(pipes[0])
    for pipe in pipes:
        cache_dit.disable_cache(pipe)
    assert cls.__call__ is not stock
    assert "forward" in vars(pipes[0].transformer)
    assert list(pipes[0].transformer._modules) != children


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_second_pipe_over_the_same_transformer_computes_its_own_steps(ernie, backend, often):
    """In another thread, while a cached picture is being drawn; its scheduler is its own."""
    plain = type(ernie)(**{**ernie.components, "scheduler": copy.deepcopy(ernie.scheduler)})
    plain.set_progress_bar_config(disable=True)
    expected = picture(plain, steps=24)
    ernie_accel.optimize(ernie, CacheSteps() if backend is None else often(backend))
    cached = picture(ernie, steps=24)
    assert not torch.equal(cached, expected)
    got, under_way, drawn = [], threading.Event(), threading.Event()

    def draw():
        under_way.wait(10)
        got.append(picture(plain, steps=24))
        drawn.set()

    thread = threading.Thread(target=draw)
    thread.start()

    def pause(*_):
        """Hold the cached picture inside of a forward until the other one is drawn."""
        if threading.current_thread() is not thread and not under_way.is_set():
            under_way.set()
            assert drawn.wait(20)

    ernie.transformer.layers[-1].register_forward_pre_hook(pause)
    assert torch.equal(picture(ernie, steps=24), cached)
    thread.join()
    assert torch.equal(got[0], expected)


def test_another_scale_between_two_steps_is_not_forecast_from_the_one_before(ernie):
    ernie_accel.optimize(ernie, CacheSteps())
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
    ernie.transformer.add_adapter(config, adapter_name="a")
    ran = count_last_blocks(ernie)

    def quieter(pipe, step, timestep, tensors):
        if step == 10:
            pipe.transformer.set_adapters(["a"], [0.2])
        return {}

    picture(ernie, steps=24)
    usual = len(ran)
    picture(ernie, steps=24, callback_on_step_end=quieter)
    assert len(ran) == 2 * usual + 1  # a line takes two points
