"""What a script does to an optimized pipe: LoRAs, other components, and pipes that share their components."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings

import pytest
import torch
from safetensors.torch import save_file

import ernie_accel
from ernie_accel import (
    BatchPromptEncoding,
    CallDefaults,
    CastDtype,
    CheckFinite,
    MakeContiguous,
    Phase,
    Quantize,
    RestoreError,
    RestoreWarning,
    RewriteBlocks,
    SliceVae,
    SwapScheduler,
    UnsupportedError,
)
from ernie_accel.core import owners
from ernie_accel.core.apply import suspended
from ernie_accel.quantization.layers import holder_of
from tests.pipelines import picture, tiny_ernie, tiny_z_image

MAKERS = {"ernie": tiny_ernie, "z-image": tiny_z_image}
INT8 = Quantize("int8-weight-only", backend="torchao")


@pytest.fixture(autouse=True)
def no_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestoreWarning)
        yield


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def lora(tmp_path, make):
    """A LoRA for the attention of every block, loaded by calling it with a pipe."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in make().transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and "attention" in name:
            down = torch.randn(4, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 4, generator=generator)
            tensors |= {f"transformer.{name}.lora_A.weight": down * 0.2, f"transformer.{name}.lora_B.weight": up * 0.2}
    save_file(tensors, tmp_path / "lora.safetensors")
    return lambda pipe: pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="a")


def quantized(pipe):
    return [name for name, module in pipe.transformer.named_modules() if holder_of(module)]


@pytest.mark.parametrize("last", [ernie_accel.restore, lambda pipe: ernie_accel.optimize(pipe, CallDefaults("turbo"))])
def test_a_lora_loaded_on_a_quantized_pipe_stays_when_the_quantization_goes(make, lora, last):
    expected = make()
    lora(expected)
    pipe = ernie_accel.optimize(make(), INT8)
    lora(pipe)
    last(pipe)
    assert not quantized(pipe)
    assert pipe.get_active_adapters() == ["a"]
    assert torch.equal(picture(pipe), picture(expected))
    pipe.fuse_lora()
    expected.fuse_lora()
    assert torch.equal(picture(pipe), picture(expected))


def test_a_lora_that_was_there_first_and_is_unloaded_leaves_no_quantized_layer(make, lora):
    pipe = make()
    lora(pipe)
    ernie_accel.optimize(pipe, INT8)
    pipe.unload_lora_weights()
    assert quantized(pipe)
    ernie_accel.restore(pipe)
    assert not quantized(pipe)
    assert torch.equal(picture(pipe), picture(make()))


def test_a_change_to_quantized_weights_is_not_lost_in_silence(make):
    pipe = ernie_accel.optimize(make(), INT8)
    layer = pipe.transformer.get_submodule(quantized(pipe)[0])
    layer.weight.qdata.add_(1)
    drawn = picture(pipe)
    plan = ernie_accel.plan(pipe, SliceVae())
    assert "was changed since" in str(plan)
    for change in (ernie_accel.restore, lambda pipe: ernie_accel.optimize(pipe, CallDefaults("turbo"))):
        with pytest.raises((RestoreError, UnsupportedError), match="was changed since"):
            change(pipe)
        assert torch.equal(picture(pipe), drawn)


def test_a_fused_lora_survives_the_end_of_a_cast(make, lora):
    pipe = ernie_accel.optimize(make(), CastDtype("bfloat16"))
    lora(pipe)
    pipe.fuse_lora()
    fused = {name: w.float() for name, w in pipe.transformer.named_parameters() if name.endswith("base_layer.weight")}
    with pytest.warns(RestoreWarning, match="got other values"):
        ernie_accel.restore(pipe)
    assert fused
    now = dict(pipe.transformer.named_parameters())
    for name, weight in fused.items():
        assert now[name].dtype == torch.float32
        assert torch.equal(now[name], weight)
    original = dict(make().transformer.named_parameters())
    for name in original.keys() & now.keys() - fused.keys():
        assert torch.equal(now[name], original[name])


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_component_that_came_in_the_dtype_of_a_cast_pipe_draws_with_the_restored_one(make, name):
    pipe = ernie_accel.optimize(make(), CastDtype("bfloat16"))
    theirs = getattr(make(), name).to(torch.bfloat16)
    setattr(pipe, name, theirs)
    with pytest.warns(RestoreWarning, match=f"restore cast {name} to torch.float32, as the rest of the pipe"):
        ernie_accel.restore(pipe)
    expected = make()
    getattr(expected, name).to(torch.bfloat16).to(torch.float32)
    assert getattr(pipe, name) is theirs
    assert torch.equal(picture(pipe), picture(expected))


