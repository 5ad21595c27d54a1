"""Rows that begin at a picture: the same checks, ledger and resume; only pictures below the table's folder are read."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import ernie_accel
from ernie_accel import ErnieAccelError, image_to_image, inpaint
from ernie_accel.batch import BatchInputError, Producer, Sift, produce, read_rows, read_table
from ernie_accel.batch.engines import LocalEngine, Request
from ernie_accel.batch.engines.base import AdapterFile, EngineLostError
from ernie_accel.batch.errors import BatchChangedError
from ernie_accel.batch.output.report import write_report
from ernie_accel.embedded import MODEL_FOLDER
from tests.pipelines import tiny_ernie, tiny_flux
from tests.stub_engine import StubEngine, make_rows

PIXELS = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with pictures and a mask."""
    (tmp_path / "in").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "in" / "a.png")
    Image.fromarray(255 - PIXELS).save(tmp_path / "in" / "b.png")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (32, 0, 64, 48))
    mask.save(tmp_path / "in" / "mask.png")
    Image.new("L", (64, 32)).save(tmp_path / "in" / "small.png")
    (tmp_path / "in" / "text.png").write_text("no picture")
    Image.fromarray(PIXELS).save(tmp_path / "in" / "whole.jpg")
    (tmp_path / "in" / "cut.jpg").write_bytes((tmp_path / "in" / "whole.jpg").read_bytes()[:2000])
    return tmp_path


def table(folder, *rows, header="prompt,image,mask,strength"):
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "t.csv"


def draw(pipe, folder, *rows, **options):
    call = {"steps": 2, "guidance_scale": 1.0, "width": 32, "height": 32}
    return list(produce(pipe, read_table(table(folder, *rows), defaults=call), folder / "out", **options))


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_row_is_what_the_functions_draw(folder):
    pipe = tiny_ernie()
    rows = "a red circle,in/a.png,,0.6", "a red circle,in/a.png,in/mask.png,1", "a big square,,,", "blue,in/b.png,,"
    results = draw(pipe, folder, *rows, seed=5)
    assert [result.error for result in results] == [None] * 4
    out = {result.row.index: pixels(result.path) for result in results}
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "use_pe": False, "output_type": "pil"}

    def seed(index):
        return torch.Generator().manual_seed(5 + index)

    first = image_to_image(pipe, PIXELS, "a red circle", strength=0.6, generator=seed(0), **call).images[0]
    assert np.array_equal(out[0], np.asarray(first))
    painted = inpaint(
        pipe, PIXELS, folder / "in" / "mask.png", "a red circle", strength=1, generator=seed(1), **call
    ).images[0]
    assert np.array_equal(out[1], np.asarray(painted))
    assert np.array_equal(out[1][:, :32], PIXELS[:, :32])
    assert out[2].shape == (32, 32, 3)  # a row without a picture is drawn from noise, in the job's size
    fourth = image_to_image(pipe, 255 - PIXELS, "blue", generator=seed(3), **call).images[0]
    assert np.array_equal(out[3], np.asarray(fourth))
    settings = json.loads(Image.open(folder / "out" / "00000.png").text["settings"])
    assert settings["strength"] == 0.6
    assert len(settings["image_sha256"]) == 64


def test_rows_go_together_only_if_they_are_alike(folder):
    rows = read_table(table(folder, "a,in/a.png,,0.5", "b,in/b.png,,0.5", "c,in/a.png,,0.6", "d,in/a.png,in/mask.png,"))
    engine = LocalEngine(tiny_ernie())
    from ernie_accel.batch.input.task import tasks_of

    shapes = [task.request.shape() for task in tasks_of(rows, 0)]
    assert shapes[0] == shapes[1]
    assert len(set(shapes)) == 3
    assert engine.edits
    results = list(produce(engine, rows, folder / "out", batch_size=2))
    assert all(result.error is None and pixels(result.path).shape == (48, 64, 3) for result in results)


