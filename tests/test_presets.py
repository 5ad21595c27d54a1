"""Presets are plain data that holds together; a recommendation explains itself and is one that can run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ernie_accel
from ernie_accel import Compile, Context, ExpandAttentionMask, Quantize, RewriteBlocks
from ernie_accel.core.hardware import GIB, HARDWARE
from ernie_accel.families import UNKNOWN
from ernie_accel.recipes.presets import find_preset, hardware_presets, presets
from ernie_accel.recipes.recommend import _NOT_PRECISION, LADDER
from ernie_accel.transforms.calls.call_defaults import CallDefaults
from tests.pipelines import PIPELINES, picture, tiny_sd, tiny_wan

EVERYTHING = {"torch": "2.13.0", "torchao": "0.18", "bitsandbytes": "0.50", "triton": "3.5", "scipy": "1.17"}


def device(name, **changes):
    return replace(Context.named(name), versions=EVERYTHING, **changes)


@pytest.mark.parametrize("preset", presets.values(), ids=lambda preset: preset.name)
def test_a_preset_is_named_after_its_mode_and_holds_one_transform_a_slot(preset):
    slots = [transform.slot for transform in preset.transforms]
    assert len(slots) == len(set(slots))
    modes = [transform.mode for transform in preset.transforms if isinstance(transform, CallDefaults)]
    assert modes == ([] if preset.mode == "exact" else [preset.mode])
    stem = preset.device or preset.mode  # on the device that its masks are for there is one mode only
    assert preset.name == (stem if preset.precision is None else f"{stem}-{preset.precision}")


#: What a preset of each precision holds; for the others it is what the transformer is cast to.
QUANTIZED = {"int8": "int8", "nvfp4": "nvfp4", "q4": "nf4"}


@pytest.mark.parametrize("preset", presets.values(), ids=lambda preset: preset.name)
def test_a_preset_computes_in_the_precision_it_says(preset):
    held = {type(transform).__name__: transform for transform in preset.transforms}
    if preset.precision in QUANTIZED:
        assert held["Quantize"].scheme == QUANTIZED[preset.precision]
    elif "FuseKernels" in held:
        assert held["FuseKernels"].precision == preset.precision
    elif preset.precision in (None, "fp32"):
        assert not {"CastDtype", "Quantize", "FuseKernels"} & held.keys()
    else:
        assert preset.precision == {"bfloat16": "bf16", "float16": "fp16"}[held["CastDtype"].dtype]


def test_a_preset_of_ones_own_needs_no_mode_and_that_of_a_card_keeps_it():
    own = ernie_accel.Preset("mine", "one cast", (ernie_accel.CastDtype("bf16"),))
    assert (own.mode, own.precision, own.device) == (None, None, None)
    card = find_preset("rtx3090")
    assert (card.name, card.mode, card.precision) == ("rtx3090", "turbo", "int8")


def test_what_presets_do_beside_the_denoiser() -> None:
    """Rewritten encoders are for those on fused kernels, `FuseVae` also for those that are only compiled."""
    encoders = {"BatchPromptEncoding", "RewriteTextEncoder", "RewriteEnhancer"}
    for name, preset in presets.items():
        held = {type(transform).__name__ for transform in preset.transforms}
        fast = preset.mode in ("turbo", "quality") and preset.device is None
        assert ("FuseVae" in held) == (fast and preset.precision not in ("fp32", "fp16")), name
        assert (encoders <= held) == (fast and preset.precision in ("bf16", "fp8")), name


def test_every_rung_is_a_preset():
    assert {rung.precision for rung in LADDER} <= {each.precision for each in presets.values() if each.mode == "turbo"}


@pytest.mark.parametrize("key", list(hardware_presets()))
def test_every_card_of_the_table_can_run_what_it_is_given(key, ernie):
    preset = presets[HARDWARE[key].preset]
    plan = ernie_accel.plan(ernie, preset=key, context=device(key))
    assert plan.ok, str(plan)
    assert plan.preset.name == key
    assert preset.name in plan.preset.summary
    assert ernie_accel.recommend(device(key)).preset == preset
    assert ernie_accel.recommend(device(key), ernie).preset == preset


def test_what_a_recommendation_may_leave_out_are_slots_of_presets():
    assert {transform.slot for preset in presets.values() for transform in preset.transforms} >= _NOT_PRECISION


def test_a_name_that_is_not_in_the_table_lists_those_that_are():
    with pytest.raises(KeyError, match=r"Unknown preset 'turbo-f8'. Did you mean 'turbo-fp8'\? Valid: exact"):
        presets["turbo-f8"]
    assert "rtx4090" not in presets


def test_a_card_is_a_preset_name():
    assert find_preset("rtx3090").transforms == presets["turbo-int8"].transforms
    with pytest.raises(ernie_accel.UnknownNameError, match="Did you mean 'rtx3090'"):
        find_preset("rtx390")


#: Where each preset of a precision can run, for planning.
MACHINES = {
    "turbo-fp32": "cpu",
    "turbo-fp16": "t4",
    "turbo-int8": "rtx3090",
    "turbo-nvfp4": "b200",
    "turbo-q4": "rtx4060",
    "npu-bf16": "ascend910b",
    "quality-int8": "rtx3090",
}


@pytest.mark.parametrize("family", ["ernie", "z_image", "lumina2", "newbie"])
@pytest.mark.parametrize("name", presets)
def test_every_preset_runs_on_every_family_that_has_its_mode(name, family):
    pipe = PIPELINES[family]()
    plan = ernie_accel.plan(pipe, preset=name, context=device(MACHINES.get(name, "h200")))
    if family in ("lumina2", "newbie") and presets[name].mode == "turbo":
        (refused,) = plan.problems.items()  # there is no distilled NewBie-image
        assert refused[0] == CallDefaults("turbo")
        assert "a preset whose name begins with 'quality-'" in refused[1][0]
    else:
        assert plan.ok, str(plan)
    nothing = {
        type(step.transform).__name__: step.preview.note for step in plan.steps if step.verdict == "nothing to do"
    }
    if family == "newbie" and "RewriteBlocks" in {type(step.transform).__name__ for step in plan.steps}:
        assert "no rewritten blocks for NextDiT" in nothing["RewriteBlocks"]


@pytest.mark.parametrize("family", ["newbie"])
@pytest.mark.parametrize("name", ["quality-bf16", "turbo-bf16", "turbo-fp32", "exact"])
def test_on_a_family_without_rewritten_blocks_a_preset_really_runs_and_is_undone(name, family):
    from tests.pipelines import picture

    pipe = PIPELINES[family]()
    before = picture(pipe, steps=2)
    ernie_accel.optimize(
        pipe, preset=name, on_unsupported="skip", context=replace(Context.named("cpu"), versions=EVERYTHING)
    )
    assert {entry.status for entry in ernie_accel.report(pipe).entries} <= {"applied", "nothing to do", "skipped"}
    assert "RewriteBlocks" not in {
        type(entry.step.transform).__name__ for entry in ernie_accel.report(pipe).entries if entry.applied
    }
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe, steps=2), before)


def test_a_family_without_kernels_gets_fp8_by_quantizing_and_keeps_what_is_given_beside_it():
    h200 = device("h200")
    for family, quantized in (("ernie", "FuseKernels('fp8')"), ("newbie", "Quantize('fp8')")):
        steps = ernie_accel.plan(PIPELINES[family](), preset="quality-fp8", context=h200).steps
        assert [repr(step.transform) for step in steps if step.transform.slot == "quantize"] == [quantized]
    own = ernie_accel.Quantize("int8-weight-only")
    steps = ernie_accel.plan(PIPELINES["newbie"](), own, preset="h100", context=h200).steps
    assert [step.transform for step in steps if step.transform.slot == "quantize"] == [own]
    assert Quantize("fp8") in presets["turbo-fp8"].transforms_for(UNKNOWN)
    assert "for a family without fused kernels: Quantize('fp8')" in repr(presets)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("cpu", "turbo-fp32"),
        ("v100", "turbo-fp16"),
        ("t4", "turbo-fp16"),
        ("a100", "turbo-bf16"),
        ("a6000", "turbo-int8"),
        ("rtx3060", "turbo-int8"),
        ("l40s", "turbo-fp8"),
        ("h200", "turbo-fp8"),
        ("rtx5090", "turbo-fp8"),
        ("ascend910b", "npu-bf16"),
    ],
)
def test_what_is_recommended_where(name, preset):
    assert ernie_accel.recommend(device(name)).preset.name == preset


def test_a_recommendation_says_why_and_why_not():
    text = str(ernie_accel.recommend(device("t4")))
    assert text.startswith("Recommended on cuda (Tesla T4, capability 7.5, 15 GiB): preset 'turbo-fp16'\n")
    assert "  + Tesla T4: has no bfloat16; nothing is published for this card\n" in text
    assert "  turbo-fp8: pays on CUDA compute capability 8.9 and above; this device has 7.5" in text
    assert "  turbo-int8: pays on CUDA compute capability 8.6 to 8.8; this device has 7.5" in text


def test_a_missing_package_leads_to_the_next_rung_and_is_named():
    context = replace(device("h200"), versions={"torch": "2.13.0"})
    found = ernie_accel.recommend(context)
    assert found.preset.name == "turbo-bf16"
    assert found.rejected["turbo-fp8"] == (
        "triton is not installed (it comes with CUDA builds of torch): pip install triton",
    )


def test_a_card_without_its_package_leads_to_the_next_rung():
    context = replace(device("rtx3090"), versions={"torch": "2.13.0"})
    found = ernie_accel.recommend(context)
    assert found.preset.name == "turbo-bf16"
    assert "torchao is not installed" in str(found)


def test_with_a_pipe_its_own_reasons_count(flux):
    found = ernie_accel.recommend(device("h200"), flux)
    assert found.preset.name == "turbo-fp8"
    expected = "does without CallDefaults('turbo'): no turbo settings are known for FluxPipeline"
    assert any(warning.startswith(expected) for warning in found.warnings)


@pytest.mark.parametrize(
    "name", ["exact", pytest.param("turbo-fp32", marks=pytest.mark.slow), "turbo-bf16", "quality-bf16"]
)
def test_a_preset_does_what_a_pipe_of_no_known_family_allows_and_lists_the_rest(name, flux):
    stock = picture(flux)
    left_out = [step for step in ernie_accel.plan(flux, preset=name).steps if step.transform.family_reasons(flux)]
    assert all("known" in step.preview.note and not step.preview.changes for step in left_out)
    assert len(left_out) == sum(t.slot in ("blocks", "call-defaults") for t in presets[name].transforms)
    ernie_accel.optimize(flux, preset=name)
    if presets[name].precision == "fp32":
        assert torch.allclose(picture(flux), stock, atol=1e-3)
    ernie_accel.restore(flux)
    assert torch.equal(picture(flux), stock)


@pytest.mark.parametrize(
    ("make", "denoisers"),
    [
        (tiny_sd, ("unet",)),
        (tiny_wan, ("transformer", "transformer_2")),
        (lambda: tiny_wan(first=False), ("transformer_2",)),
    ],
    ids=["unet", "two transformers", "the second alone"],
)
def test_a_preset_serves_every_denoiser_whatever_its_name(make, denoisers):
    pipe, h200 = make(), device("h200")
    for name, preset in presets.items():
        steps = ernie_accel.plan(pipe, preset=name, context=h200).steps
        named = [step.transform for step in steps if type(step.transform) in (Compile, Quantize)]
        assert all(transform.components == denoisers for transform in named)
        assert len(named) == sum(type(t) in (Compile, Quantize) for t in preset.transforms_for(UNKNOWN))
    only = Compile(components=denoisers[-1:])
    steps = ernie_accel.plan(pipe, only, preset="turbo-fp32", context=h200).steps
    assert [step.transform for step in steps if step.transform.slot == "compile"] == [only]

    ernie_accel.optimize(pipe, preset="turbo-fp32")
    compiled = {
        name
        for name in denoisers
        if any(part._compiled_call_impl is not None for part in getattr(pipe, name).modules())
    }
    assert compiled == set(denoisers)
    ernie_accel.restore(pipe)
    assert all(part._compiled_call_impl is None for name in denoisers for part in getattr(pipe, name).modules())


def test_a_preset_leaves_out_what_a_pipe_of_no_known_family_has_no_place_for(flux):
    flux.transformer = torch.nn.Sequential(torch.nn.Linear(2, 2))  # declares no repeated blocks, and takes no mask
    compiled = Compile(), "Sequential declares no repeated blocks to compile (_repeated_blocks)"
    masked = ExpandAttentionMask(), "FluxPipeline: no block of its transformer takes an attention mask"
    for (transform, reason), name, machine in ((compiled, "turbo-bf16", "h200"), (masked, "npu-bf16", "ascend910b")):
        plan = ernie_accel.plan(flux, preset=name, context=device(machine))
        assert plan.ok, plan
        assert [step.preview.note for step in plan.steps if step.transform == transform] == [reason]
        assert ernie_accel.plan(flux, transform, context=device(machine)).problems == {transform: (reason,)}


def test_beside_a_preset_and_alone_what_needs_a_family_is_refused(flux):
    assert not ernie_accel.plan(flux, RewriteBlocks()).ok
    assert not ernie_accel.plan(flux, CallDefaults("turbo")).ok


def test_for_a_pipe_that_cannot_run_at_all_nothing_is_recommended_but_exact(ernie):
    weight = ernie.transformer.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    found = ernie_accel.recommend(device("h200"), ernie)
    assert found.preset.name == "exact"
    assert found.rejected["turbo-bf16"] == ("the pipe cannot run",)


def test_memory_that_is_too_small_is_warned_of(ernie):
    assert ernie_accel.recommend(device("h200")).warnings == ()
    (warning,) = ernie_accel.recommend(device("rtx4060")).warnings
    assert warning.startswith("about 23.6 GB of weights and about 3.8 GB for a call, graphs and the driver do not fit")
    assert ernie_accel.recommend(device("rtx4060"), ernie).warnings == ()  # this pipe is a tiny one
    (warning,) = ernie_accel.recommend(device("rtx4060", memory_bytes=GIB // 1024), ernie).warnings
    assert "do not fit into 1.0 MB" in warning
    (warning,) = ernie_accel.recommend(device("cpu", memory_bytes=16 * GIB)).warnings
    assert "prompt_enhancer=False" in warning
    assert "leave the pipe on the CPU" not in warning  # it is there, and stays there


def test_quality_recommends_quality():
    assert ernie_accel.recommend(device("h200"), mode="quality").preset.name == "quality-fp8"
    assert ernie_accel.recommend(device("rtx3090"), mode="quality").preset.name == "quality-int8"
    with pytest.raises(ernie_accel.UnknownNameError, match="Unknown mode 'fast'"):
        ernie_accel.recommend(mode="fast")


def test_a_family_without_a_distilled_checkpoint_gets_quality_and_the_samplers_of_its_guides():
    found = ernie_accel.recommend(device("h200"), PIPELINES["lumina2"]())
    assert found.preset.name == "quality-fp8"
    assert all(name.startswith("quality-") for name in found.rejected)
    assert "guides sample with SwapScheduler('unipc') or SwapScheduler('dpmpp_2m_sde')" in str(found)
    assert "leaves out" not in str(found)


def test_this_machine_is_looked_up_where_none_is_given():
    assert ernie_accel.recommend().context.device in ("cpu", "cuda")