def test_layerwise_casting_computes_in_the_dtype_of_the_restored_pipe(make):
    pipe, expected = ernie_accel.optimize(make(), CastDtype("bfloat16")), make()
    for each, dtype in ((pipe, torch.bfloat16), (expected, torch.float32)):
        each.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        picture(each)
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe), picture(expected))


def test_a_scheduler_of_the_script_stays(make):
    pipe = ernie_accel.optimize(make(), SwapScheduler("unipc"))
    theirs = pipe.scheduler = type(make().scheduler).from_config(make().scheduler.config)
    with pytest.warns(RestoreWarning, match="scheduler"):
        ernie_accel.restore(pipe)
    assert pipe.scheduler is theirs


def test_a_request_is_applied_again_to_what_replaced_its_work(make):
    pipe = ernie_accel.optimize(make(), SwapScheduler("unipc"), CastDtype("bfloat16", components=("transformer",)))
    pipe.transformer = make().transformer
    ernie_accel.optimize(pipe, SwapScheduler("unipc"), CastDtype("bfloat16", components=("transformer",)))
    assert pipe.transformer.dtype == torch.bfloat16
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe), picture(make()))


def test_a_replaced_scheduler_is_swapped_again_when_asked(make):
    pipe = ernie_accel.optimize(make(), SwapScheduler("unipc"))
    pipe.scheduler = make().scheduler
    with pytest.warns(RestoreWarning, match="scheduler"):
        ernie_accel.optimize(pipe, SwapScheduler("unipc"))
    assert torch.equal(picture(pipe), picture(ernie_accel.optimize(make(), SwapScheduler("unipc"))))


# ---- two pipes over the same components ------------------------------------------------------------------------------


def sharing(make):
    pipe = make()
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return pipe, other


PAIRS = [
    (BatchPromptEncoding(), BatchPromptEncoding()),
    (INT8, RewriteBlocks()),
    (RewriteBlocks(), INT8),
    (CastDtype("bfloat16"), MakeContiguous(channels_last=("vae",))),
    (MakeContiguous(channels_last=("vae",)), CastDtype("bfloat16")),
    (CastDtype("bfloat16"), RewriteBlocks()),
    (SliceVae(), CastDtype("bfloat16", components=("transformer",))),
    (CallDefaults("turbo"), CastDtype("bfloat16")),
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda transform: type(transform).__name__)
@pytest.mark.parametrize("order", [1, -1])
def test_two_pipes_over_the_same_components_are_given_back_or_one_is_refused(first, second, order):
    stock = picture(tiny_ernie())
    pipe, other = sharing(tiny_ernie)
    ernie_accel.optimize(pipe, first)
    before = picture(other)
    plan = ernie_accel.plan(other, second)
    if plan.ok:
        ernie_accel.optimize(other, second)
    else:
        assert "is shared with another pipe" in str(plan)
        with pytest.raises(UnsupportedError, match="is shared with another pipe"):
            ernie_accel.optimize(other, second)
        assert torch.equal(picture(other), before)
    for each in (pipe, other)[::order]:
        ernie_accel.restore(each)
    assert torch.equal(picture(pipe), stock)
    assert torch.equal(picture(other), stock)


@pytest.mark.parametrize("second", ["its class", "from_pipe"])
def test_a_second_pipe_of_the_class_of_an_optimized_one_is_a_pipe_of_its_own(second):
    """The class of an optimized pipe goes around its calls by what only that pipe has."""
    stock = tiny_ernie()
    pipe = ernie_accel.optimize(tiny_ernie(), BatchPromptEncoding(), CallDefaults("turbo"), CheckFinite())
    cls = type(pipe)
    other = cls(**pipe.components) if second == "its class" else cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is type(stock)
    assert torch.equal(picture(other), picture(stock))
    assert ernie_accel.report(other).entries == ()
    assert type(pipe) is cls
    assert torch.equal(picture(pipe), picture(stock))
    made = type("Mine", (cls,), {})(**pipe.components)
    assert type(made).__name__ == "Mine"


def test_a_pipe_made_of_an_optimized_one_shares_its_parts_and_has_stocks_defaults():
    """In the bits of a pipe that was made first and optimized then, called with the pipeline's own defaults."""
    given = {"num_inference_steps": 2, "guidance_scale": 1.0}
    pipe = ernie_accel.optimize(tiny_z_image(), CastDtype("bfloat16"), INT8, CallDefaults(**given))
    made = type(pipe).from_pipe(pipe, torch_dtype=torch.bfloat16)
    made.set_progress_bar_config(disable=True)
    assert inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default == 2
    assert inspect.signature(type(made).__call__) == inspect.signature(type(tiny_z_image()).__call__)
    assert torch.equal(picture(made, **given), picture(pipe, **given))

    ernie_accel.optimize(made, CallDefaults(num_inference_steps=3))  # calls are the one pipe's: no conflict
    for each, steps in ((pipe, 2), (made, 3)):
        assert inspect.signature(type(each).__call__).parameters["num_inference_steps"].default == steps
    ernie_accel.restore(pipe)
    assert inspect.signature(type(made).__call__).parameters["num_inference_steps"].default == 3


