"""Pipes whose components the script passed through torch.compile: plans and transforms see through the wrapper."""

from __future__ import annotations

import copy
import threading
import warnings
from unittest import mock

import pytest
import torch

import ernie_accel
from ernie_accel import (
    CacheSteps,
    CallDefaults,
    CastDtype,
    CheckFinite,
    Compile,
    MakeContiguous,
    Quantize,
    RestoreWarning,
    RewriteBlocks,
    SetAttention,
    SwapScheduler,
    Warmup,
)
from ernie_accel.core.compiled import seen_through
from ernie_accel.core.components import inside_of, is_compiled_wrapper
from ernie_accel.core.turns import turn_of
from ernie_accel.families import family_of
from tests.examples import EXAMPLES, differences, snapshot
from tests.pipelines import picture

INSIDE = [transform for transform in EXAMPLES if set(transform.changes_inside) & {"transformer", "vae"}]
_NOT_DRAWN = CastDtype("float16", components=("transformer",))  # the VAE refuses what it gets
BESIDE = [
    transform for transform in EXAMPLES if transform not in (*INSIDE, _NOT_DRAWN) and not isinstance(transform, Warmup)
]


def wrap(module: torch.nn.Module, **kwargs) -> torch.nn.Module:
    return torch.compile(module, backend="eager", **kwargs)