def test_every_mistake_comes_with_its_line_and_the_rest_can_go_on(folder):
    os.mkfifo(folder / "in" / "pipe.png")
    rows = [
        "a,in/nowhere.png,,",
        "b,in/text.png,,",
        "c,in/a.png,in/small.png,",
        "d,in/a.png,,1.5",
        "e,in/a.png,,nan",
        "f,in/a.png,,-0.1",
        "g,,in/mask.png,",
        "h,,,0.5",
        "i,in,,",
        "j,in/pipe.png,,",
        "good,in/a.png,,0.5",
    ]
    with pytest.raises(BatchInputError) as caught:
        read_table(table(folder, *rows))
    found = dict(caught.value.problems)
    assert list(found) == list(range(2, 12))
    assert "image 'in/nowhere.png' cannot be read (No such file or directory) below " in found[2]
    assert "--extra-columns" in found[2]
    assert "image 'in/text.png' cannot be read as a picture" in found[3]
    small = "mask 'in/small.png' is 64x32, and image 'in/a.png' is 64x48; a mask has the size of its picture"
    assert found[4] == small
    assert found[5] == "strength 1.5 is not within 0 to 1; write e.g. 0.3, or leave it empty"
    assert "strength 'nan' is not a number" in found[6]
    assert found[7].startswith("strength -0.1 is not within 0 to 1")
    assert found[8] == "mask has no effect without image; name the picture, or leave it empty"
    assert found[9] == "strength has no effect without image; name the picture, or leave it empty"
    assert "is no file" in found[10]
    assert "is no file" in found[11]
    skipped = []
    assert [row.prompt for row in read_table(folder / "t.csv", skipped=skipped)] == ["good"]
    assert len(skipped) == 10


@pytest.mark.parametrize("where", ["absolute", "parent", "link", "folder link"])
def test_no_picture_outside_of_the_folder_is_read(folder, where):
    outside = folder / "secret.png"
    Image.fromarray(PIXELS).save(outside)
    inside = folder / "in"
    name = {"absolute": str(outside), "parent": "../secret.png", "link": "link.png", "folder link": "up/secret.png"}[
        where
    ]
    (inside / "link.png").symlink_to(outside)
    (inside / "up").symlink_to(folder)
    (inside / "t.csv").write_text(f"prompt,image\na,{name}\n")
    with pytest.raises(BatchInputError, match=r"is outside of the folder for pictures, .* choose that folder"):
        read_table(inside / "t.csv")
    own = {"absolute": str(outside), "parent": "secret.png", "link": "in/link.png", "folder link": "in/up/secret.png"}
    (row,) = read_rows([{"prompt": "a", "image": own[where]}], image_root=folder)
    assert row.image.path == str(outside.resolve())


def test_a_picture_that_is_damaged_inside_fails_its_row_and_no_other(folder):
    results = draw(tiny_ernie(), folder, "a,in/a.png,,", "b,in/cut.jpg,,", "c,in/b.png,,", batch_size=3)
    errors = {result.row.index: result.error for result in results}
    assert errors[0] is errors[2] is None
    assert errors[1].startswith("in/cut.jpg cannot be read as a picture")


def test_resuming_notices_another_picture_and_makes_nothing_twice(folder):
    pipe = tiny_ernie()
    assert len(draw(pipe, folder, "a,in/a.png,,0.5")) == 1
    assert draw(pipe, folder, "a,in/a.png,,0.5") == []
    with pytest.raises(BatchChangedError):
        draw(pipe, folder, "a,in/a.png,,0.6")
    Image.fromarray(255 - PIXELS).save(folder / "in" / "a.png")
    with pytest.raises(BatchChangedError, match="image"):
        draw(pipe, folder, "a,in/a.png,,0.5")
    assert len(draw(pipe, folder, "a,in/a.png,,0.5", overwrite=True)) == 1


def test_a_picture_that_changes_while_the_job_runs_is_noticed(folder):
    rows = read_table(table(folder, "a,in/a.png,,"), defaults={"steps": 1, "guidance_scale": 1.0})
    Image.fromarray(255 - PIXELS).save(folder / "in" / "a.png")
    (result,) = produce(tiny_ernie(), rows, folder / "out")
    assert result.error == "in/a.png was changed after the table was checked; run again"
    (folder / "in" / "a.png").unlink()
    (result,) = produce(tiny_ernie(), rows, folder / "out2")
    assert result.error.startswith("in/a.png cannot be read any more")


def test_a_row_may_give_another_size_and_the_jobs_does_not_count(folder):
    path = table(folder, "a,in/a.png,32,16", "b,in/a.png,,", "c,,,", header="prompt,image,width,height")
    rows = read_table(path, default_size=(128, 128), defaults={"steps": 1, "guidance_scale": 1.0})
    shapes = [pixels(r.path).shape[:2] for r in sorted(produce(tiny_ernie(), rows, folder / "out"), key=by_row)]
    assert shapes == [(16, 32), (48, 64), (128, 128)]


def by_row(result):
    return result.row.index


