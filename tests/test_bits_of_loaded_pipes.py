"""What is called exact is so on pipes whose weights are mapped from files, which begin anywhere in memory."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

import ernie_accel
from ernie_accel import CastDtype, Effect, FreeAfterUse, MakeContiguous, RewriteBlocks
from ernie_accel.core.components import alignment_of, modules_of, weights_of, with_alignment
from tests.examples import EXAMPLES
from tests.pipelines import picture, tiny_ernie, tiny_flux, tiny_lumina2, tiny_sd, tiny_wan, tiny_z_image
from tests.test_denoisers import draw

FAMILIES = {"ernie": tiny_ernie, "flux": tiny_flux, "lumina2": tiny_lumina2, "z-image": tiny_z_image}


def as_loaded(make):
    """Return a pipe whose weights begin 8 bytes after a multiple of 64, as those of a mapped file may."""
    pipe = make()
    for module in modules_of(pipe).values():
        for weight in weights_of(module):
            weight.tensor.data = with_alignment(weight.tensor.data, 8)
    return pipe


def places(pipe):
    return {
        f"{name}.{weight.path}": alignment_of(weight.tensor)
        for name, module in modules_of(pipe).items()
        for weight in weights_of(module)
    }


def drawn(pipe):
    """A picture with guidance and no negative prompt, whose embedding has few rows."""
    if type(pipe).__name__ in ("StableDiffusionPipeline", "WanPipeline"):
        return draw(pipe)
    return picture(pipe, guidance_scale=3.0, output_type="latent")


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_the_preset_exact_changes_no_bit(make):
    pipe = as_loaded(make)
    before = drawn(pipe)
    ernie_accel.optimize(pipe, preset="exact")
    assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    "transform",
    [CastDtype("bfloat16"), FreeAfterUse(), MakeContiguous(), RewriteBlocks()],
    ids=repr,
)
def test_restore_puts_weights_back_where_they_began(make, transform):
    pipe = as_loaded(make)
    stock, before = places(pipe), drawn(pipe)
    if not ernie_accel.plan(pipe, transform).ok:
        assert transform == RewriteBlocks() or make is tiny_flux
        pytest.skip("the family has no rewritten blocks, or the pipe no text encoder to free")
    ernie_accel.optimize(pipe, transform)
    after = drawn(pipe)
    if transform.effect is Effect.EXACT:
        assert torch.equal(after, before)
    ernie_accel.restore(pipe)
    assert places(pipe) == stock
    assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize("make", [*FAMILIES.values(), tiny_sd, tiny_wan])
def test_a_pipe_from_a_folder_is_exact_and_restored_bit_for_bit(make, tmp_path):
    made = make()
    made.save_pretrained(tmp_path)
    left = {name: part for name, part in made.components.items() if part is None}
    pipe = DiffusionPipeline.from_pretrained(tmp_path, **left)
    pipe.set_progress_bar_config(disable=True)
    stock, before = places(pipe), drawn(pipe)
    assert any(place % 16 for place in stock.values())  # weights of mapped files
    ernie_accel.optimize(pipe, preset="exact")
    assert torch.equal(drawn(pipe), before)
    ernie_accel.optimize(pipe, CastDtype("bfloat16"))
    assert not torch.equal(drawn(pipe), before)
    ernie_accel.restore(pipe)
    assert places(pipe) == stock
    assert torch.equal(drawn(pipe), before)


def test_a_cast_that_loses_no_bits_comes_back_to_the_same_places():
    pipe = as_loaded(lambda: tiny_ernie(dtype=torch.bfloat16))
    stock, before = places(pipe), drawn(pipe)
    ernie_accel.optimize(pipe, CastDtype("float32"))
    ernie_accel.restore(pipe)
    assert places(pipe) == stock
    assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize("transform", [t for t in EXAMPLES if t.effect is Effect.EXACT], ids=repr)
def test_what_is_called_exact_is_so_with_weights_that_begin_anywhere(transform):
    pipe = as_loaded(lambda: tiny_ernie(enhancer=transform.slot == "enhancer"))
    before = drawn(pipe)
    ernie_accel.optimize(pipe, transform)
    assert torch.equal(drawn(pipe), before)


def test_with_alignment_keeps_values_strides_and_dtype():
    for values in (torch.randn(5, 3), torch.randn(4, 6).t(), torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(0)):
        for alignment in (0, 8, 40):
            moved = with_alignment(values, alignment)
            assert moved.dtype == values.dtype and moved.stride() == values.stride()
            assert torch.equal(moved, values)
            assert values.numel() == 0 or alignment_of(moved) == alignment
