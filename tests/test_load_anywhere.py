"""`load` reads a folder of `save`, a folder of diffusers, or a hub id, and optimizes it; `optimize` places weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import ErnieImagePipeline

import ernie_accel
from ernie_accel import (
    CallDefaults,
    CastDtype,
    Context,
    ExplainOutOfMemory,
    MoveTo,
    Quantize,
    Residency,
    RewriteBlocks,
    api,
)
from ernie_accel.core.captured import plain_tensors
from ernie_accel.core.errors import ErnieAccelError, SavedPipelineError, UnsupportedError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.preset import Preset
from ernie_accel.memory.call import Call
from ernie_accel.memory.planner import plan_memory
from ernie_accel.storage.manifest import WEIGHTS
from ernie_accel.transforms.weights.residency import least_weights
from tests.pipelines import picture, tiny_ernie
from tests.test_residency import movers  # noqa: F401  a fixture


@pytest.fixture
def plain(tmp_path):
    tiny_ernie().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_a_folder_of_diffusers_is_optimized_as_the_pipe_would_be(plain):
    pipe = ErnieImagePipeline.from_pretrained(plain)
    ernie_accel.optimize(pipe, RewriteBlocks(), Quantize("int8-weight-only"))
    loaded = ernie_accel.load(plain, RewriteBlocks(), Quantize("int8-weight-only"), device="cpu")
    assert torch.equal(picture(loaded), picture(pipe))
    assert not ernie_accel.report(loaded).entries[-1].applied.undo  # the originals are in the files


def test_a_preset_is_applied_too(plain):
    loaded = ernie_accel.load(plain, preset="exact", device="cpu")
    assert torch.equal(picture(loaded), picture(ErnieImagePipeline.from_pretrained(plain)))
    assert ernie_accel.report(loaded).entries


def test_a_folder_of_ours_keeps_its_own(plain, tmp_path):
    pipe = ernie_accel.optimize(tiny_ernie(), Quantize("int8-weight-only"))
    ernie_accel.save(pipe, tmp_path / "ours")
    assert torch.equal(picture(ernie_accel.load(tmp_path / "ours")), picture(pipe))
    with pytest.raises(ErnieAccelError, match="keeps its dtypes; found dtype='bfloat16'"):
        ernie_accel.load(tmp_path / "ours", dtype="bfloat16")


def test_auto_takes_the_preset_that_fits_the_machine(plain):
    assert (
        ernie_accel.plan(tiny_ernie(), preset="auto").preset.name
        == ernie_accel.recommend(pipe=tiny_ernie()).preset.name
    )
    card = Context.named("rtx3090")
    assert ernie_accel.plan(tiny_ernie(), preset="auto", context=card).preset.precision == "int8"


def test_memory_is_about_an_accelerator():
    with pytest.raises(ErnieAccelError, match="accelerator's memory, and this is cpu"):
        ernie_accel.optimize(tiny_ernie(), CastDtype("bfloat16"), memory="12GiB")


def test_a_plan_with_memory_shows_the_stages_and_needs_no_device():
    the_plan = ernie_accel.plan(tiny_ernie(), preset="turbo-fp8", context=Context.named("rtx4090"), memory="auto")
    assert "denoise" in str(the_plan)
    assert the_plan.memory.fits
    assert '"memory"' in the_plan.to_json()


def test_what_has_no_weights_is_not_optimized():
    from ernie_accel.storage.skeleton import skeleton

    with pytest.raises(ErnieAccelError, match="without weights"):
        ernie_accel.optimize(skeleton("Tongyi-MAI/Z-Image-Turbo"), preset="exact")


@pytest.mark.parametrize(("name", "memory"), [("cuda:8.9:16GiB", 16 * 2**30), ("CUDA:12.0", None)])
def test_a_card_can_be_described(name, memory):
    context = Context.named(name)
    assert (context.device, context.memory_bytes) == ("cuda", memory)
    assert context.capability == ((8, 9) if memory else (12, 0))


# An accelerator of 1 GiB, which is the CPU under a second name ------------------------------------------------------


@pytest.fixture
def card(movers, monkeypatch):  # noqa: F811
    """A machine with an accelerator, on which torch calls it "cpu" and what is moved there stays where it is."""
    detect, here = Context.detect, Context.named("cuda:8.0:1GiB")

    def look(pipe=None, device=None):
        return detect(pipe) if pipe is not None and device is None else here

    monkeypatch.setattr(Context, "detect", look)
    monkeypatch.setattr(Context, "torch_device", property(lambda self: "cpu"))
    monkeypatch.setattr("ernie_accel.memory.stages.BETWEEN", 0)
    monkeypatch.setattr("ernie_accel.memory.planner.BETWEEN", 0)
    monkeypatch.setattr("ernie_accel.memory.planner.TAKEN", 0)
    for name in ("POOLS", "ROUNDING"):
        monkeypatch.setattr(f"ernie_accel.memory.planner.{name}", 0)
    return here


SMALL = Call(64, 64, prompt_tokens=8)
FAST = Preset("fast", "for tests", (RewriteBlocks(), Quantize("int8-weight-only")))
ANYWHERE = Preset("anywhere", "for tests", (RewriteBlocks(), Quantize("int8-weight-only", backend="quanto")))
PRECISE = Preset("precise", "for tests", (RewriteBlocks(),))


def applied(pipe):
    return [entry.step.transform for entry in ernie_accel.report(pipe).entries]


def tight(pipe, *transforms, preset=None):
    """Return a budget in which a call fits only if weights come and go."""
    found = plan_memory(pipe, transforms, preset, Context.named("cuda:8.0:1GiB"), "auto", SMALL)
    most = max(stage.activations or 0 for stage in found.stages)
    steps = ernie_accel.plan(pipe, *transforms, preset=preset, context=Context.named("cuda:8.0"), memory=None).steps
    planned = next((step.planned for step in reversed(steps) if step.planned), PlannedPipe.of(pipe))
    low = least_weights(pipe, planned)
    return most + low + (planned.nbytes - low) // 4


def test_a_pipe_on_the_host_is_placed_and_draws_the_same(card):
    pipe = tiny_ernie(layers=6)
    was = pipe.transformer.layers[0].mlp.up_proj.weight.clone()
    ernie_accel.optimize(pipe, preset=PRECISE, memory=tight(pipe, preset=PRECISE), call=SMALL)
    assert type(applied(pipe)[-1]) is Residency
    resident = ernie_accel.optimize(tiny_ernie(layers=6), *PRECISE.transforms, memory=None)
    assert torch.equal(picture(pipe), picture(resident))
    assert torch.equal(ernie_accel.restore(pipe).transformer.layers[0].mlp.up_proj.weight, was)


def test_a_folder_is_loaded_within_a_budget(card, plain):
    pipe = ErnieImagePipeline.from_pretrained(plain)
    budget = tight(pipe)
    loaded = ernie_accel.load(plain, memory=budget, dtype="float32", call=SMALL)
    assert {type(each) for each in applied(loaded)} == {Residency, ExplainOutOfMemory}
    # Files are mapped at any offset, and the weights of a layer round accordingly.
    torch.testing.assert_close(picture(loaded), picture(pipe), rtol=0, atol=2e-3)
    loaded = ernie_accel.load(plain, preset=FAST, memory=tight(pipe, preset=FAST), dtype="float32", call=SMALL)
    own = tuple(each for each in applied(loaded) if not isinstance(each, Residency))
    assert Residency in map(type, applied(loaded))
    ernie_accel.optimize(pipe, *own, memory=None)
    torch.testing.assert_close(picture(loaded), picture(pipe), rtol=0, atol=2e-3)


@pytest.mark.parametrize("transforms", [(), (Quantize("int8-weight-only"),)])
def test_what_is_loaded_goes_to_the_accelerator_also_without_a_preset(card, plain, transforms):
    loaded = ernie_accel.load(plain, *transforms, call=SMALL)
    assert "MoveTo('cpu')" in map(repr, applied(loaded))


@pytest.mark.parametrize("memory", ["auto", "tight"])
def test_asking_again_changes_nothing(card, memory):
    pipe = tiny_ernie(layers=6)
    memory = tight(pipe, preset=PRECISE) if memory == "tight" else memory
    ernie_accel.optimize(pipe, preset=PRECISE, memory=memory, call=SMALL)
    before, entries = picture(pipe), ernie_accel.report(pipe).entries
    for again in ({"memory": memory, "call": SMALL}, {"memory": memory}, {}):
        ernie_accel.optimize(pipe, preset=PRECISE, **again)
        assert ernie_accel.report(pipe).entries == entries
    the_plan = ernie_accel.plan(pipe, preset=PRECISE)
    assert (the_plan.undoes, [step.transform for step in the_plan.steps]) == ((), applied(pipe))
    assert torch.equal(picture(pipe), before)


def test_an_interrupt_at_the_end_of_a_request_does_not_lose_where_weights_were_put(card, monkeypatch):
    pipe = tiny_ernie(layers=6)
    budget = tight(pipe, preset=PRECISE)
    done = api.apply_request

    def interrupted(*args, **kwargs):
        done(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(api, "apply_request", interrupted)
        patch.setattr(api.PLACED, "drop", lambda pipe: None)  # the interrupt ends the clearing up, too
        with pytest.raises(KeyboardInterrupt):
            ernie_accel.optimize(pipe, preset=PRECISE, memory=budget, call=SMALL)
    entries = ernie_accel.report(pipe).entries
    ernie_accel.optimize(pipe, preset=PRECISE)
    assert ernie_accel.report(pipe).entries == entries


def test_a_note_of_what_is_not_there_counts_for_nothing(card):
    pipe = tiny_ernie(layers=6)
    ernie_accel.optimize(pipe, preset=PRECISE, memory=tight(pipe, preset=PRECISE), call=SMALL)
    note = api.PLACED.of(pipe)
    ernie_accel.restore(pipe)
    api.PLACED.put(pipe, note)  # as if restore had been interrupted before its last line
    ernie_accel.optimize(pipe, preset=PRECISE, memory="900MiB", call=SMALL)
    assert not any(isinstance(each, Residency) for each in applied(pipe))


def test_another_budget_or_call_is_refused(card):
    pipe = ernie_accel.optimize(tiny_ernie(), preset=PRECISE, call=SMALL)
    with pytest.raises(ErnieAccelError, match=r"memory='auto' .*now memory='900MiB' is asked for.*restore"):
        ernie_accel.optimize(pipe, preset=PRECISE, memory="900MiB")
    with pytest.raises(ErnieAccelError, match="now call="):
        ernie_accel.optimize(pipe, preset=PRECISE, call=Call(128, 128))


def test_what_the_user_chooses_later_wins(card):
    pipe = ernie_accel.optimize(tiny_ernie(layers=6), preset=PRECISE, call=SMALL)
    own = Residency(10**9, device="cpu")
    ernie_accel.optimize(pipe, own, preset=PRECISE)
    assert [each for each in applied(pipe) if each.slot in ("offload", "device")] == [own]


def test_what_is_chosen_leaves_slots_that_are_taken(card):
    own = ExplainOutOfMemory(predicted=5)
    pipe = tiny_ernie(layers=6)
    assert ernie_accel.plan(pipe, own, preset=PRECISE).ok
    ernie_accel.optimize(pipe, own, preset=PRECISE)
    assert [each for each in applied(pipe) if each.slot == own.slot] == [own]


def test_none_leaves_a_pipe_on_the_host(card):
    pipe = ernie_accel.optimize(tiny_ernie(), preset=PRECISE, memory=None)
    assert applied(pipe) == list(PRECISE.transforms)


def test_a_plan_says_what_optimize_does(card):
    pipe = tiny_ernie(layers=6)
    the_plan = ernie_accel.plan(pipe, preset=PRECISE)
    assert the_plan.memory.fits
    ernie_accel.optimize(pipe, preset=PRECISE)
    assert applied(pipe) == [step.transform for step in the_plan.steps]


def test_of_a_pipe_that_is_placed_no_memory_is_planned(card):
    pipe = tiny_ernie(layers=6)
    ernie_accel.optimize(pipe, preset=PRECISE, memory=tight(pipe, preset=PRECISE), call=SMALL)
    with pytest.raises(ErnieAccelError, match="restore"):
        ernie_accel.plan(pipe, preset=PRECISE, context=Context.named("h100"), memory="auto")

    pipe = ernie_accel.optimize(tiny_ernie(layers=6), Residency(10**9), memory=None, context=card)
    with pytest.raises(ErnieAccelError, match="memory is planned for a pipe whose weights are in one place"):
        ernie_accel.optimize(pipe, preset=PRECISE, memory="900MiB")


def test_the_preset_of_auto_is_the_same_when_it_is_asked_for_again(card):
    pipe = ernie_accel.optimize(tiny_ernie(layers=6), preset="auto", on_unsupported="skip", call=SMALL)
    entries = ernie_accel.report(pipe).entries
    ernie_accel.optimize(pipe, preset="auto", on_unsupported="skip")
    assert ernie_accel.report(pipe).entries == entries
    pipe = tiny_ernie(layers=6)
    request = {"preset": "auto", "on_unsupported": "skip", "memory": tight(pipe), "call": SMALL}
    ernie_accel.optimize(pipe, **request)
    entries = ernie_accel.report(pipe).entries
    assert ernie_accel.report(ernie_accel.optimize(pipe, **request)).entries == entries


def test_a_part_that_cannot_run_is_named_before_a_budget_that_is_too_small(card):
    fp8 = Preset("fp8", "for tests", (Quantize("fp8"),))
    with pytest.raises(UnsupportedError, match=r"capability >= 8\.9"):
        ernie_accel.optimize(tiny_ernie(), preset=fp8, memory="1MiB", call=SMALL)
    with pytest.raises(ErnieAccelError, match="does not fit"):
        ernie_accel.optimize(tiny_ernie(), preset=fp8, memory="1MiB", call=SMALL, on_unsupported="skip")


def test_a_copy_of_a_pipe_on_the_device_knows_where_it_was_put(card):
    pipe = ernie_accel.optimize(tiny_ernie(), preset=PRECISE, call=SMALL)
    copied = copy.deepcopy(pipe)
    ernie_accel.optimize(copied, preset=PRECISE)
    assert applied(copied) == applied(pipe)


def test_what_save_wrote_is_placed_within_a_budget_too(card, tmp_path):
    pipe = ernie_accel.optimize(tiny_ernie(layers=6), preset=ANYWHERE, memory=None)
    folder, before = ernie_accel.save(pipe, tmp_path / "ours"), picture(pipe)
    planned = PlannedPipe.of(pipe)
    most = plan_memory(pipe, ANYWHERE.transforms, None, card, "auto", SMALL).peak
    budget = most - (planned.nbytes - least_weights(pipe, planned)) // 2
    for again in (
        ernie_accel.load(folder, memory=budget, call=SMALL),
        ernie_accel.load(folder, memory=budget, call=SMALL, preset=ANYWHERE),
        ernie_accel.load(folder, memory=budget, call=SMALL, preset="auto"),
    ):
        kinds = [type(each) for each in applied(again)]
        assert kinds == [RewriteBlocks, Quantize, ExplainOutOfMemory, Residency]
        assert torch.equal(picture(again), before)
        with pytest.raises(ernie_accel.RestoreError, match="the folder does not hold the originals"):
            ernie_accel.restore(again)
        assert torch.equal(picture(again), before)
        ernie_accel.optimize(again, *ANYWHERE.transforms)  # as before: stays where it was put
        assert [type(each) for each in applied(again)] == kinds
    assert MoveTo in map(type, applied(ernie_accel.load(folder, preset=ANYWHERE)))
    with pytest.raises(ErnieAccelError, match=r"this does not fit: .* are needed at least"):
        ernie_accel.load(folder, memory=1000, call=SMALL)


def test_what_was_loaded_can_be_asked_for_again(plain, tmp_path):
    """What a request would keep of the originals makes no difference: they are in files."""
    pipe = ernie_accel.load(plain, preset=FAST, device="cpu")
    folder, before = ernie_accel.save(pipe, tmp_path / "ours"), picture(pipe)
    for again in (pipe, ernie_accel.load(folder)):
        assert all(step.in_place for step in ernie_accel.plan(again, preset=FAST).steps)
        ernie_accel.optimize(again, CallDefaults("turbo"), preset=FAST)
        assert [type(each) for each in applied(again)] == [RewriteBlocks, Quantize, CallDefaults]
        # Files of others are mapped at any offset, and the weights of a layer round accordingly.
        torch.testing.assert_close(picture(again), before, rtol=0, atol=2e-3)


def test_a_folder_that_was_placed_before_is_placed_anew(card, tmp_path):
    pipe = tiny_ernie(layers=6)
    budget = tight(pipe, preset=PRECISE)
    ernie_accel.optimize(pipe, preset=PRECISE, memory=budget, call=SMALL)
    folder = ernie_accel.save(pipe, tmp_path / "ours")
    assert [type(each) for each in applied(ernie_accel.load(folder))] == [RewriteBlocks, ExplainOutOfMemory]
    again = ernie_accel.load(folder, call=SMALL)
    assert [type(each) for each in applied(again)] == [RewriteBlocks, MoveTo, ExplainOutOfMemory]
    assert applied(again)[-1] != applied(pipe)[-2]  # with what is predicted now


def test_a_preset_of_a_saved_pipe_asks_for_what_was_saved(tmp_path):
    ours = ernie_accel.optimize(tiny_ernie(), RewriteBlocks(), Quantize("int8-weight-only", keep_originals=False))
    folder = ernie_accel.save(ours, tmp_path / "ours")
    other = Preset("other", "for tests", (RewriteBlocks(), Quantize("nf4"), CallDefaults("turbo")))
    why = r"the preset asks for Quantize\('nf4'\), and it was saved with Quantize\('int8-weight-only', keep_.*: name a"
    with pytest.raises(SavedPipelineError, match=why):
        ernie_accel.load(folder, preset=other)
    with pytest.raises(SavedPipelineError, match=r"CastDtype\('bfloat16'\), and it was saved without it"):
        ernie_accel.load(folder, preset="turbo-bf16")
    again = ernie_accel.load(folder, preset=Preset("same", "for tests", (*FAST.transforms, CallDefaults("turbo"))))
    assert applied(again) == [*applied(ours), CallDefaults("turbo")]
    assert ernie_accel.report(again).title == "preset 'same'"
    assert ernie_accel.load(folder, CallDefaults("quality"), preset="exact").transformer is not None


def mapped_files():
    """Return the addresses at which this process has files of weights mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    starts = [line.split()[0].split("-") for line in lines if line.endswith(WEIGHTS)]
    return [range(int(start, 16), int(end, 16)) for start, end in starts]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_weights_that_are_about_to_be_placed_stay_in_their_files(card, tmp_path, monkeypatch):
    """So the host holds no copy of them beside what will wait there."""
    pipe = ernie_accel.optimize(tiny_ernie(layers=6), preset=ANYWHERE, memory=None)
    folder = ernie_accel.save(pipe, tmp_path / "ours")
    seen, optimize = [], api._optimize

    def look(pipe, *args, **kwargs):
        tensors = [tensor for name in ("transformer", "vae") for tensor in getattr(pipe, name).parameters()]
        plain = [inner for tensor in tensors for inner in plain_tensors(tensor)]
        files = mapped_files()
        seen.extend((tensor.nbytes, any(tensor.data_ptr() in file for file in files)) for tensor in plain)
        optimize(pipe, *args, **kwargs)

    monkeypatch.setattr(api, "_optimize", look)
    ernie_accel.load(folder, call=SMALL)
    mapped = sum(nbytes for nbytes, is_mapped in seen if is_mapped)
    assert mapped > 0.95 * sum(nbytes for nbytes, _ in seen)  # the rest begins where kernels cannot read it