def test_the_other_pipe_is_free_once_the_first_is_restored_gone_or_copied():
    pipe, other = sharing(tiny_ernie)
    ernie_accel.optimize(pipe, INT8)
    assert not ernie_accel.plan(other, CastDtype("bfloat16")).ok
    assert ernie_accel.plan(copy.deepcopy(other), CastDtype("bfloat16", components=("vae",))).ok
    ernie_accel.restore(pipe)
    assert ernie_accel.plan(other, CastDtype("bfloat16")).ok
    ernie_accel.optimize(pipe, SliceVae())
    assert not ernie_accel.plan(other, CastDtype("bfloat16")).ok
    del pipe
    gc.collect()
    assert ernie_accel.plan(other, CastDtype("bfloat16")).ok
    ernie_accel.optimize(other, CastDtype("bfloat16"))
    assert all(claim.pipe() is not None for claim in owners._claims), "nothing is kept of pipes that are gone"


def test_the_same_preset_on_both_does_the_rest_of_its_work():
    pipe, other = sharing(tiny_ernie)
    ernie_accel.optimize(pipe, RewriteBlocks(), SwapScheduler("unipc"))
    ernie_accel.optimize(other, RewriteBlocks(), SwapScheduler("unipc"))
    assert torch.equal(picture(pipe), picture(other))


def test_an_interrupted_or_failed_request_claims_nothing(monkeypatch):
    pipe, other = sharing(tiny_ernie)

    def fail(*_):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(RewriteBlocks, "apply", fail)
        with pytest.raises(ernie_accel.ApplyError):
            ernie_accel.optimize(pipe, CastDtype("bfloat16"), RewriteBlocks())
    assert ernie_accel.plan(other, CastDtype("bfloat16")).ok


def test_what_was_away_for_a_while_is_not_put_back_over_what_another_pipe_changed_meanwhile():
    """As `save` takes changes away while another thread optimizes a pipe over the same components."""
    stock = picture(tiny_ernie())
    pipe, other = sharing(tiny_ernie)
    ernie_accel.optimize(pipe, MakeContiguous(channels_last=("vae",)))
    with (
        pytest.raises(ernie_accel.ApplyError, match="vae is shared with another pipe"),
        suspended(pipe, Phase.QUANTIZE),
    ):
        ernie_accel.optimize(other, CastDtype("bfloat16", components=("vae",)))
    assert ernie_accel.report(pipe).entries == ()
    ernie_accel.restore(other)
    assert torch.equal(picture(pipe), stock)


# ---- casts of a quantized pipe ---------------------------------------------------------------------------------------


def dtypes(pipe):
    return {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def test_another_pipeline_over_a_quantized_one_casts_nothing_or_is_refused_before_it_does():
    from diffusers import ZImageImg2ImgPipeline

    pipe = ernie_accel.optimize(tiny_z_image().to(torch.bfloat16), INT8)
    before = dtypes(pipe)
    with pytest.raises(ernie_accel.ErnieAccelError, match="would separate them from their scales"):
        ZImageImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    assert dtypes(pipe) == before
    other = ZImageImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    assert dtypes(other) == before
    assert other.transformer is pipe.transformer
    assert quantized(other)


def test_a_cast_to_its_own_dtype_casts_nothing():
    pipe = ernie_accel.optimize(tiny_ernie(dtype=torch.bfloat16), INT8)
    drawn = picture(pipe)
    for cast in (
        lambda: pipe.to(torch.bfloat16),
        lambda: pipe.to("cpu", torch.bfloat16),
        lambda: pipe.transformer.to(dtype=torch.bfloat16),
        lambda: pipe.transformer.to("cpu", torch.bfloat16),
        lambda: pipe.transformer.bfloat16(),
    ):
        cast()
        assert torch.equal(picture(pipe), drawn)
    for cast in (lambda: pipe.to(torch.float16), lambda: pipe.transformer.half(), lambda: pipe.transformer.type("x")):
        with pytest.raises(ernie_accel.ErnieAccelError, match="would separate them from their scales"):
            cast()
        assert torch.equal(picture(pipe), drawn)


def test_other_components_are_cast_alone_and_restore_takes_the_guards_away():
    pipe = ernie_accel.optimize(tiny_ernie(), INT8)
    pipe.vae.to(torch.bfloat16)
    assert pipe.vae.dtype == torch.bfloat16
    ernie_accel.restore(pipe)
    for name, part in pipe.components.items():
        assert "to" not in getattr(part, "__dict__", {}), name
    pipe.to(torch.bfloat16)
    assert set(dtypes(pipe).values()) == {torch.bfloat16}
