"""A few-step LoRA and the call it is made for come and go together, beside what else a pipe has."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tools.embedded_model import distill

import ernie_accel
from ernie_accel import CallDefaults, FewSteps, FuseKernels, Quantize, RewriteBlocks
from ernie_accel.core.components import pipe_bytes
from ernie_accel.demo.judge import judge, summarize, unseen_prompts
from ernie_accel.memory.planner import _is_guided
from ernie_accel.quantization.layers import sqnr_db
from ernie_accel.testing import differences, snapshot
from tests.examples import TINY_LORA
from tests.pipelines import picture, tiny_ernie, tiny_flux, tiny_sd
from tests.test_call_defaults import call_of
from tests.test_lora import H200

LORA = FewSteps(str(TINY_LORA), steps=4)


def reasons(pipe, transform):
    return list(ernie_accel.plan(pipe, transform).steps[0].reasons)


def written(folder, change):
    """Write the LoRA with its tensors changed, and return the path."""
    path = folder / "changed.safetensors"
    save_file(change(load_file(TINY_LORA)), path)
    return str(path)


def test_a_call_that_says_nothing_takes_the_steps_and_guidance_of_the_lora(ernie, monkeypatch):
    stock, before = picture(ernie, steps=1), snapshot(ernie)
    step = ernie_accel.plan(ernie, LORA).steps[0]
    assert step.preview.changes == (
        "adapter few-steps of 2 layers",
        "num_inference_steps 50 -> 4",
        "guidance_scale 4.0 -> 1.0",
    )
    assert step.planned.num_inference_steps == 4
    ernie_accel.optimize(ernie, LORA)
    assert pipe_bytes(ernie) == step.planned.nbytes
    assert call_of(ernie, monkeypatch, "a red circle") == (4, 1.0)
    assert call_of(ernie, monkeypatch, "a red circle", num_inference_steps=2) == (2, 1.0)
    assert not torch.equal(picture(ernie, steps=1), stock)
    ernie.disable_lora()
    assert torch.equal(picture(ernie, steps=1), stock)
    ernie_accel.restore(ernie)
    assert differences(before, snapshot(ernie)) == []
    assert ernie.get_list_adapters() == {}


def test_it_draws_what_the_documented_recipe_draws():
    mine, recipe = tiny_ernie(), tiny_ernie()
    ernie_accel.optimize(mine, FewSteps(str(TINY_LORA), steps=4, lora_scale=0.7))
    recipe.load_lora_weights(str(TINY_LORA), adapter_name="few-steps")
    recipe.set_adapters("few-steps", 0.7)
    ernie_accel.optimize(recipe, CallDefaults(num_inference_steps=4, guidance_scale=1.0))
    assert torch.equal(picture(mine, steps=1), picture(recipe, steps=1))
    assert inspect.signature(mine.__call__) == inspect.signature(recipe.__call__)


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_a_lora_of_the_script_counts_beside_it_and_stays(loaded, tmp_path):
    style = written(tmp_path, lambda tensors: {name: tensor * 0.7 for name, tensor in tensors.items()})
    pipe, stock = tiny_ernie(), tiny_ernie()
    stock.load_lora_weights(style, adapter_name="style")
    styled = picture(stock, steps=1)
    stock.load_lora_weights(str(TINY_LORA), adapter_name="few-steps")
    stock.set_adapters(["style", "few-steps"])
    if loaded == "before":
        pipe.load_lora_weights(style, adapter_name="style")
    ernie_accel.optimize(pipe, LORA)
    if loaded == "after":
        pipe.load_lora_weights(style, adapter_name="style")
        pipe.set_adapters(["style", "few-steps"])
    torch.testing.assert_close(picture(pipe, steps=1), picture(stock, steps=1), rtol=0, atol=1e-5)
    ernie_accel.restore(pipe)
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    assert pipe.get_active_adapters() == ["style"]
    torch.testing.assert_close(picture(pipe, steps=1), styled, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "request_",
    [(RewriteBlocks(),), (Quantize("int8-weight-only"),), (Quantize("gguf-q8_0", correction_rank=2),)],
    ids=["rewritten", "int8", "gguf"],
)
def test_it_comes_after_what_is_rewritten_and_quantized(request_, monkeypatch):
    pipe = tiny_ernie()
    original, before = picture(pipe, steps=1), snapshot(pipe)
    ernie_accel.optimize(pipe, *request_)
    without = picture(pipe, steps=1)
    ernie_accel.optimize(pipe, *request_, LORA)
    assert call_of(pipe, monkeypatch, "a red circle") == (4, 1.0)
    assert not torch.allclose(picture(pipe, steps=1), without, atol=1e-4)
    ernie_accel.restore(pipe)
    assert differences(before, snapshot(pipe)) == []
    assert torch.equal(picture(pipe, steps=1), original)


@pytest.mark.parametrize("beneath", [(), (RewriteBlocks(),)], ids=["stock", "rewritten"])
def test_the_names_of_other_trainers_are_read(beneath, tmp_path):
    def of_kohya(tensors):
        names = {"lora_A": "lora_down", "lora_B": "lora_up"}
        found = {}
        for key, tensor in tensors.items():
            path, half = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
            base = f"lora_unet_{path.replace('.', '_')}"
            found |= {f"{base}.{names[half]}.weight": tensor, f"{base}.alpha": torch.tensor(0.5)}
        return found

    pipe, halved = tiny_ernie(), tiny_ernie()
    ernie_accel.optimize(halved, *beneath, FewSteps(str(TINY_LORA), steps=4, lora_scale=0.5))
    ernie_accel.optimize(pipe, *beneath, FewSteps(written(tmp_path, of_kohya), steps=4))
    torch.testing.assert_close(picture(pipe, steps=1), picture(halved, steps=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("at_once", [True, False])
def test_it_works_on_fused_kernels(at_once):
    on_kernels = RewriteBlocks(), FuseKernels("fp8")
    pipe, stock = tiny_ernie(dtype=torch.bfloat16), tiny_ernie(dtype=torch.bfloat16)
    plain = picture(stock, steps=1, output_type="latent")
    ernie_accel.optimize(stock, LORA)
    exact = picture(stock, steps=1, output_type="latent")
    if not at_once:
        ernie_accel.optimize(pipe, *on_kernels, context=H200)
    ernie_accel.optimize(pipe, *on_kernels, LORA, context=H200)
    drawn = picture(pipe, steps=1, output_type="latent")
    assert sqnr_db(exact, drawn) > sqnr_db(exact, plain) + 6
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe, steps=1, output_type="latent"), plain)


def test_it_takes_the_place_of_the_call_defaults_of_a_preset(ernie):
    steps = ernie_accel.plan(ernie, LORA, preset="quality-bf16").steps
    assert [step.transform for step in steps if step.transform.slot == "call-defaults"] == [LORA]


def test_memory_is_planned_for_its_guidance(ernie):
    assert not _is_guided(ernie, [LORA])
    assert _is_guided(ernie, [FewSteps(str(TINY_LORA), steps=4, guidance_scale=2.0)])


def test_a_pipe_is_copied_with_it_and_saved_without_it(ernie, tmp_path, monkeypatch):
    ernie_accel.optimize(ernie, Quantize("int8-weight-only"))
    plain = picture(ernie, steps=1)
    ernie_accel.optimize(ernie, Quantize("int8-weight-only"), LORA)
    drawn = picture(ernie, steps=1)
    assert torch.equal(picture(copy.deepcopy(ernie), steps=1), drawn)
    ernie_accel.save(ernie, tmp_path / "saved")
    assert torch.equal(picture(ernie, steps=1), drawn)
    again = ernie_accel.load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again, steps=1), plain)
    again = ernie_accel.load(tmp_path / "saved", LORA)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again, steps=1), drawn)
    ernie.load_lora_weights(str(TINY_LORA), adapter_name="mine")
    with pytest.raises(ernie_accel.SavedPipelineError, match=r"a LoRA layer: pipe\.fuse_lora"):
        ernie_accel.save(ernie, tmp_path / "saved")


def test_restore_takes_the_lora_out_of_a_transformer_that_was_wrapped_since(ernie):
    want = picture(ernie, steps=1)
    ernie_accel.optimize(ernie, LORA)
    ernie.transformer = torch.compile(ernie.transformer, backend=lambda graph, _: graph.forward)
    wrapper = ernie.transformer
    ernie_accel.restore(ernie)
    assert ernie.transformer is wrapper
    assert not any("lora" in name for name, _ in wrapper.named_modules())
    ernie.transformer = wrapper._orig_mod
    assert torch.equal(picture(ernie, steps=1), want)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_steps_below_one_and_names_that_are_none_are_refused():
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        FewSteps("a.safetensors", steps=0)
    with pytest.raises(ValueError, match=r"adapter_name takes letters, digits, - and _, got 'a\.b'"):
        FewSteps("a.safetensors", steps=4, adapter_name="a.b")


def test_a_file_that_is_not_there_or_no_lora_is_refused_with_what_it_is(ernie, tmp_path):
    (reason,) = reasons(ernie, FewSteps("someone/lora", steps=4))
    assert reason.startswith(
        "lora='someone/lora' does not exist: give the path of a file; one on the Hub is downloaded"
    )
    (reason,) = reasons(ernie, FewSteps(str(tmp_path), steps=4))
    assert "is no safetensors file" in reason
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no such thing")
    (reason,) = reasons(ernie, FewSteps(str(broken), steps=4))
    assert "cannot be read: " in reason
    plain = written(tmp_path, lambda tensors: {"layers.0.mlp.up_proj.weight": torch.zeros(2)})
    (reason,) = reasons(ernie, FewSteps(plain, steps=4))
    assert "holds layers.0.mlp.up_proj.weight, which is no part of a LoRA" in reason


def test_a_dora_of_which_diffusers_loads_a_part_is_refused(ernie, tmp_path):
    scaled = written(tmp_path, lambda ts: {**ts, "transformer.layers.0.mlp.linear_fc2.dora_scale": torch.ones(128)})
    (reason,) = reasons(ernie, FewSteps(scaled, steps=4))
    assert "is a DoRA (1 tensors of magnitudes), of which only a part would be loaded" in reason


def test_a_lora_for_another_architecture_is_refused_with_its_unmatched_layers_counted(ernie, tmp_path):
    before = snapshot(ernie)
    other = written(tmp_path, lambda ts: {n.replace("layers.1", "blocks.7"): t for n, t in ts.items()})
    (reason,) = reasons(ernie, FewSteps(other, steps=4))
    assert "is of another architecture: 1 of its 2 layers are not in this ErnieImagePipeline" in reason
    assert "(the first is transformer.blocks.7.self_attention.to_q)" in reason
    with pytest.raises(ernie_accel.UnsupportedError):
        ernie_accel.optimize(ernie, FewSteps(other, steps=4))
    assert differences(before, snapshot(ernie)) == []
    assert "are not in this FluxPipeline" in reasons(tiny_flux(), LORA)[0]


def test_saving_and_loading_plain_weights_are_refused_before_anything_changes(ernie, tmp_path):
    plain = tiny_ernie().transformer.state_dict()
    ernie_accel.optimize(ernie, LORA)
    before = snapshot(ernie)
    for owner in (ernie, ernie.transformer):
        with pytest.raises(ernie_accel.ErnieAccelError, match=r"save_pretrained: the LoRA of FewSteps"):
            owner.save_pretrained(tmp_path / "saved")
    with pytest.raises(ernie_accel.ErnieAccelError, match=r"load_state_dict: these weights have no .*base_layer"):
        ernie.transformer.load_state_dict(plain)
    assert not (tmp_path / "saved").exists()
    assert not differences(before, snapshot(ernie))
    ernie.transformer.load_state_dict(ernie.transformer.state_dict())
    ernie_accel.restore(ernie)
    ernie.transformer.load_state_dict(plain)


def test_a_pipeline_whose_reader_gives_alphas_beside_the_lora_refuses_it_like_any_other():
    (step,) = ernie_accel.plan(tiny_sd(), LORA).steps
    assert any("is of another architecture" in reason for reason in step.reasons)


def test_a_lora_for_other_widths_is_refused_with_both(ernie, tmp_path):
    wide = written(tmp_path, lambda ts: {n: torch.cat([t, t], -1) if "lora_A" in n else t for n, t in ts.items()})
    (reason,) = reasons(ernie, FewSteps(wide, steps=4))
    assert "2 of its 2 layers have another shape (the first: " in reason
    assert "transformer.layers.0.mlp.linear_fc2 is 128 x 256, and the LoRA for 128 x 512" in reason


@pytest.mark.parametrize("how", ["refused", "half-way"])
@pytest.mark.parametrize("styled", [False, True], ids=["alone", "beside another"])
def test_a_load_that_fails_leaves_the_pipe_as_it_was(ernie, tmp_path, styled, how, monkeypatch):
    if styled:
        ernie.load_lora_weights(str(TINY_LORA), adapter_name="style")
    drawn, before = picture(ernie, steps=1), snapshot(ernie)
    uneven = written(tmp_path, lambda ts: {n: torch.cat([t, t]) if "lora_A" in n else t for n, t in ts.items()})
    with monkeypatch.context() as patch:
        if how == "half-way":  # nobody looks at the ranks before PEFT does
            patch.setattr("ernie_accel.models.lora_loading.adapter_problems_of", lambda *args, **kwargs: [])
        found = "have ranks 2 and 1" if how == "refused" else "size mismatch"
        with pytest.raises(ernie_accel.ApplyError, match=found):
            ernie_accel.optimize(ernie, FewSteps(uneven, steps=4))
    assert differences(before, snapshot(ernie)) == []
    assert torch.equal(picture(ernie, steps=1), drawn)


def test_layers_that_take_no_lora_and_names_that_are_taken_are_refused(ernie):
    assert not ernie_accel.plan(ernie, Quantize("nf4"), LORA).steps[1].reasons
    ernie._maybe_expand_lora_state_dict = None  # a pipeline that fits LoRAs to weights by name, as FLUX.1's does
    (reason,) = ernie_accel.plan(ernie, Quantize("nf4"), LORA).steps[1].reasons
    assert reason.startswith("layers quantized by bitsandbytes take no LoRA: quantize with torchao, quanto or gguf, or")
    ernie.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="few-steps")
    assert reasons(ernie, LORA) == [
        "ErnieImagePipeline has an adapter 'few-steps' already: choose another adapter_name"
    ]


# ---- a LoRA that was distilled --------------------------------------------------------------------------------------

#: Steps -> those of the teacher, which the student's divide.
TEACHER_STEPS = {2: 20, 4: 20, 8: 24}


@pytest.mark.slow
@pytest.mark.parametrize("steps", TEACHER_STEPS)
def test_a_distilled_lora_draws_in_few_steps_what_the_base_model_draws_in_many(steps):
    """Made by ``python -m tools.embedded_model.distill``. The objects alone say little: the base draws them, too."""
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    square = [(text, scene) for text, scene in unseen_prompts(48) if scene.height == scene.width == 128][:6]
    texts, scenes = zip(*square, strict=True)

    def drawn(**call):
        return distill.draw(pipe, list(texts), (128, 128), range(6), **call)

    teacher = drawn(steps=TEACHER_STEPS[steps])
    base = drawn(steps=steps)
    ernie_accel.optimize(pipe, FewSteps(str(TINY_LORA.with_name(f"embedded_{steps}_steps.safetensors")), steps=steps))
    student = drawn(steps=steps)
    assert sqnr_db(teacher, student) > sqnr_db(teacher, base) + 1
    noise = [torch.Generator().manual_seed(seed) for seed in range(6)]
    defaults = list[int]()
    pictures = pipe(
        list(texts), height=128, width=128, use_pe=False, generator=noise, output_type="pt",
        callback_on_step_end=lambda pipe, step, *_: defaults.append(step) or {},
    ).images  # fmt: skip
    assert len(defaults) == steps  # the call's own default is what the LoRA is for
    found = summarize(judge(list(pictures), scenes), scenes)
    assert found.object_fraction >= 0.97


@pytest.mark.parametrize("steps", TEACHER_STEPS)
def test_the_recorded_runs_reach_what_is_asked_of_few_steps(steps):
    """97 % of the adherence at full steps, on held-out captions."""
    root = TINY_LORA.parents[2]
    record = json.loads((root / f"benchmarks/results/few_steps_{steps}_cpu_202611.json").read_text("utf-8"))
    assert (record["recipe"]["steps"], record["recipe"]["teacher_steps"]) == (steps, TEACHER_STEPS[steps])
    assert record["student"]["right"] >= 0.97 * record["teacher"]["right"]
    student, base = (record[name]["latents_db_of_teacher"] for name in ("student", "base"))
    assert student > base + 1
    page = (root / "docs/embedded-model.md").read_text("utf-8")
    right = " | ".join(f"{100 * record[name]['right']:.1f} %" for name in ("teacher", "base", "student"))
    shown = f"| {steps} | {TEACHER_STEPS[steps]} | {right} | {base:.1f} dB | {student:.1f} dB |"
    assert shown in page


def test_the_distillation_runs(tmp_path, capsys):
    distill.main(["--toy", "--out", str(tmp_path)])
    record = json.loads((tmp_path / distill.FIGURES_FILE).read_text("utf-8"))
    assert record["recipe"]["steps"] == 2 and record["student"]["objects"] == record["teacher"]["objects"]
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    assert ernie_accel.plan(pipe, FewSteps(str(tmp_path / distill.LORA_FILE), steps=2)).ok