def test_a_placed_pipe_is_saved(card, tmp_path):
    pipe = tiny_ernie(layers=6)
    ernie_accel.optimize(pipe, preset=PRECISE, memory=tight(pipe, preset=PRECISE), call=SMALL)
    before, entries = picture(pipe), [repr(each) for each in applied(pipe)]
    ernie_accel.save(pipe, tmp_path / "ours")
    assert [repr(each) for each in applied(pipe)] == entries
    assert torch.equal(picture(pipe), before)
    ernie_accel.optimize(pipe, preset=PRECISE)
    assert [repr(each) for each in applied(pipe)] == entries
    assert torch.equal(picture(ernie_accel.load(tmp_path / "ours")), before)


def test_what_cannot_be_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(ErnieAccelError, match="there is no device 'cuda:7' here"):
        ernie_accel.load(tmp_path / "nothing", device="cuda:7")
    with pytest.raises(ErnieAccelError, match="accelerator's memory"):
        ernie_accel.load(tmp_path / "nothing", device="cpu", memory="12GiB")


def test_a_budget_that_is_none_is_refused_before_anything_is_read(card, tmp_path):
    with pytest.raises(ErnieAccelError, match="write 12GiB"):
        ernie_accel.load(tmp_path / "nothing", memory="12")


def test_commands_leave_weights_on_the_host_until_they_are_placed(plain, monkeypatch):
    from ernie_accel.cli.app import load_and_optimize
    from ernie_accel.storage import loading

    moved: list[bool] = []
    original = loading.load_pipeline

    def load(*args, on_host=False, **kwargs):
        moved.append(not on_host)
        return original(*args, on_host=on_host, **kwargs)

    monkeypatch.setattr(loading, "load_pipeline", load)
    load_and_optimize(str(plain), "auto", "exact", False)
    assert moved == [False]


