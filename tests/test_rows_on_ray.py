"""Rows of a Ray dataset are drawn by actors, each once, and only what is missing when it runs again."""

from __future__ import annotations

import math
import os
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from ernie_accel.batch.engines import Request
from tests.child_paths import PYTHONPATH
from tests.stub_engine import StubEngine, picture_of

pa = pytest.importorskip("pyarrow", reason="Ray Data hands over Arrow's tables")

from examples.rows_on_ray import Draw, drawn  # noqa: E402  # needs what was looked for


class NotingEngine(StubEngine):
    """Notes in a file which process rendered which prompt, after as many processes as are asked for have started."""

    def __init__(self, notes, processes=1):
        super().__init__(self._note, seconds=0.01)
        self._notes, self._processes = Path(notes), processes
        Path(f"{notes}-{os.getpid()}").touch()

    def _note(self, requests, call):
        deadline = time.monotonic() + 60
        while len(list(self._notes.parent.glob(f"{self._notes.name}-*"))) < self._processes:
            assert time.monotonic() < deadline, "the other process has not started"
            time.sleep(0.05)
        if any(request.prompt == "fail" for request in requests):
            raise LookupError("no such word")
        with Path(self._notes).open("a") as file:
            file.writelines(f"{os.getpid()} {request.prompt}\n" for request in requests)


def columns(count):
    prompts = ["fail" if i == 3 else f"cup{i}" for i in range(count)]
    names = [f"{i}.png" for i in range(count)]
    return {
        "prompt": prompts,
        "file_name": names,
        "seed": list(range(7, 7 + count)),
        "guidance_scale": [math.nan] * count,
        "sku": list(range(count)),
    }


def test_a_batch_keeps_its_columns_and_each_row_has_its_outcome(tmp_path):
    batch = columns(5)
    batch["file_name"][4] = "../x"
    draw = Draw(lambda: NotingEngine(tmp_path / "notes"), str(tmp_path / "out"))
    made = draw(pa.table(batch)).to_pydict()
    assert list(made) == [*batch, "path", "picture_seed", "error"]
    assert [bool(error) for error in made["error"]] == [False, False, False, True, True]
    assert made["error"][3] == "LookupError: no such word"
    assert "file name '../x'" in made["error"][4]
    assert list(made["picture_seed"]) == [7, 8, 9, 10, 11]
    with Image.open(made["path"][2]) as found:
        assert found.tobytes() == picture_of(Request(prompt="", seed=9)).tobytes()
    again = draw(pa.table(made)).to_pydict()  # with the columns of the first time
    assert list(again) == list(made)
    assert (again["path"], again["error"]) == (made["path"], made["error"])
    assert len((tmp_path / "notes").read_text().splitlines()) == 3  # what is there is not drawn again


def test_a_row_without_a_seed_has_that_of_its_name(tmp_path):
    batch = {name: values[:2] for name, values in columns(2).items() if name != "seed"}
    draw = Draw(lambda: StubEngine(), str(tmp_path))
    seeds = draw(pa.table(batch))["picture_seed"].to_pylist()
    assert len(set(seeds)) == 2
    (tmp_path / "0.png").unlink()
    assert draw(pa.table(batch).slice(0, 1))["picture_seed"].to_pylist() == seeds[:1]


def test_what_is_missing_in_one_row_changes_nothing_in_another(tmp_path):
    seeds = [2**62 + 1, None]  # as a float, the first would be another
    batch = pa.table({"prompt": ["cup", "mug"], "file_name": ["a.png", "b.png"], "seed": seeds})
    made = Draw(StubEngine, str(tmp_path))(batch)
    assert made["picture_seed"].to_pylist() == [2**62 + 1, zlib.crc32(b"b.png")]
    assert made["seed"].to_pylist() == seeds
    assert made["error"].to_pylist() == ["", ""]


def test_a_row_without_a_prompt_or_a_name_is_not_drawn_as_none(tmp_path):
    engine = StubEngine()
    batch = pa.table({"prompt": ["cup", None, "mug"], "file_name": ["a.png", "b.png", None]})
    made = Draw(lambda: engine, str(tmp_path))(batch)
    assert [bool(error) for error in made["error"].to_pylist()] == [False, True, True]
    assert [request.prompt for requests in engine.batches for request in requests] == ["cup"]


def test_a_number_that_is_none_costs_its_own_row_only(tmp_path):
    batch = pa.table({"prompt": ["a", "b", "c"], "file_name": ["a.png", "b.png", "c.png"], "seed": ["7", "soon", "-1"]})
    made = Draw(StubEngine, str(tmp_path))(batch)
    assert [bool(error) for error in made["error"].to_pylist()] == [False, True, True]
    assert made["picture_seed"].to_pylist() == [7, zlib.crc32(b"b.png"), None]


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
        rows = ray.data.from_items(pa.table(given).to_pylist(), override_num_blocks=8)
        made = drawn(
            rows, lambda: NotingEngine(notes, processes=2), str(out), actors=2, num_gpus=0, batch=10
        ).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["sku"] for row in made) == list(range(200))
    assert [row["sku"] for row in made if row["error"]] == [3]
    drawn_by = [line.split() for line in notes.read_text().splitlines()]
    assert sorted(prompt for _, prompt in drawn_by) == sorted(f"cup{i}" for i in range(200) if i != 3)
    assert len({process for process, _ in drawn_by}) == 2
    assert len(list(out.glob("*.png"))) == 199
