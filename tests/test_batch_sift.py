"""Clear failures are set aside with the reason, good pictures are not, and rerolls are counted."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ernie_accel.batch import Sift, produce
from ernie_accel.batch.output.sieve import Sieve, bits_set, difference_hash, grid_strength, sharpness
from ernie_accel.core.errors import ErnieAccelError
from tests.stub_engine import StubEngine, make_rows


def scene(seed: int = 0, size: int = 256) -> Image.Image:
    """Return a gradient with shapes: smooth areas and sharp edges, as a good picture has."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 200, size)[None, :, None] + np.linspace(-40, 40, size)[:, None, None]
    picture = Image.fromarray(np.broadcast_to(ramp, (size, size, 3)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, r = *rng.integers(20, size - 20, 2).tolist(), int(rng.integers(10, 50))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return picture


def gridded(period: int) -> Image.Image:
    """Return a scene whose every other patch is brighter, as broken tiling leaves it."""
    pixels = np.asarray(scene(), dtype=np.int16)
    row, column = np.indices(pixels.shape[:2]) // period
    return Image.fromarray((pixels + 20 * ((row + column) % 2)[..., None]).clip(0, 255).astype(np.uint8))


def look(picture, **thresholds):
    return Sieve(Sift(**thresholds)).look(picture, "a.png").reason


@pytest.mark.parametrize("seed", range(8))
def test_good_pictures_pass(seed):
    assert look(scene(seed), blur_variance=20.0) is None


@pytest.mark.parametrize("colour", ["black", "white", "#808080"])
def test_blank_pictures_are_rejected(colour):
    assert (
        look(Image.new("RGB", (64, 64), colour))
        == "blank: the standard deviation of its grey values is 0.00, less than 2"
    )


def test_blurred_pictures_are_rejected():
    blurred = scene().filter(ImageFilter.GaussianBlur(8))
    assert look(blurred, blur_variance=20.0).startswith("blurred: its Laplacian variance is ")
    assert look(blurred) is None  # off unless asked for
    assert sharpness(np.asarray(scene().convert("L"), np.float32)) > 20


@pytest.mark.parametrize("period", [8, 16, 32])
def test_grids_are_rejected(period):
    assert look(gridded(period)).startswith(f"grid: edges every {period} px are ")
    assert grid_strength(np.asarray(scene().convert("L"), np.float32))[0] < 2


def test_a_strong_grid_counts_as_one_that_can_be_refined():
    picture = gridded(8)
    assert Sieve(Sift()).look(picture, "a.png").reason.startswith("grid: edges every ")
    found = Sieve(Sift(grid_score=0.5, refine=True)).look(picture, "a.png")
    assert found.gridded
    assert found.grid_score > 0.5
    assert found.reason.startswith("faint grid: its score is ")


def test_near_duplicates_are_rejected_and_named():
    sieve = Sieve(Sift(duplicate_bits=4))
    assert sieve.look(scene(1), "a.png").reason is None
    assert sieve.look(scene(2), "b.png").reason is None
    assert sieve.look(scene(1).resize((200, 200)), "c.png").reason.startswith("near-duplicate of a.png: ")
    assert sieve.look(scene(1), "a.png").reason is None  # the same picture, made again


def test_hashes_of_earlier_runs_count():
    known = [(f"{difference_hash(scene(1)):016x}", "old.png")]
    assert "near-duplicate of old.png" in Sieve(Sift(duplicate_bits=0), known).look(scene(1), "new.png").reason


def test_a_picture_made_again_is_still_compared_with_the_others():
    digest = difference_hash(scene(1))
    known = [(f"{digest:016x}", "again.png"), (f"{digest ^ 1:016x}", "other.png")]
    assert Sieve(Sift(duplicate_bits=0), known).look(scene(1), "again.png").reason is None
    found = Sieve(Sift(duplicate_bits=1), known).look(scene(1), "again.png").reason
    assert found == "near-duplicate of other.png: 1 of 64 bits differ, no more than 1"


def test_more_hashes_than_there_was_room_for_are_all_known():
    known = [(f"{i << 40:016x}", f"{i}.png") for i in range(3000)]
    digest = difference_hash(scene(1))
    sieve = Sieve(Sift(duplicate_bits=0), [*known, (f"{digest:016x}", "last.png")])
    assert "near-duplicate of last.png: 0 of 64" in sieve.look(scene(1), "new.png").reason


def test_bits_are_counted_as_python_counts_them():
    numbers = [0, 1, 2**63, 2**64 - 1, *(random.Random(0).getrandbits(64) for _ in range(500))]
    assert bits_set(np.array(numbers, dtype=np.uint64)).tolist() == [bin(number).count("1") for number in numbers]


@pytest.mark.parametrize("bad", [{"blank_std": -1}, {"duplicate_bits": 65}, {"reroll": -1}, {"grid_ratio": 0.5}])
def test_thresholds_out_of_range_are_named(bad):
    with pytest.raises(ErnieAccelError, match=r"is -?[0-9.]+; expected [01] to "):
        Sift(**bad)


class BlankFor(StubEngine):
    """Draws nothing for some seeds."""

    def __init__(self, *seeds: int) -> None:
        super().__init__()
        self.seeds = seeds

    def render(self, requests, timeout_s=None):
        pictures = super().render(requests, timeout_s)
        size = (32, 32)
        return [Image.new("RGB", size) if r.seed in self.seeds else p for r, p in zip(requests, pictures, strict=True)]


def run(engine, rows, out, **options):
    return sorted(produce(engine, rows, out, progress=False, **options), key=lambda result: result.row.index)


def test_rejected_pictures_go_to_their_folder_with_the_reason(tmp_path):
    good, bad, other = run(BlankFor(1), make_rows(3), tmp_path, sift=Sift())
    assert (good.error, other.error) == (None, None)
    assert bad.rejected
    assert bad.path is None
    assert (
        bad.error
        == "rejected: blank: the standard deviation of its grey values is 0.00, less than 2; see rejected/001.png"
    )
    assert (tmp_path / "rejected" / "001.png").is_file()
    assert not (tmp_path / "001.png").exists()
    again = BlankFor()
    assert run(again, make_rows(3), tmp_path, sift=Sift()) == []  # it would only come out the same
    assert again.batches == []


def test_a_rejected_picture_is_tried_with_another_seed(tmp_path):
    (result,) = run(BlankFor(0), make_rows(1), tmp_path, sift=Sift(reroll=2))
    assert result.error is None
    assert result.seed != 0
    with Image.open(result.path) as picture:
        assert picture.text["seed"] == str(result.seed)
    assert [path.name for path in (tmp_path / "rejected").iterdir()] == ["000.png"]


def test_a_rejected_picture_leaves_no_older_one_in_its_place(tmp_path):
    run(BlankFor(), make_rows(2), tmp_path, sift=Sift())
    kept = (tmp_path / "000.png").read_bytes()
    changed = [make_rows(1)[0], make_rows(2, seed=8)[1]]
    (bad,) = run(BlankFor(8), changed, tmp_path, sift=Sift(), overwrite=True)
    assert bad.rejected
    assert not (tmp_path / "001.png").exists()
    assert (tmp_path / "000.png").read_bytes() == kept


def test_rerolls_end(tmp_path):
    class Blank(StubEngine):
        def render(self, requests, timeout_s=None):
            super().render(requests, timeout_s)
            return [Image.new("RGB", (32, 32)) for _ in requests]

    engine = Blank()
    (result,) = run(engine, make_rows(1), tmp_path, sift=Sift(reroll=2))
    assert result.rejected
    assert len({batch[0].seed for batch in engine.batches}) == 3
    assert len(list((tmp_path / "rejected").iterdir())) == 3


def test_every_rejected_picture_has_a_place_of_its_own(tmp_path):
    """Whatever names rows have: these would meet if folders became part of names, or rerolls of endings."""
    names = [("", "a__b.png"), ("a", "b.png"), ("", "x.png"), ("", "x.1.png"), ("a", "x.1.png"), ("a.1", "x.png")]
    names += [("", "n" * 251 + ".png"), ("f" * 255, "n" * 251 + ".png")]  # the longest there are

    class Blank(StubEngine):
        def render(self, requests, timeout_s=None):
            return [Image.new("RGB", (32, 32), (request.seed % 256, 0, 0)) for request in requests]

    rows = [
        replace(row, folder=folder, file_name=name) for row, (folder, name) in zip(make_rows(8), names, strict=True)
    ]
    results = run(Blank(), rows, tmp_path, sift=Sift(reroll=2))
    assert all(result.rejected for result in results)
    assert len(list((tmp_path / "rejected").rglob("*.png"))) == 3 * len(rows)
    seeds = set()
    for result in results:
        place = tmp_path / result.error.partition("; see ")[2]
        assert place.parts[-1] == result.row.file_name
        with Image.open(place) as picture:
            assert picture.text["prompt"] == result.row.prompt
            seeds.add(picture.text["seed"])
    assert seeds == {str(result.seed) for result in results}


@pytest.mark.parametrize("folder", ["rejected", "Rejected", "older", "reroll-1", "REROLL-20"])
def test_the_folders_of_the_rejected_are_not_for_rows(folder):
    with pytest.raises(ValueError, match="is a folder the job itself uses"):
        make_rows(1, folder=folder)