@pytest.fixture
def untraced():
    """Let compiled modules run eagerly, for time's sake."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("transform", INSIDE, ids=repr)
def test_what_is_inside_is_changed_as_without_the_wrapper_which_restore_gives_back(ernie, untraced, transform):
    plain = copy.deepcopy(ernie)
    before = picture(ernie)
    wrappers = wrap(ernie.vae.decoder), wrap(ernie.transformer)
    ernie.vae.decoder, ernie.transformer = wrappers
    plan, expected = ernie_accel.plan(ernie, transform), ernie_accel.plan(plain, transform)
    assert plan.ok and plan.family == expected.family
    assert plan.steps[0].preview.changes == expected.steps[0].preview.changes
    assert (ernie.vae.decoder, ernie.transformer) == wrappers, "a plan changes nothing"
    ernie_accel.optimize(ernie, transform)
    ernie_accel.optimize(plain, transform)
    wrapped = ernie.vae.decoder if transform.changes_inside == ("vae",) else ernie.transformer
    kept = transform.keeps_compiled(plain, ernie_accel.report(plain).context)
    assert kept == (wrapped in wrappers)
    entry, expected = ernie_accel.report(ernie).entries[0], ernie_accel.report(plain).entries[0]
    assert entry.applied.changed == expected.applied.changed and entry.applied.skipped == expected.applied.skipped
    said = f"{'stays' if kept else 'is taken off'}"
    for note in (entry.applied.note, plan.steps[0].preview.note):
        assert "your own torch.compile of" in note and said in note
    assert torch.equal(picture(ernie), picture(plain))
    ernie_accel.optimize(ernie, transform)
    assert ernie_accel.report(ernie).entries[0] is entry, "the same request again changes nothing"
    ernie_accel.restore(ernie)
    assert (ernie.vae.decoder, ernie.transformer) == wrappers
    assert torch.equal(picture(ernie), before)


@pytest.mark.parametrize("transform", BESIDE, ids=repr)
def test_what_leaves_the_denoiser_alone_acts_as_without_wrappers_and_they_stay(ernie, untraced, transform):
    plain = copy.deepcopy(ernie)
    for name in ("transformer", "text_encoder", "vae"):
        setattr(ernie, name, wrap(getattr(ernie, name)))
    before, wrappers = picture(ernie), (ernie.transformer, ernie.text_encoder, ernie.vae)
    if not ernie_accel.plan(plain, transform).ok:
        assert not ernie_accel.plan(ernie, transform).ok
        return
    want = picture(ernie_accel.optimize(plain, transform))
    assert torch.equal(picture(ernie_accel.optimize(ernie, transform)), want)
    if transform.changes_inside != ("text_encoder",):
        assert (ernie.transformer, ernie.text_encoder, ernie.vae) == wrappers
    ernie_accel.restore(ernie)
    assert (ernie.transformer, ernie.text_encoder, ernie.vae) == wrappers
    assert torch.equal(picture(ernie), before)


def test_a_wrapped_pipe_is_saved_as_what_is_inside(ernie, untraced, tmp_path):
    ernie.transformer = wrap(ernie.transformer)
    want = picture(ernie_accel.optimize(ernie, Quantize("int8-weight-only")))
    loaded = ernie_accel.load(ernie_accel.save(ernie, tmp_path / "saved"))
    assert not is_compiled_wrapper(loaded.transformer)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(picture(loaded), want)


def test_a_plan_says_once_what_becomes_of_the_scripts_own_compilation(ernie):
    ernie.transformer = wrap(ernie.transformer)
    text = str(ernie_accel.plan(ernie, RewriteBlocks(), Compile(), SetAttention("math")))
    assert text.count("your own torch.compile of transformer is taken off") == 1 and "stays" not in text


def test_a_single_wrapped_block_is_seen_through_too(ernie, untraced):
    names = sorted(ernie_accel.optimize(copy.deepcopy(ernie), RewriteBlocks()).transformer.state_dict())
    wrapper = ernie.transformer.layers[1] = wrap(ernie.transformer.layers[1])
    ernie_accel.optimize(ernie, RewriteBlocks())
    assert sorted(ernie.transformer.state_dict()) == names
    assert "transformer.layers.1 is taken off" in ernie_accel.report(ernie).entries[0].applied.note.replace(".*", ".1")
    ernie_accel.restore(ernie)
    assert ernie.transformer.layers[1] is wrapper


def test_quantized_layers_are_those_of_the_plain_transformer_and_are_compiled_again(ernie):
    """For real: what dynamo had traced before is traced again."""
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    quantize = Quantize("int8-weight-only")
    want = picture(ernie_accel.optimize(copy.deepcopy(ernie), quantize))
    wrapper = ernie.transformer = torch.compile(ernie.transformer, backend=counted)
    before, traced = picture(ernie), len(graphs)
    ernie_accel.optimize(ernie, quantize)
    assert ernie.transformer is wrapper
    assert torch.equal(picture(ernie), want)
    assert len(graphs) > traced > 0
    assert torch.equal(picture(ernie_accel.restore(ernie)), before)


@pytest.mark.parametrize("transform", [RewriteBlocks(), Quantize("int8-weight-only"), CacheSteps()], ids=repr)
def test_modules_compiled_in_place_are_as_given_after_restore(ernie, untraced, transform):
    want = picture(ernie_accel.optimize(copy.deepcopy(ernie), transform))
    ernie.transformer.compile(backend="eager")
    ernie.transformer.layers[0].compile(backend="eager")
    compiled = ernie.transformer._compiled_call_impl, ernie.transformer.layers[0]._compiled_call_impl
    ernie_accel.optimize(ernie, transform)
    assert torch.equal(picture(ernie), want)
    taken_off = ernie.transformer._compiled_call_impl is None
    assert taken_off != isinstance(transform, Quantize)
    assert taken_off == ("is taken off" in ernie_accel.report(ernie).entries[0].applied.note)
    ernie_accel.restore(ernie)
    assert compiled == (ernie.transformer._compiled_call_impl, ernie.transformer.layers[0]._compiled_call_impl)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_transformer_that_is_compiled_as_a_whole_afterwards_caches_nothing_and_says_so(ernie, untraced, in_place):
    want = picture(ernie, num_inference_steps=20)
    ernie_accel.optimize(ernie, CacheSteps())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not torch.equal(picture(ernie, num_inference_steps=20), want)
    if in_place:
        ernie.transformer.compile(backend="eager")
    else:
        ernie.transformer = wrap(ernie.transformer)
    with (
        mock.patch("torch.compiler.is_compiling", return_value=True),
        pytest.warns(UserWarning, match=r"CacheSteps\(\) approximated no step: .*Compile\(\)"),
    ):
        assert torch.equal(picture(ernie, num_inference_steps=20), want)


def test_blocks_that_the_library_compiles_take_the_place_of_the_whole(ernie, untraced):
    wrapper = ernie.transformer = wrap(ernie.transformer)
    ernie_accel.optimize(ernie, RewriteBlocks(), Compile())
    assert all(block._compiled_call_impl is not None for block in ernie.transformer.layers)
    ernie_accel.optimize(ernie, RewriteBlocks())
    assert ernie.transformer is inside_of(wrapper)
    ernie_accel.optimize(ernie, SwapScheduler("unipc"))
    assert ernie.transformer is wrapper


def test_what_a_script_puts_there_afterwards_stays(ernie, untraced):
    ernie.transformer = wrap(ernie.transformer)
    ernie_accel.optimize(ernie, RewriteBlocks())
    again = ernie.transformer = wrap(ernie.transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestoreWarning)
        ernie_accel.restore(ernie)
    assert ernie.transformer is again, "compiled once more by the script: compiled is what it wants"

    ernie_accel.optimize(ernie, RewriteBlocks())
    other = ernie.transformer = copy.deepcopy(inside_of(again))
    with pytest.warns(RestoreWarning, match=r"transformer as it is: it was replaced .* torch\.compile"):
        ernie_accel.restore(ernie)
    assert ernie.transformer is other


def test_a_request_that_fails_leaves_the_wrapper_in_place(ernie, untraced):
    ernie.vae.decoder, ernie.transformer = wrap(ernie.vae.decoder), wrap(ernie.transformer)
    before = snapshot(ernie)
    with (
        mock.patch.object(Compile, "apply", side_effect=RuntimeError("on purpose")),
        pytest.raises(ernie_accel.ApplyError),
    ):
        ernie_accel.optimize(ernie, RewriteBlocks(), Quantize("int8-weight-only"), Compile())
    assert not differences(before, snapshot(ernie))


def test_pipes_that_share_a_wrapped_component_know_it_for_the_same(ernie, untraced):
    ernie.transformer = wrap(ernie.transformer)
    second = type(ernie)(**ernie.components)
    quantize = Quantize("int8-weight-only")
    ernie_accel.optimize(ernie, RewriteBlocks())
    with pytest.raises(ernie_accel.UnsupportedError, match="transformer is shared with another pipe"):
        ernie_accel.optimize(second, quantize)
    ernie_accel.restore(ernie)
    ernie_accel.optimize(second, quantize)


def test_pipes_take_turns_on_a_component_that_one_has_with_its_wrapper(ernie, untraced):
    ernie.transformer = wrap(ernie.transformer)
    second = type(ernie)(transformer=ernie.transformer, **dict.fromkeys(set(ernie.components) - {"transformer"}))
    ernie_accel.optimize(ernie, RewriteBlocks())
    assert second.transformer is not ernie.transformer
    entered = threading.Event()

    def enter() -> None:
        with turn_of(second):
            entered.set()

    thread = threading.Thread(target=enter)
    with turn_of(ernie):
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    thread.join()


def test_the_family_and_all_that_leaves_the_inside_alone_stay(ernie, untraced):
    family, want = family_of(ernie), picture(ernie)
    wrapper = ernie.transformer = wrap(ernie.transformer)
    assert family_of(ernie) is family
    alone = (CastDtype("bf16"), MakeContiguous(), CheckFinite(), CallDefaults("turbo"), SwapScheduler("unipc"))
    plan = ernie_accel.plan(ernie, *alone)
    assert plan.ok, plan
    ernie_accel.optimize(ernie, CastDtype("bf16"), CheckFinite())
    assert {weight.dtype for weight in ernie.transformer.parameters()} == {torch.bfloat16}
    assert ernie.transformer is wrapper
    ernie_accel.restore(ernie)
    assert torch.equal(picture(ernie), want)


def test_a_view_is_made_only_where_there_is_a_wrapper(ernie):
    assert seen_through(ernie) is ernie
    ernie.vae.decoder = wrap(ernie.vae.decoder)
    view = seen_through(ernie)
    assert type(view) is type(ernie) and view.transformer is ernie.transformer
    assert view.vae is not ernie.vae and view.vae.decoder is inside_of(ernie.vae.decoder)
    assert [*view.vae.state_dict()] == [name.replace("_orig_mod.", "") for name in ernie.vae.state_dict()]


def test_every_transform_of_the_denoiser_says_that_it_changes_it():
    for transform in EXAMPLES:
        if "denoiser" in type(transform).__module__:
            assert "transformer" in transform.changes_inside
