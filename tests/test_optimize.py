"""The life of an optimized pipe: same object, replaced presets, failures that cost nothing, restore."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import pytest
import torch

import ernie_accel
from ernie_accel import CallDefaults, CastDtype, Compile, MakeContiguous, Quantize, SliceVae, SwapScheduler, TileVae
from tests.examples import differences, snapshot
from tests.pipelines import picture


def applied(pipe):
    return [repr(e.step.transform) for e in ernie_accel.report(pipe).entries if e.status == "applied"]


def test_it_returns_the_same_object(ernie):
    assert ernie_accel.optimize(ernie, SliceVae()) is ernie


@pytest.mark.parametrize("preset", ["exact", "turbo-fp32", "turbo-bf16", "quality-bf16"])
def test_a_preset_twice_is_once_and_restore_ends_it(preset, ernie):
    original, before = picture(ernie), snapshot(ernie)
    ernie_accel.optimize(ernie, preset=preset)
    once = snapshot(ernie)
    ernie_accel.optimize(ernie, preset=preset)
    assert differences(once, snapshot(ernie)) == []
    ernie_accel.restore(ernie)
    assert differences(before, snapshot(ernie)) == []
    assert torch.equal(picture(ernie), original)


def test_another_preset_first_restores(ernie):
    before = snapshot(ernie)
    ernie_accel.optimize(ernie, preset="turbo-bf16")
    ernie_accel.optimize(ernie, preset="turbo-fp32")
    assert ernie.transformer.dtype == torch.float32
    assert applied(ernie) == ["CallDefaults('turbo')", "Compile()"]
    ernie_accel.restore(ernie)
    assert differences(before, snapshot(ernie)) == []


def test_what_both_wishes_begin_with_is_not_done_again(ernie):
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    receipt = ernie_accel.report(ernie).entries[0].applied
    ernie_accel.optimize(ernie, CastDtype("bf16"), SliceVae())
    assert ernie_accel.report(ernie).entries[0].applied is receipt
    assert applied(ernie) == ["CastDtype('bfloat16')", "SliceVae()"]


def test_a_plan_for_an_optimized_pipe_says_what_stays_and_what_is_undone_first(ernie):
    ernie_accel.optimize(ernie, CastDtype("bf16"), Quantize("int8-weight-only"), SliceVae())
    same = ernie_accel.plan(ernie, CastDtype("bf16"), Quantize("int8-weight-only"), SliceVae())
    assert same.ok
    assert [step.verdict for step in same.steps] == ["in place"] * 3
    assert same.undoes == ()
    other = ernie_accel.plan(ernie, CastDtype("bf16"), TileVae())
    assert [step.verdict for step in other.steps] == ["in place", "apply"]
    assert other.undoes == (Quantize("int8-weight-only"), SliceVae())
    assert "First undoes Quantize('int8-weight-only'), SliceVae()." in str(other)
    ernie_accel.optimize(ernie, CastDtype("bf16"), TileVae())
    assert applied(ernie) == ["CastDtype('bfloat16')", "TileVae()"]


def test_a_transform_beside_a_preset_takes_its_slot(ernie):
    ernie_accel.optimize(ernie, CallDefaults(num_inference_steps=4), CastDtype("float16"), preset="turbo-bf16")
    names = ["CastDtype('float16')", "RewriteBlocks()", "CallDefaults(num_inference_steps=4)", "Compile()"]
    assert applied(ernie) == names


def test_the_order_given_does_not_matter(ernie):
    one = ernie_accel.plan(ernie, SliceVae(), CastDtype("bf16"), TileVae())
    other = ernie_accel.plan(ernie, TileVae(), SliceVae(), CastDtype("bf16"))
    assert [step.transform for step in one.steps] == [step.transform for step in other.steps]
    phases = [step.transform.phase for step in one.steps]
    assert phases == sorted(phases)


def test_a_refused_wish_leaves_the_last_one_in_place(ernie):
    ernie_accel.optimize(ernie, CastDtype("bf16"), SliceVae())
    once = snapshot(ernie)
    with pytest.raises(ernie_accel.UnsupportedError):
        ernie_accel.optimize(ernie, preset="turbo-fp8")
    assert differences(once, snapshot(ernie)) == []
    assert applied(ernie) == ["CastDtype('bfloat16')", "SliceVae()"]
    ernie_accel.restore(ernie)
    assert ernie.transformer.dtype == torch.float32


@dataclass(frozen=True, repr=False)
class Raises(ernie_accel.Transform):
    """Raises what it is told to."""

    phase = ernie_accel.Phase.CALL
    slot = "raises"
    effect = ernie_accel.Effect.EXACT
    error: type[BaseException] = OSError
    changes: tuple[str, ...] = ("something",)

    def unsupported(self, pipe, context):
        return []

    def preview(self, pipe, context):
        return ernie_accel.Preview(("something",))

    def apply(self, pipe, context):
        if self.changes:
            raise self.error("it broke")
        return ernie_accel.Applied((), undo=ernie_accel.Undo())


def test_a_failure_is_one_error_that_carries_the_report(ernie):
    before = snapshot(ernie)
    with pytest.raises(ernie_accel.ApplyError) as caught:
        ernie_accel.optimize(ernie, CastDtype("bf16"), Raises(), SliceVae())
    assert str(caught.value).startswith("Raises() failed: OSError: it broke\nThe pipe is as it was before this call.\n")
    assert caught.value.transform == Raises()
    assert [entry.step.transform for entry in caught.value.report.entries] == [CastDtype("bfloat16"), SliceVae()]
    assert isinstance(caught.value.__cause__, OSError)
    assert differences(before, snapshot(ernie)) == []


def test_ctrl_c_passes_and_leaves_a_whole_pipe(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"))
    once = applied(ernie)
    with pytest.raises(KeyboardInterrupt):
        ernie_accel.optimize(ernie, CastDtype("bf16"), Raises(KeyboardInterrupt))
    assert ernie.transformer.dtype == torch.float32
    assert ernie.scheduler.config.stochastic_sampling
    assert applied(ernie) == once


def test_changing_nothing_is_an_error(ernie):
    with pytest.raises(ernie_accel.ApplyError, match="it changed nothing"):
        ernie_accel.optimize(ernie, Raises(changes=()))


def test_skip_leaves_out_what_cannot_run_and_says_why(ernie):
    ernie_accel.optimize(ernie, preset="turbo-fp8", on_unsupported="skip")
    entries = {type(e.step.transform).__name__: e for e in ernie_accel.report(ernie).entries}
    assert entries["FuseKernels"].status == "skipped"
    assert any("needs CUDA compute capability >= 8.9" in reason for reason in entries["FuseKernels"].step.reasons)
    assert entries["CastDtype"].status == entries["Compile"].status == "applied"
    assert entries["MakeContiguous"].status == "nothing to do"
    assert "needs CUDA compute capability" in str(ernie_accel.report(ernie))


def test_what_was_skipped_is_still_an_error_where_errors_are_asked_for(ernie):
    ernie_accel.optimize(ernie, preset="turbo-fp8", on_unsupported="skip")
    once = snapshot(ernie)
    with pytest.raises(ernie_accel.UnsupportedError, match="FuseKernels"):
        ernie_accel.optimize(ernie, preset="turbo-fp8")
    assert differences(once, snapshot(ernie)) == []


def test_what_cannot_be_undone_says_so_and_is_not_half_undone(ernie):
    ernie_accel.optimize(ernie, CastDtype("bf16", keep_originals=False), SliceVae())
    assert "cannot be undone: keep_originals=False" in str(ernie_accel.report(ernie))
    with pytest.raises(ernie_accel.RestoreError, match=r"Cannot undo CastDtype.*keep_originals=False"):
        ernie_accel.restore(ernie)
    assert ernie.vae.use_slicing
    with pytest.raises(ernie_accel.RestoreError):
        ernie_accel.optimize(ernie, preset="turbo-fp32")
    assert applied(ernie) == ["CastDtype('bfloat16', keep_originals=False)", "SliceVae()"]


def test_weights_that_survive_the_cast_are_not_kept(ernie):
    for module in (ernie.transformer, ernie.vae, ernie.text_encoder):
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.bfloat16().float()  # a bfloat16 checkpoint loaded in float32
    before = snapshot(ernie)
    ernie_accel.optimize(ernie, CastDtype("bf16", keep_originals=False))
    assert ernie_accel.report(ernie).entries[0].applied.note == ""
    ernie_accel.restore(ernie)
    assert differences(before, snapshot(ernie)) == []


def test_a_deep_copy_works_and_knows_that_the_undo_is_not_its_own(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"), CallDefaults("turbo"))
    twin = copy.deepcopy(ernie)
    assert torch.equal(picture(twin), picture(ernie))
    with pytest.raises(ernie_accel.RestoreError, match="deep copy"):
        ernie_accel.restore(twin)
    ernie_accel.restore(ernie)
    assert twin.scheduler.config.stochastic_sampling
    assert not ernie.scheduler.config.stochastic_sampling


def test_a_wish_for_nothing_restores(ernie):
    before = snapshot(ernie)
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    ernie_accel.optimize(ernie)
    assert differences(before, snapshot(ernie)) == []


def test_the_report_names_what_ran_where(ernie):
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    document = json.loads(ernie_accel.report(ernie).to_json())
    assert document["versions"]["torch"] == torch.__version__
    assert {"diffusers", "transformers"} <= document["versions"].keys()
    assert document["device"] == "cpu"
    (entry,) = document["entries"]
    assert entry["transform"] == "CastDtype"
    assert entry["status"] == "applied"
    assert entry["bytes_after"] < 0.6 * entry["bytes_before"]
    text = str(ernie_accel.report(ernie))
    assert f"torch {torch.__version__}" in text
    assert "transformer, vae, text_encoder" in text


def test_optimized_pipes_save_as_stock_pipes(ernie, tmp_path):
    from diffusers import ErnieImagePipeline

    ernie_accel.optimize(ernie, SwapScheduler("lcm"), CallDefaults("turbo"), MakeContiguous(), Compile())
    ernie.save_pretrained(tmp_path)
    again = ErnieImagePipeline.from_pretrained(tmp_path, local_files_only=True)
    assert again.scheduler.config.stochastic_sampling
    assert torch.equal(again.transformer.layers[0].mlp.up_proj.weight, ernie.transformer.layers[0].mlp.up_proj.weight)