def test_engines_that_do_not_look_at_pictures_refuse_them(folder):
    rows = read_table(table(folder, "a,in/a.png,,"))
    with pytest.raises(
        BatchInputError, match="names a picture to begin at, and StubEngine does not draw from pictures"
    ):
        produce(StubEngine(), rows, folder / "out")
    with pytest.raises(BatchInputError, match=r"names a picture to begin at, and FluxPipeline: .*not known"):
        produce(tiny_flux(), rows, folder / "out")
    with pytest.raises(BatchInputError, match="is no diffusers pipeline"):
        produce(lambda prompt, generator: None, rows, folder / "out")


def test_a_column_of_that_name_may_be_the_users_own(folder):
    path = table(folder, "a,http://shop/a.png,x,hard")
    own = ("image", "mask", "strength")
    (row,) = read_table(path, extra_columns=own)
    assert (row.image, row.mask, row.strength) == (None, None, None)
    assert row.columns["image"] == "http://shop/a.png"
    assert next(iter(produce(StubEngine(), [row], folder / "out"))).error is None


def test_jobs_from_before_pictures_go_on(folder):
    """A request without a picture is described as it always was."""
    from ernie_accel.batch.input.task import tasks_of

    (task,) = tasks_of(make_rows(1), 0)
    assert set(json.loads(task.described())) == {
        "prompt", "seed", "negative_prompt", "width", "height", "steps", "guidance_scale"
    }  # fmt: skip


def test_the_command_draws_from_pictures(folder, monkeypatch, capsys):
    from ernie_accel.cli.app import app

    prompt = "a large red circle in the center on a white background"
    path = table(folder, f"{prompt},in/a.png,,0.3", f"{prompt},in/none.png,,")
    arguments = ["batch", str(path), "--out", str(folder / "out"), "--steps", "2", "--no-enhancer", "--skip-bad"]
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    assert ended.value.code == 0
    assert "left out: image 'in/none.png' cannot be read" in capsys.readouterr().err
    assert pixels(folder / "out" / "00000.png").shape == (48, 64, 3)


class GridEngine(StubEngine):
    """Draws a picture with a grid; once more from that, `left` of the grid is there."""

    edits = True

    def __init__(self, left):
        super().__init__()
        self._left = left

    def render(self, requests, timeout_s=None):
        self.batches.append(tuple(requests))
        wave = np.sin(2 * np.pi * np.arange(128) / 16)
        grid = (wave[:, None] + wave[None])[..., None]
        return [self._picture(request, grid) for request in requests]

    def _picture(self, request, grid):
        if request.image is not None:
            assert request.image.read().size == (128, 128)
        strength = 0 if request.prompt == "clean" else 6 if request.image is None else self._left
        noise = np.random.default_rng(request.seed).normal(0, 8, (128, 128, 3))
        return Image.fromarray((128 + noise + strength * grid).clip(0, 255).round().astype("uint8"))


def gridded_rows():
    return read_rows(["clean", "a", "b"])


def test_a_picture_with_a_grid_is_drawn_once_more_from_itself(tmp_path):
    engine, sift = GridEngine(0), Sift(grid_score=0.5, refine=True)
    results = list(produce(engine, gridded_rows(), tmp_path, sift=sift))
    assert sorted(result.row.prompt for result in results if result.error is None) == ["a", "b", "clean"]
    second = [request for batch in engine.batches for request in batch if request.image is not None]
    assert {(request.strength, request.steps, request.width) for request in second} == {(0.3, 20, 128)}
    texts = [Image.open(tmp_path / f"0000{i}.png").text for i in range(3)]
    assert "grid_score_before" not in texts[0]
    for text in texts[1:]:
        assert float(text["grid_score"]) < 0.5 < 3 < float(text["grid_score_before"])
    assert (tmp_path / "rejected" / "00001.png").exists()  # what it was before
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| drawn once more for a grid | 2 pictures: median score of the grid " in report
    assert "before, 0.00 after" in report
    assert list(produce(GridEngine(0), gridded_rows(), tmp_path, sift=sift)) == []


def test_a_grid_that_stays_is_rejected_with_both_scores(tmp_path):
    results = produce(GridEngine(5), gridded_rows(), tmp_path, sift=Sift(grid_score=0.5, refine=True, reroll=1))
    errors = [result.error for result in results if result.rejected]
    assert len(errors) == 2
    assert all("faint grid: its score is " in error and " after a second pass, and " in error for error in errors)
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert (
        "| drawn once more for a grid | 2 pictures, 2 of them rejected all the same: median score of the grid "
        in report
    )


