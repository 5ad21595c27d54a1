"""The life of an optimized pipe: same object, replaced presets, failures that cost nothing, restore."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import inspect
import json
import pickle
from dataclasses import dataclass

import pytest
import torch

import ernie_accel
from ernie_accel import (
    CallDefaults,
    CastDtype,
    Compile,
    ElideMask,
    ExpandAttentionMask,
    MakeContiguous,
    Quantize,
    SliceVae,
    SwapScheduler,
    TileVae,
)
from tests.examples import differences, make_awkward, snapshot
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
    assert set(applied(ernie)) <= {repr(transform) for transform in ernie_accel.presets["turbo-fp32"].transforms}
    assert "Compile()" in applied(ernie)
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
    beside = ("CastDtype('float16')", "CallDefaults(num_inference_steps=4)")
    assert [name for name in applied(ernie) if name.startswith(("CastDtype", "CallDefaults"))] == list(beside)
    assert "RewriteBlocks()" in applied(ernie)  # the rest of the preset stays


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
    with pytest.raises(ernie_accel.RestoreError, match="this pipe is a copy"):
        ernie_accel.restore(twin)
    ernie_accel.restore(ernie)
    assert twin.scheduler.config.stochastic_sampling
    assert not ernie.scheduler.config.stochastic_sampling


def test_a_copy_that_is_optimized_further_leaves_the_original_alone(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"))
    twin = copy.deepcopy(ernie)
    ernie_accel.optimize(twin, SwapScheduler("lcm"), CallDefaults("turbo"))
    with pytest.raises(ernie_accel.RestoreError, match="this pipe is a copy"):
        ernie_accel.restore(twin)
    assert ernie.scheduler.config.stochastic_sampling
    assert "would have to be undone first: this pipe is a copy" in str(ernie_accel.plan(twin, SliceVae()))


def test_an_interrupted_cast_that_keeps_no_originals_is_reported_and_finished_by_asking_again(ernie, monkeypatch):
    cast = CastDtype("bf16", keep_originals=False)
    equal, calls = torch.equal, []

    def equal_until_ctrl_c(*tensors):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return equal(*tensors)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", equal_until_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            ernie_accel.optimize(ernie, SliceVae(), cast)
    (entry,) = ernie_accel.report(ernie).entries
    assert entry.status == "interrupted"
    assert "interrupted half-way, and keep_originals=False" in str(ernie_accel.report(ernie))
    with pytest.raises(ernie_accel.RestoreError, match="interrupted half-way"):
        ernie_accel.restore(ernie)
    ernie_accel.optimize(ernie, SliceVae(), cast)
    assert applied(ernie) == [repr(cast), "SliceVae()"]
    assert {weight.dtype for weight in ernie.transformer.parameters()} == {torch.bfloat16}


def test_a_wish_for_nothing_restores(ernie):
    before = snapshot(ernie)
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    ernie_accel.optimize(ernie)
    assert differences(before, snapshot(ernie)) == []


def test_a_request_for_nothing_on_an_untouched_pipe_is_an_error_that_names_a_preset(ernie):
    with pytest.raises(ernie_accel.ErnieAccelError, match=r"nothing to apply.*preset='turbo-fp32'"):
        ernie_accel.optimize(ernie)
    assert not ernie_accel.report(ernie).entries


def test_the_report_names_what_ran_where(ernie):
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    document = json.loads(ernie_accel.report(ernie).to_json())
    assert document["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"diffusers", "transformers"} <= document["versions"].keys()
    assert document["device"] == "cpu"
    (entry,) = document["entries"]
    assert entry["transform"] == "CastDtype"
    assert entry["status"] == "applied"
    assert entry["bytes_after"] < 0.6 * entry["bytes_before"]
    text = str(ernie_accel.report(ernie))
    assert f"torch {importlib.metadata.version('torch')}" in text
    assert "transformer, vae, text_encoder" in text


def test_optimized_pipes_save_as_stock_pipes(ernie, tmp_path):
    from diffusers import ErnieImagePipeline

    ernie_accel.optimize(ernie, SwapScheduler("lcm"), CallDefaults("turbo"), MakeContiguous(), Compile())
    ernie.save_pretrained(tmp_path)
    again = ErnieImagePipeline.from_pretrained(tmp_path, local_files_only=True)
    assert again.scheduler.config.stochastic_sampling
    assert torch.equal(again.transformer.layers[0].mlp.up_proj.weight, ernie.transformer.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("name", ["exact", "turbo-fp32", "turbo-bf16", "turbo-fp16", "quality-bf16"])
def test_presets_apply_to_a_pipe_as_it_comes_from_a_mapped_file(name):
    pipe = ernie_accel.demo.load()
    before = snapshot(pipe)
    plan = ernie_accel.plan(pipe, preset=name)
    ernie_accel.optimize(pipe, preset=name)
    for step, entry in zip(plan.steps, ernie_accel.report(pipe).entries, strict=True):
        promised = step.preview.changes if step.verdict == "apply" else ()
        assert (entry.applied.changed if entry.applied else ()) == promised, repr(step.transform)
    ernie_accel.restore(pipe)
    assert differences(before, snapshot(pipe)) == []


def test_what_a_step_before_has_done_is_not_done_again(ernie):
    make_awkward(ernie)  # one weight misaligned, which the cast mends, and one transposed, which it does not
    before = len(ernie_accel.plan(ernie, MakeContiguous()).steps[0].preview.changes)
    ernie_accel.optimize(ernie, CastDtype("bf16"), MakeContiguous())
    assert before == 2
    assert len(ernie_accel.report(ernie).entries[1].applied.changed) == 1


class AsContiguous(MakeContiguous):
    """Does what MakeContiguous does, in a slot of its own and before it; its plan says nothing of that."""

    phase = ernie_accel.Phase.REWRITE
    slot = "as-contiguous"


def test_what_a_step_before_has_done_whole_is_nothing_to_do_whatever_the_plan_said(ernie):
    """Each step is asked again when it is its turn: not every transform can tell the later ones what it will do."""
    make_awkward(ernie)
    plan = ernie_accel.plan(ernie, AsContiguous(), MakeContiguous())
    assert [step.verdict for step in plan.steps] == ["apply", "apply"]
    ernie_accel.optimize(ernie, AsContiguous(), MakeContiguous())
    first, second = ernie_accel.report(ernie).entries
    assert (first.status, second.status) == ("applied", "nothing to do")
    assert first.step.preview.changes == first.applied.changed
    assert (second.step.preview.changes, second.step.planned) == ((), None)


class CastsInSilence(CastDtype):
    """Does what CastDtype does, in a slot of its own; its plan says nothing of the bytes."""

    slot = "casts-in-silence"

    def planned(self, pipe, context):
        return context.planned(pipe)


def test_the_report_says_what_was_found_when_it_was_the_transforms_turn(ernie):
    ernie_accel.optimize(ernie, CastsInSilence("bf16"), SliceVae())
    entry = ernie_accel.report(ernie).entries[1]
    assert entry.step.planned.nbytes == entry.applied.bytes_before == entry.applied.bytes_after


def test_restore_reaches_buffers_that_a_move_replaced(ernie):
    original = picture(ernie)
    mean = ernie.vae.bn.running_mean.clone()
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    for module in (ernie.vae, ernie.transformer, ernie.text_encoder):
        module._apply(lambda tensor: tensor.clone())  # what .to(device) does: parameters stay, buffers are new objects
    ernie_accel.restore(ernie)
    assert ernie.vae.bn.running_mean.dtype == torch.float32
    assert torch.equal(ernie.vae.bn.running_mean, mean)
    assert torch.equal(picture(ernie), original)


def test_a_restore_that_breaks_half_way_can_be_repeated(ernie, monkeypatch):
    before = snapshot(ernie)
    ernie_accel.optimize(ernie, CastDtype("bf16"), SliceVae())
    actions = ernie_accel.report(ernie).entries[0].applied.undo._actions
    whole = actions[5]
    actions[5] = lambda: (_ for _ in ()).throw(MemoryError("no room"))
    with pytest.raises(MemoryError):
        ernie_accel.restore(ernie)
    assert applied(ernie) == ["CastDtype('bfloat16')"]  # SliceVae is undone, the cast is not
    actions[5] = whole
    ernie_accel.restore(ernie)
    assert differences(before, snapshot(ernie)) == []


def test_what_cannot_be_put_back_is_not_reported_as_in_place(ernie, monkeypatch):
    ernie_accel.optimize(ernie, SliceVae())
    monkeypatch.setattr(SliceVae, "apply", lambda *_: (_ for _ in ()).throw(OSError("not again")))
    with pytest.raises(ernie_accel.ApplyError, match="not again"):
        ernie_accel.optimize(ernie, Raises())
    assert not ernie.vae.use_slicing
    assert applied(ernie) == []


def test_what_has_no_undo_stays_and_is_named_when_a_later_transform_fails(ernie):
    with pytest.raises(ernie_accel.ApplyError, match=r"CastDtype\('bfloat16', keep_originals=False\) stays applied"):
        ernie_accel.optimize(ernie, CastDtype("bf16", keep_originals=False), Raises())
    assert applied(ernie) == ["CastDtype('bfloat16', keep_originals=False)"]
    assert ernie.transformer.dtype == torch.bfloat16


def test_verdicts_of_another_machine_are_asked_again(ernie):
    bare = dataclasses.replace(ernie_accel.Context.detect(ernie), no_compile="no compiler")
    ernie_accel.optimize(ernie, Compile(), on_unsupported="skip", context=bare)
    assert applied(ernie) == []
    ernie_accel.optimize(ernie, Compile())
    assert applied(ernie) == ["Compile()"]


class NotBesideLcm(Raises):
    """Cannot run on a pipe that another transform has given the scheduler "lcm"."""

    phase = ernie_accel.Phase.SCHEDULER
    slot = "z-not-beside-lcm"

    def unsupported(self, pipe, context):
        return ["not beside lcm"] if context.planned(pipe).scheduler == "lcm" else []


def test_what_was_skipped_because_of_what_comes_before_it_stays_skipped_and_costs_nothing(ernie):
    wanted = SwapScheduler("lcm"), NotBesideLcm(), SliceVae()
    ernie_accel.optimize(ernie, *wanted, on_unsupported="skip")
    before = ernie_accel.report(ernie).entries
    assert [entry.status for entry in before] == ["applied", "skipped", "applied"]
    ernie_accel.optimize(ernie, *wanted, on_unsupported="skip")
    assert all(now is then for now, then in zip(ernie_accel.report(ernie).entries, before, strict=True))


def test_a_plan_beside_what_is_in_place_goes_by_the_weights_as_they_are_now(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"))
    ernie.vae.to(torch.bfloat16)  # by somebody else, since
    wanted = CastDtype("bf16"), SwapScheduler("lcm"), MakeContiguous(), SliceVae()
    assert ernie_accel.plan(ernie, SwapScheduler("lcm"), SliceVae()).steps[1].planned.dtype_of("vae") == torch.bfloat16
    assert ernie_accel.plan(ernie, *wanted).steps[0].preview.changes == ("transformer", "text_encoder")


@dataclass(frozen=True, repr=False)
class OnCardsOnly(Raises):
    """Has something to do on a card, and nothing elsewhere."""

    def preview(self, pipe, context):
        return ernie_accel.Preview(("vae.use_slicing",) if context.capability else (), note="only cards need it")

    def apply(self, pipe, context):
        with ernie_accel.Undo() as undo:
            undo.setattr(pipe.vae, "use_slicing", True)
        return ernie_accel.Applied(("vae.use_slicing",), undo=undo)


def test_what_had_nothing_to_do_is_asked_again_on_another_machine_only(ernie):
    here, card = ernie_accel.Context.detect(ernie), ernie_accel.Context.named("h200")
    for machine, status in ((here, "nothing to do"), (here, "nothing to do"), (card, "applied"), (card, "applied")):
        entries = ernie_accel.report(ernie).entries
        ernie_accel.optimize(ernie, OnCardsOnly(), context=machine)
        (entry,) = ernie_accel.report(ernie).entries
        assert entry.status == status
        assert (entry in entries) == bool(entries and entries[0].status == status)


def test_a_plan_counts_what_is_in_place_and_names_what_cannot_be_undone(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"))
    assert ernie_accel.plan(ernie, SwapScheduler("lcm")).effect is ernie_accel.Effect.RESAMPLES
    ernie_accel.restore(ernie)
    ernie_accel.optimize(ernie, CastDtype("bf16", keep_originals=False))
    plan = ernie_accel.plan(ernie, SliceVae())
    assert not plan.ok
    assert "would have to be undone first: keep_originals=False" in str(plan)


def test_a_pickled_pipe_works_without_its_undo(ernie):
    ernie_accel.optimize(ernie, CastDtype("bf16"), CallDefaults("turbo"))
    twin = pickle.loads(pickle.dumps(ernie))
    assert torch.equal(picture(twin), picture(ernie))
    assert inspect.signature(twin.__call__).parameters["num_inference_steps"].default == 8
    with pytest.raises(ernie_accel.RestoreError, match="came out of a pickle"):
        ernie_accel.restore(twin)


def test_optimizing_under_inference_mode_leaves_ordinary_weights(ernie):
    with torch.inference_mode():
        ernie_accel.optimize(ernie, CastDtype("bf16"))
    assert not ernie.transformer.final_linear.weight.is_inference()


def test_restoring_under_inference_mode_leaves_ordinary_weights(ernie):
    ernie.transformer.bfloat16().float()  # survives the cast: the way back makes the weights anew
    ernie_accel.optimize(ernie, CastDtype("bf16"))
    with torch.inference_mode():
        ernie_accel.restore(ernie)
    assert ernie.transformer.dtype == torch.float32
    assert not any(weight.is_inference() for weight in ernie.transformer.parameters())


class ChangesTwice(Raises):
    """Changes one attribute twice, each time with an undo of its own, and breaks."""

    def apply(self, pipe, context):
        for value in ("first", "second"):
            ernie_accel.Undo().setattr(pipe.vae, "use_slicing", value)
        raise self.error("it broke")


def test_what_a_transform_began_is_undone_the_last_change_first(ernie):
    before = snapshot(ernie)
    with pytest.raises(ernie_accel.ApplyError, match="it broke"):
        ernie_accel.optimize(ernie, ChangesTwice())
    assert differences(before, snapshot(ernie)) == []


def test_a_preset_with_two_for_one_slot_is_refused():
    with pytest.raises(ernie_accel.ConflictError, match="'dtype' slot"):
        ernie_accel.Preset("mine", "two casts", (CastDtype("bf16"), CastDtype("fp16")))


@pytest.mark.parametrize("components", ["transformer", ()])
def test_components_are_a_tuple_of_names(components):
    with pytest.raises(ValueError, match="components takes a tuple of"):
        CastDtype("bf16", components=components)
    assert CastDtype("bf16", components=["vae"]) == CastDtype("bf16", components=("vae",))


def test_offloaded_weights_and_casting_hooks_are_refused_before_they_break(ernie, flux):
    ernie.text_encoder.to("meta")
    assert "text_encoder is offloaded" in str(ernie_accel.plan(ernie, CastDtype("bf16")))
    flux.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert "layerwise casting" in str(ernie_accel.plan(flux, CastDtype("bf16")))


def test_a_plan_names_what_it_would_undo_and_nothing_that_was_left_out(ernie):
    ernie_accel.optimize(ernie, Quantize("nvfp4"), SwapScheduler("unipc"), SliceVae(), on_unsupported="skip")
    assert ernie_accel.plan(ernie, TileVae()).undoes == (SwapScheduler("unipc"), SliceVae())


def test_what_a_later_transform_covers_is_still_in_place_and_what_a_script_took_back_is_not(ernie):
    wanted = ElideMask(), ExpandAttentionMask(), SliceVae()  # the second covers what the first put there
    first = ernie_accel.report(ernie_accel.optimize(ernie, *wanted)).entries
    again = ernie_accel.report(ernie_accel.optimize(ernie, *wanted)).entries
    assert [one.applied is other.applied for one, other in zip(first, again, strict=True)] == [True] * 3
    assert [step.verdict for step in ernie_accel.plan(ernie, *wanted).steps] == ["in place"] * 3
    ernie.vae.disable_slicing()
    assert [step.verdict for step in ernie_accel.plan(ernie, *wanted).steps] == ["in place", "in place", "apply"]


def test_beside_a_preset_only_the_presets_own_transforms_are_optional(flux):
    """On a pipe of no known family they are left out; what was asked for by name is a problem."""
    mine = CallDefaults("quality")
    plan = ernie_accel.plan(flux, mine, preset="turbo-fp32", memory=None)
    assert [step.verdict for step in plan.steps if step.transform == mine] == ["unsupported"]
    assert set(plan.problems) == {mine}
