"""Rows of a Ray dataset are drawn by actors, each once, and only what is missing when it runs again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from examples.rows_on_ray import Draw, drawn
from PIL import Image

from ernie_accel.batch.engines import Request
from tests.child_paths import PYTHONPATH
from tests.stub_engine import StubEngine, picture_of


class NotingEngine(StubEngine):
    """Notes in a folder which process rendered which prompt."""

    def __init__(self, notes):
        super().__init__(self._note, seconds=0.01)
        self._notes = notes

    def _note(self, requests, call):
        if any(request.prompt == "fail" for request in requests):
            raise LookupError("no such word")
        with Path(self._notes).open("a") as file:
            file.writelines(f"{os.getpid()} {request.prompt}\n" for request in requests)


def columns(count):
    numpy = pytest.importorskip("numpy")
    prompts = ["fail" if i == 3 else f"cup{i}" for i in range(count)]
    names = [f"{i}.png" for i in range(count)]
    return {
        "prompt": numpy.array(prompts),
        "file_name": numpy.array(names),
        "seed": numpy.arange(count) + 7,
        "guidance_scale": numpy.full(count, numpy.nan),
        "sku": numpy.arange(count),
    }


def test_a_batch_keeps_its_columns_and_each_row_has_its_outcome(tmp_path):
    batch = columns(5)
    batch["file_name"][4] = "../x"
    draw = Draw(lambda: NotingEngine(tmp_path / "notes"), str(tmp_path / "out"))
    made = draw(batch)
    assert list(made) == [*batch, "path", "picture_seed", "error"]
    assert [bool(error) for error in made["error"]] == [False, False, False, True, True]
    assert made["error"][3] == "LookupError: no such word"
    assert "file name '../x'" in made["error"][4]
    assert list(made["picture_seed"]) == [7, 8, 9, 10, 11]
    with Image.open(made["path"][2]) as found:
        assert found.tobytes() == picture_of(Request(prompt="", seed=9)).tobytes()
    again = draw(batch)
    assert list(again["path"]) == list(made["path"])
    assert len((tmp_path / "notes").read_text().splitlines()) == 3  # what is there is not drawn again


def test_a_row_without_a_seed_has_that_of_its_name(tmp_path):
    batch = {name: values[:2] for name, values in columns(2).items() if name != "seed"}
    draw = Draw(lambda: StubEngine(), str(tmp_path))
    seeds = list(draw(batch)["picture_seed"])
    assert len(set(seeds)) == 2
    (tmp_path / "0.png").unlink()
    assert list(draw({name: values[:1] for name, values in batch.items()})["picture_seed"]) == seeds[:1]


@pytest.mark.slow
def test_two_actors_share_the_rows_of_a_dataset(tmp_path):
    pytest.importorskip("pandas", reason="ray.data needs pandas")
    ray = pytest.importorskip("ray")
    environment = {"env_vars": {"PYTHONPATH": PYTHONPATH}}
    options = {"runtime_env": environment, "include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=2, object_store_memory=80_000_000, **options)
    try:
        import ray.data

        notes, out = tmp_path / "notes", tmp_path / "out"
        given = columns(200)
        table = [{name: values[i].item() for name, values in given.items()} for i in range(200)]
        rows = ray.data.from_items(table, override_num_blocks=8)
        made = drawn(rows, lambda: NotingEngine(notes), str(out), actors=2, num_gpus=0, batch=10).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["sku"] for row in made) == list(range(200))
    assert [row["sku"] for row in made if row["error"]] == [3]
    drawn_by = [line.split() for line in notes.read_text().splitlines()]
    assert sorted(prompt for _, prompt in drawn_by) == sorted(f"cup{i}" for i in range(200) if i != 3)
    assert len({process for process, _ in drawn_by}) == 2
    assert len(list(out.glob("*.png"))) == 199
