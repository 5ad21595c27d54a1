"""A faint grid is found on any picture, however it was saved; clean pictures have none; too high a guidance warns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from benchmarks import grid_remedies
from benchmarks.grid_score import PHOTOGRAPHS, TEXTURES, add_grid, auc, flat, table, tile, visible
from PIL import Image

import ernie_accel
from ernie_accel import CallDefaults, PictureError, image_to_image
from ernie_accel.batch import Sift
from ernie_accel.batch.output.sieve import Sieve
from ernie_accel.fidelity import VISIBLE, grid_score
from tests.pipelines import tiny_ernie

RNG = np.random.default_rng(0)
PICTURES = {
    "flat": flat(RNG)[:256, :256],
    "gravel": np.asarray(Image.fromarray(skimage.data.gravel()[:256, :256]).convert("RGB")),
    "brick": np.asarray(Image.fromarray(skimage.data.brick()[:256, :256]).convert("RGB")),
    "chelsea": skimage.data.chelsea()[:288, 20:300],
    "astronaut": skimage.data.astronaut()[:320, 100:400],
}


def as_jpeg(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("save", [lambda pixels: pixels, lambda pixels: as_jpeg(pixels, 75)], ids=["PNG", "JPEG"])
def test_a_visible_grid_is_found_and_a_clean_picture_has_none(name, save):
    clean, rng = PICTURES[name], np.random.default_rng(1)
    assert grid_score(save(clean)) < VISIBLE / 2
    twice = [add_grid(clean, 2 * visible(clean), rng) for _ in range(3)]
    assert min(grid_score(save(each)) for each in twice) > VISIBLE


@pytest.mark.parametrize("kind", ["lines", "waves", "cells", "tiles"])
@pytest.mark.parametrize("period", [8, 16])
def test_the_score_is_about_the_strength_in_grey_levels(kind, period):
    pattern = tile(kind, period, np.random.default_rng(2))
    pattern = np.tile(pattern / pattern.std(), (256 // period, 256 // period))[..., None]
    noisy = 128 + np.random.default_rng(3).normal(0, 1, (256, 256, 1))
    scores = [grid_score((noisy + strength * pattern).repeat(3, -1).clip(0, 255).round().astype("uint8"))
              for strength in (0, 1, 3)]  # fmt: skip
    assert scores == pytest.approx([0, 1, 3], abs=0.8)


@pytest.mark.parametrize("period", [7, 12, 20, 32])
def test_other_periods_are_none_of_its_business(period):
    pattern = np.sin(2 * np.pi * np.arange(320) / period)
    pixels = 128 + 6 * (pattern[:, None] + pattern[None])
    assert grid_score(pixels[..., None].repeat(3, -1).round().astype("uint8")) < VISIBLE / 2


@pytest.mark.parametrize("scale", [0.75, 1.5])
def test_a_picture_that_was_resized_is_looked_at_in_its_own_size(scale):
    gridded = Image.fromarray(add_grid(PICTURES["chelsea"], 8, np.random.default_rng(4)))
    size = round(gridded.width * scale), round(gridded.height * scale)
    resized = gridded.resize(size, Image.Resampling.LANCZOS)
    assert grid_score(resized, scale=scale) > VISIBLE
    assert grid_score(Image.fromarray(PICTURES["chelsea"]).resize(size), scale=scale) < VISIBLE / 2


def test_the_benchmarks_auc_is_that_of_ranks():
    assert auc([0, 0, 1], [2, 3]) == 1
    assert auc([1, 2], [1, 2]) == 0.5
    assert auc([2, 3], [0]) == 0


def test_the_page_shows_what_was_measured():
    root = Path(__file__).parents[1]
    measured = json.loads((root / "benchmarks/results/grid_score_cpu_202611.json").read_text("utf-8"))
    assert table(measured) in (root / "docs/editing.md").read_text("utf-8")
    assert measured["threshold"] == VISIBLE
    assert measured["false alarms"] <= 0.01
    assert measured["half"] == "report"  # its pictures are others than those the constants were chosen on
    for of in measured["backgrounds"].values():
        assert of["false alarms"] <= 0.01
        for strength in ("1", "2", "4"):
            assert min(of["strengths"][strength]["auc by way"].values()) >= 0.98


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="from 96 x 96 pixels on; got 100 x 95"):
        grid_score(Image.new("RGB", (100, 95)))
    for scale in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be a number above 0"):
            grid_score(Image.new("RGB", (100, 100)), scale=scale)
    with pytest.raises(PictureError, match=r"nowhere\.png cannot be read"):
        grid_score("nowhere.png")


def test_a_batch_sets_gridded_pictures_aside():
    clean, gridded = PICTURES["chelsea"], add_grid(PICTURES["chelsea"], 8, np.random.default_rng(5))
    sieve = Sieve(Sift(grid_score=VISIBLE))
    assert sieve.look(Image.fromarray(clean), "a.png").reason is None
    assert sieve.look(Image.fromarray(gridded), "a.png").reason.startswith("faint grid: its score is ")
    assert Sieve(Sift()).look(Image.fromarray(gridded), "a.png").reason is None  # off unless asked for
    assert sieve.look(Image.fromarray(gridded[:90, :90]), "a.png").reason is None  # too small to tell


def test_a_second_pass_removes_the_grid_and_keeps_what_the_picture_shows():
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a large red circle in the center on a white background"
    call = {"guidance_scale": 1.0, "use_pe": False}
    clean = pipe(prompt, height=128, width=128, num_inference_steps=8, **call).images[0]
    gridded = add_grid(np.asarray(clean), 4, np.random.default_rng(6))
    refined = image_to_image(pipe, gridded, prompt, strength=0.3, num_inference_steps=20, **call).images[0]
    assert grid_score(clean) < VISIBLE < grid_score(gridded)
    assert grid_score(refined) < VISIBLE / 2
    assert np.abs(np.asarray(refined, float) - np.asarray(clean, float)).mean() < 8


@pytest.mark.filterwarnings("error::UserWarning")
def test_guidance_that_a_distilled_checkpoint_cannot_bear_warns():
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, CallDefaults("turbo"))
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    pipe("a red circle", **call)
    pipe("a red circle", guidance_scale=1.5, **call)
    with pytest.raises(UserWarning, match=r"guidance_scale 2 is above 1\.5, where a distilled"):
        pipe("a red circle", guidance_scale=2.0, **call)
    ernie_accel.optimize(pipe, CallDefaults("quality"))
    assert torch.is_tensor(pipe("a red circle", guidance_scale=2.0, **call).images)
    plan = ernie_accel.plan(tiny_ernie(), CallDefaults("turbo", guidance_scale=2.0))
    assert "guidance_scale 2 is above 1.5" in str(plan)


@pytest.mark.parametrize("noise", [4, 16, 32])
def test_grain_is_no_grid(noise):
    """In a small picture, noise is by chance stronger at some frequencies of a grid than around them."""
    rng = np.random.default_rng(7)
    scores = [
        grid_score((128 + rng.normal(0, noise, (size, size, 1)).repeat(3, -1)).clip(0, 255).round().astype("uint8"))
        for size in (96, 128, 192)
        for _ in range(4)
    ]
    assert max(scores) < VISIBLE


def test_a_faint_grid_is_found_in_calm_places_of_a_busy_picture():
    """Where edges are counted fully, they drown a grid, and more so as JPEG."""
    pixels = np.full((160, 160, 3), 200.0)
    down, across = np.indices((160, 160))
    pixels[(down - 60) ** 2 + (across - 70) ** 2 < 45**2] = (30, 60, 160)
    pixels[100:140, 100:150] = (220, 30, 30)
    clean = pixels.astype("uint8")
    gridded = add_grid(clean, 1.5, np.random.default_rng(8))
    for save in (lambda each: each, lambda each: as_jpeg(each, 75)):
        assert grid_score(save(clean)) < VISIBLE / 2
        assert grid_score(save(gridded)) > VISIBLE


def test_what_is_reported_is_not_what_was_chosen_on():
    for names in (PHOTOGRAPHS, TEXTURES):
        assert not set(names["choose"]) & set(names["report"])


def test_the_page_shows_what_the_remedies_do():
    root = Path(__file__).parents[1]
    measured = json.loads((root / "benchmarks/results/grid_remedies_cpu_202611.json").read_text("utf-8"))
    rows = measured["rows"]
    assert grid_remedies.table(rows, measured["pictures"]) in (root / "docs/editing.md").read_text("utf-8")
    refined, first = rows["... refined by the base model"], rows["the checkpoint with a grid"]
    assert first["grids"] == measured["pictures"] and refined["grids"] == 0
    assert refined["objects right"] >= first["objects right"]