def test_a_grid_is_only_refined_if_that_is_asked_for_and_can_be_done(tmp_path):
    engine = GridEngine(0)
    results = list(produce(engine, gridded_rows(), tmp_path / "a", sift=Sift(grid_score=0.5)))
    assert [result.rejected for result in sorted(results, key=by_row)] == [False, True, True]
    sift = Sift(grid_score=0.5, refine=True)
    with pytest.raises(BatchInputError, match="refine draws pictures from themselves: StubEngine does not"):
        produce(StubEngine(), gridded_rows(), tmp_path / "b", sift=sift)
    with pytest.raises(BatchInputError, match=r"refine draws pictures from themselves: .*FluxPipeline"):
        produce(tiny_flux(), gridded_rows(), tmp_path / "b", sift=sift)
    with pytest.raises(ErnieAccelError, match="refine has no effect without grid_score"):
        Sift(refine=True)
    assert str(Sift()) == "blank_std=2, grid_ratio=3, reroll=0"  # as in ledgers of earlier releases


def test_the_embedded_model_refines_its_own_pictures(tmp_path):
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    # Its checked backgrounds repeat every 16 px, and are asked for: a second pass keeps them, and says so.
    prompt = "a large red circle in the center on a checked pale pink background"
    rows = read_rows([{"prompt": prompt, "width": 128, "height": 128, "steps": 4, "guidance_scale": 1.0}])
    (result,) = produce(pipe, rows, tmp_path, sift=Sift(grid_ratio=None, grid_score=0.5, refine=True))
    assert "after a second pass" in result.error


class BaseEngine(GridEngine):
    """Draws second passes, in its own way, and says who it is."""

    def __init__(self, left=0, name="Base", **flags):
        super().__init__(left)
        self.name = name
        vars(self).update(flags)

    def identity(self):
        return {"pipeline": self.name}


def refined(out, engine, base, **options):
    return list(produce(engine, gridded_rows(), out, sift=Sift(grid_score=0.5, refine=True), refiner=base, **options))


def test_another_model_draws_the_second_passes_with_its_own_guidance(tmp_path):
    engine, base = GridEngine(6), BaseEngine()
    assert all(result.error is None for result in refined(tmp_path, engine, base))
    assert all(request.image is None for batch in engine.batches for request in batch)
    second = [request for batch in base.batches for request in batch]
    assert sorted(request.prompt for request in second) == ["a", "b"]
    assert {(each.strength, each.steps, each.guidance_scale) for each in second} == {(0.3, 20, 2.0)}
    texts = [Image.open(tmp_path / f"0000{i}.png").text for i in range(3)]
    assert [text.get("refiner pipeline") for text in texts] == [None, "Base", "Base"]  # who refined, where one did
    assert {text["pipeline"] for text in texts} == {"StubEngine"}
    assert refined(tmp_path, GridEngine(6), BaseEngine()) == []  # resumed: nothing is made twice
    with pytest.raises(BatchChangedError, match="'refiner pipeline' was 'Base' and is now 'Other'"):
        refined(tmp_path, GridEngine(6), BaseEngine(name="Other"))
    with pytest.raises(BatchChangedError, match="'refiner pipeline' was 'Base' and is now None"):
        refined(tmp_path, GridEngine(6), None)


def test_a_job_that_ends_between_two_passes_makes_both_again(tmp_path):
    base = BaseEngine()
    base.render = broken = lambda requests, timeout_s=None: (_ for _ in ()).throw(EngineLostError("the card is gone"))
    with pytest.raises(EngineLostError):
        refined(tmp_path, GridEngine(6), base)
    assert broken and not (tmp_path / "00001.png").exists()
    engine, base = GridEngine(6), BaseEngine()
    made = refined(tmp_path, engine, base)
    assert sorted(result.row.prompt for result in made if result.error is None) == ["a", "b"]
    first = {request.prompt for batch in engine.batches for request in batch}
    assert first == {request.prompt for batch in base.batches for request in batch} == {"a", "b"}


def test_a_second_pass_that_fails_costs_no_other_row(tmp_path):
    base = BaseEngine()
    render = base.render

    def fails(requests, timeout_s=None):
        if any(request.prompt == "a" for request in requests):
            raise ValueError("a kernel failed")
        return render(requests, timeout_s)

    base.render = fails
    errors = {result.row.prompt: result.error for result in refined(tmp_path, GridEngine(6), base)}
    assert errors == {"clean": None, "a": "ValueError: a kernel failed", "b": None}