def test_a_model_in_the_hubs_cache_is_planned_without_its_weights(plain, monkeypatch):
    from ernie_accel.cli.app import _to_plan
    from ernie_accel.core.components import is_skeleton
    from ernie_accel.storage import skeleton

    for file in plain.rglob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(skeleton, "cached", lambda model: plain)
    assert is_skeleton(_to_plan("somebody/something", "auto", Context.named("h100")))


def test_asking_a_loaded_pipe_for_what_it_is_loaded_with_changes_nothing(plain):
    request = (CastDtype("bfloat16"), Quantize("int8-weight-only"))
    loaded = ernie_accel.load(plain, *request, device="cpu")
    layer, before = loaded.transformer.layers[1].mlp.up_proj, ernie_accel.report(loaded)
    assert not before.entries[1].step.transform.keep_originals
    the_plan = ernie_accel.plan(loaded, *request)
    assert the_plan.ok
    assert the_plan.undoes == ()
    ernie_accel.optimize(loaded, *request)
    assert loaded.transformer.layers[1].mlp.up_proj is layer
    with pytest.raises(ernie_accel.RestoreError, match="Load the pipeline again"):
        ernie_accel.optimize(loaded, CastDtype("bfloat16"), Quantize("fp8-weight-only"))
    assert loaded.transformer.layers[1].mlp.up_proj is layer
