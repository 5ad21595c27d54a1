"""Errors repeat the input, say what was found, what was expected and the fix; the exact texts are a promise."""

from __future__ import annotations

import re

import pytest
import torch

import ernie_accel
from ernie_accel import (
    CallDefaults,
    CastDtype,
    Compile,
    Context,
    FuseKernels,
    Quantize,
    SwapScheduler,
    TileVae,
)
from ernie_accel.recipes.presets import hardware_presets
from ernie_accel.transforms import transform_class


def test_an_unknown_preset_lists_the_valid_ones(ernie):
    with pytest.raises(ernie_accel.UnknownNameError) as caught:
        ernie_accel.optimize(ernie, preset="turbo-bf61")
    valid = (*ernie_accel.presets, *hardware_presets())
    assert str(caught.value) == (f"Unknown preset 'turbo-bf61'. Did you mean 'turbo-bf16'? Valid: {', '.join(valid)}.")
    assert caught.value.valid == valid


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: CastDtype("bf32"), "dtype"),
        (lambda: SwapScheduler("eular"), "scheduler"),
        (lambda: CallDefaults("turbu"), "mode"),
        (lambda: Quantize("fp9"), "scheme"),
        (lambda: Quantize("fp8", backend="torcha"), "backend"),
        (lambda: Context.named("h2000"), "device"),
        (lambda: transform_class("Compil"), "transform"),
        (lambda: ernie_accel.transform_from_json({"transform": "Compil"}), "transform"),
        (lambda: ernie_accel.transform_from_json({"transform": "Compile", "dynamik": True}), "field of Compile"),
    ],
)
def test_unknown_names_are_told_with_the_valid_ones(make, kind):
    with pytest.raises(ernie_accel.UnknownNameError, match=f"^Unknown {kind} .* Valid: ") as caught:
        make()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ernie_accel.ErnieAccelError)


def test_an_attribute_that_is_not_there_lists_those_that_are():
    with pytest.raises(AttributeError, match=r"no attribute 'Compil'; it has .*Compile"):
        _ = ernie_accel.Compil


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SwapScheduler("euler", shift=0), "shift must be > 0 (1 is no shift), got 0"),
        (lambda: TileVae(overlap=1.0), "overlap must be between 0 and 1, got 1.0"),
        (lambda: TileVae(tile_px=-8), "tile_px must be > 0, got -8"),
        (lambda: CallDefaults(num_inference_steps=0), "num_inference_steps must be >= 1, got 0"),
        (lambda: CallDefaults(), "CallDefaults() changes nothing: give a mode ('turbo', 'quality') or an argument"),
        (
            lambda: ernie_accel.transform_from_json({"dynamic": True}),
            "a transform needs its class name under 'transform', which is missing in {'dynamic': True}",
        ),
    ],
)
def test_impossible_values_are_refused_when_the_transform_is_made(make, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make()


def test_two_for_one_slot(ernie):
    with pytest.raises(ernie_accel.ConflictError) as caught:
        ernie_accel.plan(ernie, CastDtype("bf16"), CastDtype("fp16"))
    assert str(caught.value) == (
        "CastDtype('bfloat16') and CastDtype('float16') exclude each other: a pipe has one 'dtype' slot. "
        "Pass only one of them."
    )
    assert caught.value.transforms == (CastDtype("bf16"), CastDtype("fp16"))


def test_a_preset_given_as_a_transform(ernie):
    with pytest.raises(TypeError, match=r"expected transforms such as Compile.*write preset='turbo-bf16'"):
        ernie_accel.optimize(ernie, "turbo-bf16")


@pytest.mark.parametrize(
    "door",
    [
        lambda given: ernie_accel.plan(given, Compile()),
        lambda given: ernie_accel.optimize(given, Compile()),
        ernie_accel.report,
        ernie_accel.restore,
        lambda given: ernie_accel.save(given, "nowhere"),
        lambda given: ernie_accel.recommend(pipe=given),
        lambda given: ernie_accel.evaluate(given, "exact", "a red circle"),
        lambda given: ernie_accel.evaluate(lambda: given, "exact", "a red circle"),
    ],
)
@pytest.mark.parametrize("given", [42, torch.nn.Linear(2, 2)], ids=lambda given: type(given).__name__)
def test_what_is_no_pipeline_is_refused_at_every_door(door, given):
    with pytest.raises(
        ernie_accel.ErnieAccelError, match=f"expected a diffusers pipeline .* got {type(given).__name__}"
    ):
        door(given)


def test_all_reasons_are_told_at_once(ernie):
    context = Context("cuda", "NVIDIA A100", (8, 0), 80 * 2**30, versions={}, no_compile="no compiler")
    with pytest.raises(ernie_accel.UnsupportedError) as caught:
        ernie_accel.optimize(ernie, preset="turbo-fp8", context=context)
    assert str(caught.value) == (
        "Cannot apply preset 'turbo-fp8':\n"
        "  FuseKernels('fp8')\n"
        "    - fp8 needs CUDA compute capability >= 8.9; this device has 8.0\n"
        "    - triton is not installed (it comes with CUDA builds of torch): pip install triton\n"
        "  Compile()\n"
        "    - no compiler\n"
        "Fix these, choose another preset, or pass on_unsupported='skip'."
    )
    assert set(caught.value.plan.problems) == {FuseKernels("fp8"), Compile()}


def test_a_float8_pipe_is_recognised(ernie):
    ernie.transformer.to(torch.float8_e4m3fn)
    ernie.vae.to(torch.float8_e4m3fn)
    plan = ernie_accel.plan(ernie, preset="turbo-bf16")
    assert not plan.ok
    with pytest.raises(ernie_accel.UnsupportedError) as caught:
        ernie_accel.optimize(ernie, preset="turbo-bf16", on_unsupported="skip")
    assert str(caught.value).startswith(
        "Cannot apply preset 'turbo-bf16':\n"
        "  - transformer, vae: weights were cast to float8 without scales (torch_dtype=torch.float8_...), and no "
        "kernel can run that. Load with torch_dtype=torch.bfloat16 and quantize instead: "
    )
    assert "on_unsupported" not in str(caught.value).splitlines()[-1]


def test_float8_storage_that_upcasts_in_a_hook_is_no_such_pipe(ernie):
    ernie.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert ernie_accel.plan(ernie, ernie_accel.SliceVae()).ok


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (CastDtype("bf16", components=("unet",)), "ErnieImagePipeline has no component 'unet'; its modules are"),
        (Compile(components=("text_encoder",)), "Mistral3Model declares no repeated blocks to compile"),
        (TileVae(tile_px=30), "tile_px=30 is not a multiple of the 8 pixels of a latent: use 24"),
        (CallDefaults("quality", negative_prompt="x"), None),
    ],
)
def test_reasons_name_what_was_found(transform, reason, ernie):
    (step,) = ernie_accel.plan(ernie, transform).steps
    assert (reason is None and not step.reasons) or any(reason in found for found in step.reasons)


def test_unknown_on_unsupported(ernie):
    with pytest.raises(ernie_accel.UnknownNameError, match="Unknown value of on_unsupported 'ignore'"):
        ernie_accel.optimize(ernie, on_unsupported="ignore")


def test_a_transform_without_its_facts_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match="Forgetful must say its phase, slot, effect"):

        class Forgetful(ernie_accel.Transform):
            pass


def test_a_receipt_has_an_undo_or_the_reason():
    with pytest.raises(TypeError, match="either an undo or the reason"):
        ernie_accel.Applied(("x",))