def test_many_threads_draw_and_one_refines(tmp_path):
    """Image servers render several batches at once; a pipe beside them one."""
    inside, most = [], []

    class OneAtATime(BaseEngine):
        def render(self, requests, timeout_s=None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()
            return super().render(requests, timeout_s)

    engine = GridEngine(6)
    engine.slots, engine.max_batch = 4, 1
    rows = read_rows([f"row {i}" for i in range(6)])
    sift = Sift(grid_score=0.5, refine=True)
    results = list(produce(engine, rows, tmp_path, sift=sift, refiner=OneAtATime()))
    assert [result.error for result in results] == [None] * 6
    assert max(most) == 1


def test_a_prompt_that_was_enhanced_is_refined_as_it_was_enhanced(tmp_path):
    class Enhancing(GridEngine):
        def _picture(self, request, grid):
            picture = super()._picture(request, grid)
            picture.info["enhanced_prompt"] = f"{request.prompt}, on a table"
            return picture

    base = BaseEngine()
    refined(tmp_path, Enhancing(6), base)
    second = [request for batch in base.batches for request in batch]
    # Each picture is "clean" to the stub only by its own prompt.
    assert sorted(request.prompt for request in second) == ["a, on a table", "b, on a table"]
    assert not any(request.enhance for request in second)
    text = Image.open(tmp_path / "00001.png").text
    assert (text["prompt"], text["enhanced_prompt"]) == ("a", "a, on a table")


def test_a_local_pipe_says_how_it_enhanced_and_can_be_asked_not_to(tmp_path):
    engine = LocalEngine(ernie_accel.demo.load())
    request = Request(prompt="a red circle", seed=3, width=128, height=128, steps=1, guidance_scale=1.0)
    (picture,) = engine.render([request])
    enhanced = picture.info["enhanced_prompt"]
    assert enhanced != request.prompt
    (again,) = engine.render([replace(request, prompt=enhanced, enhance=False)])
    assert "enhanced_prompt" not in again.info
    assert again.tobytes() == picture.tobytes()
    engine.close()


def test_a_refiner_that_cannot_is_refused_before_anything_is_drawn(tmp_path):
    engine = GridEngine(6)
    with pytest.raises(BatchInputError, match="refine draws pictures from themselves: StubEngine does not"):
        refined(tmp_path, engine, StubEngine())
    with pytest.raises(BatchInputError, match=r"refiner has no effect without Sift\(refine=True\)"):
        produce(engine, gridded_rows(), tmp_path, sift=Sift(grid_score=0.5), refiner=BaseEngine())
    with pytest.raises(BatchInputError, match=r"refiner has no effect without Sift\(refine=True\)"):
        Producer(engine, tmp_path, refiner=BaseEngine())
    rows = [replace(row, lora=AdapterFile("x", "x", "0")) for row in gridded_rows()]
    able = GridEngine(6)
    able.adapts = True
    with pytest.raises(BatchInputError, match="names a LoRA, and BaseEngine does not draw with LoRAs"):
        produce(able, rows, tmp_path, sift=Sift(grid_score=0.5, refine=True), refiner=BaseEngine())
    assert engine.batches == [] == able.batches


def test_a_service_refines_with_another_model(tmp_path):
    base = BaseEngine()
    with Producer(GridEngine(6), tmp_path, sift=Sift(grid_score=0.5, refine=True), refiner=base) as producer:
        results = [producer.submit(row).result(30) for row in gridded_rows()]
    assert [result.error for result in results] == [None] * 3
    assert len(base.batches) == 2


def test_the_command_refines_with_another_model(tmp_path, monkeypatch, capsys):
    from ernie_accel.cli import main

    (tmp_path / "t.csv").write_text("prompt\na large red circle in the center on a dotted pale pink background\n")
    grids = ["--sift", "--grid", "0.5", "--refine", "--refine-model", str(MODEL_FOLDER)]
    arguments = ["batch", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--steps", "2", "--preset", "exact"]

    def run(*more):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        return ended.value.code, capsys.readouterr()

    # Its dotted backgrounds repeat every 16 px, and are asked for, so a second pass keeps them.
    code, (_, errors) = run(*grids)
    assert code == 3 and " after a second pass, and " in errors
    text = Image.open(next((tmp_path / "out" / "rejected").glob("*.png"))).text
    assert (text["refiner model"], text["refiner preset"]) == (str(MODEL_FOLDER), "exact")
    assert json.loads(text["settings"])["guidance_scale"] == 2.0
    assert run(*grids)[0] == 0  # nothing to do
    other = tmp_path / "other"
    shutil.copytree(MODEL_FOLDER, other)
    code, (_, errors) = run(*grids[:-1], str(other))
    assert code == 2 and "'refiner model' was" in errors
    code, (_, errors) = run(*grids[:-2])
    assert code == 2 and "'refiner model' was" in errors
