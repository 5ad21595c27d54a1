"""`load` reads a folder of `save`, a folder of diffusers, or a hub id, and optimizes it; `optimize` places weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import ErnieImagePipeline

import ernie_accel
from ernie_accel import CastDtype, Context, Quantize, RewriteBlocks
from ernie_accel.core.errors import ErnieAccelError
from tests.pipelines import picture, tiny_ernie


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
    with pytest.raises(ErnieAccelError, match="has the transforms it was saved with"):
        ernie_accel.load(tmp_path / "ours", preset="exact")


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
