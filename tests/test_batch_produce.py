"""Each row becomes one whole picture or one named failure, and nothing else is left in the folder."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

import ernie_accel
from ernie_accel.batch import BatchInputError, BatchOutputError, Producer, Row, aproduce, produce, read_rows
from ernie_accel.batch.input.naming import JOB_FILES, folder_problem
from ernie_accel.batch.output.report import write_report
from ernie_accel.common.atomic import write_atomically


class StubPipe:
    """Called like ErnieImagePipeline; the picture's colour is the first number of the generator."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(
        self,
        prompt=None,
        negative_prompt="",
        height=64,
        width=64,
        num_inference_steps=50,
        guidance_scale=4.0,
        generator=None,
    ):
        self.calls.append({name: value for name, value in locals().items() if name not in ("self", "generator")})
        if prompt == "fail":
            raise RuntimeError("CUDA out of memory")
        if prompt == "interrupt":
            raise KeyboardInterrupt
        if prompt == "two":
            return SimpleNamespace(images=[Image.new("RGB", (8, 8))] * 2)
        colour = tuple(torch.randint(256, (3,), generator=generator).tolist())
        return SimpleNamespace(images=[Image.new("RGB", (width, height), colour)])


FIX = (
    " could not be written: No space left on device; "
    "fix this and run again: finished pictures stay, and the others are made"
)


class PlainPipe:
    def __call__(self, prompt, generator=None, width=64, height=64):
        return SimpleNamespace(images=[Image.new("RGB", (width, height))])


def make_row(index: int, prompt: str = "a cup", **settings) -> Row:
    settings.setdefault("file_name", f"{index}.png")
    return Row(line=index + 2, index=index, prompt=prompt, **settings)


def run(pipe, rows, out, **options):
    results = list(produce(pipe, rows, out, progress=False, **options))
    return sorted(results, key=lambda result: result.row.index)  # they come as they are finished


def names(folder):
    """Return what is in the folder beside the job's own files."""
    own = {".ernie-accel", "manifest.csv", "manifest.jsonl"}
    return sorted(path.name for path in folder.iterdir() if path.name not in own)


def test_folders_may_be_called_nothing_that_a_job_writes(tmp_path):
    run(PlainPipe(), [make_row(0)], tmp_path)
    write_report(tmp_path)
    own = {path.name for path in tmp_path.iterdir()} - {"0.png"}
    assert {name for name in own if folder_problem(name) is None} == set()
    assert own - {".ernie-accel"} == set(JOB_FILES)


def test_each_row_becomes_a_picture_that_carries_how_it_was_made(tmp_path):
    row = make_row(
        0,
        "一只杯子 · café",
        negative_prompt="blurry",
        seed=7,
        width=32,
        height=48,
        steps=8,
        guidance_scale=1.0,
    )
    (result,) = run(StubPipe(), [row], tmp_path / "new" / "out", facts={"preset": "turbo-fp8"})
    assert (result.row, result.seed, result.error) == (row, 7, None)
    assert result.path == tmp_path / "new" / "out" / "0.png"
    assert result.seconds > 0
    with Image.open(result.path) as picture:
        picture.load()
        assert picture.size == (32, 48)
        settings = json.loads(picture.text.pop("settings"))
        assert picture.text == {
            "prompt": "一只杯子 · café",
            "negative_prompt": "blurry",
            "seed": "7",
            "pipeline": "StubPipe",
            "preset": "turbo-fp8",
            "version": ernie_accel.__version__,
        }
    assert settings == {
        "guidance_scale": 1.0,
        "height": 48,
        "num_inference_steps": 8,
        "width": 32,
    }


def test_what_a_row_leaves_open_is_left_to_the_pipe(tmp_path):
    pipe = StubPipe()
    run(pipe, [make_row(0)], tmp_path)
    assert pipe.calls == [
        {
            "prompt": "a cup",
            "negative_prompt": "",
            "height": 64,
            "width": 64,
            "num_inference_steps": 50,
            "guidance_scale": 4.0,
        }
    ]


def test_the_embedded_model_draws_the_size_that_it_is_good_at(tmp_path):
    """diffusers' default is 1024 x 1024: minutes on a CPU, for a picture without shapes."""
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    rows = [make_row(0, steps=1, guidance_scale=1.0), make_row(1, steps=1, guidance_scale=1.0, width=160)]
    run(pipe, rows, tmp_path / "job")
    with Producer(pipe, tmp_path / "service") as producer:
        assert all(producer.submit(row).result().error is None for row in rows)
    for folder in ("job", "service"):
        assert [Image.open(tmp_path / folder / f"{i}.png").size for i in (0, 1)] == [(128, 128), (160, 128)]


def test_a_picture_depends_on_its_own_seed_only(tmp_path):
    rows = [make_row(i) for i in range(3)]
    together = run(StubPipe(), rows, tmp_path / "a", seed=5)
    assert [result.seed for result in together] == [5, 6, 7]
    (alone,) = run(StubPipe(), [make_row(9, seed=6)], tmp_path / "b", seed=100)
    (resumed,) = run(StubPipe(), rows[2:], tmp_path / "c", seed=5)
    pixels = [Image.open(result.path).tobytes() for result in together]
    assert len(set(pixels)) == 3
    assert Image.open(alone.path).tobytes() == pixels[1]
    assert Image.open(resumed.path).tobytes() == pixels[2]


def test_the_global_random_state_is_left_alone(tmp_path):
    before = torch.random.get_rng_state(), random.getstate()
    run(StubPipe(), [make_row(0)], tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("fail", "RuntimeError: CUDA out of memory: it does not fit even alone; choose a smaller size"),
        ("two", "TypeError: the pipe returned list of 2 in .images; expected a list of one PIL picture"),
    ],
)
def test_a_failing_row_does_not_stop_the_others(tmp_path, prompt, error):
    results = run(StubPipe(), [make_row(0), make_row(1, prompt), make_row(2)], tmp_path)
    assert [result.error for result in results] == [None, error, None]
    assert [result.path for result in results] == [tmp_path / "0.png", None, tmp_path / "2.png"]
    assert names(tmp_path) == ["0.png", "2.png"]


def test_nothing_is_rendered_before_it_is_asked_for(tmp_path):
    pipe = StubPipe()
    rows = [make_row(i) for i in range(100)]
    results = produce(pipe, rows, tmp_path, progress=False)
    assert pipe.calls == []
    next(results)
    made = len(pipe.calls)
    assert made < 100
    results.close()
    assert names(tmp_path) == sorted(f"{i}.png" for i in range(made))


def test_an_interrupt_passes_and_leaves_whole_pictures_only(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(StubPipe(), [make_row(0), make_row(1, "interrupt"), make_row(2)], tmp_path)
    assert names(tmp_path) == ["0.png"]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_picture_and_no_other_file(tmp_path, monkeypatch, stage, failure):
    run(StubPipe(), [make_row(0)], tmp_path)
    old = (tmp_path / "0.png").read_bytes()
    results = produce(StubPipe(), [make_row(0, seed=3), make_row(1)], tmp_path, overwrite=True, progress=False)

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else BatchOutputError) as caught:
        next(results)
    assert names(tmp_path) == ["0.png"]
    assert (tmp_path / "0.png").read_bytes() == old
    if caught.type is BatchOutputError:
        assert (2, "'0.png'" + FIX) in caught.value.problems
        assert str(caught.value).startswith(f"Cannot write to '{tmp_path}' (")
        assert str(caught.value).endswith("\nNo picture was left half-written.")


def test_a_picture_that_cannot_be_encoded_fails_its_row_only(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("cannot write mode F as PNG")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        (result,) = run(StubPipe(), [make_row(0)], tmp_path)
    assert result.error == "OSError: cannot write mode F as PNG"
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_pictures_get_the_permissions_of_any_new_file(tmp_path):
    (result,) = run(StubPipe(), [make_row(0)], tmp_path)
    (tmp_path / "other").touch()
    assert stat.S_IMODE(result.path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_existing_pictures_are_refused_before_anything_is_rendered(tmp_path):
    (tmp_path / "1.png").write_text("mine")
    (tmp_path / "2.png").mkdir()
    (tmp_path / "3.png").symlink_to("nowhere")
    pipe = StubPipe()
    with pytest.raises(BatchOutputError) as caught:
        produce(pipe, [make_row(i) for i in range(4)], tmp_path)
    assert caught.value.problems == (
        (3, "'1.png' exists; allow overwriting or choose another output"),
        (4, "'2.png' is a folder; move it or choose another output"),
        (5, "'3.png' exists; allow overwriting or choose another output"),
    )
    assert pipe.calls == []
    assert names(tmp_path) == ["1.png", "2.png", "3.png"]


def test_overwriting_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    target = tmp_path / "elsewhere.txt"
    target.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.png").symlink_to(target)
    (result,) = run(StubPipe(), [make_row(0)], tmp_path / "out", overwrite=True)
    assert not result.path.is_symlink()
    assert target.read_text() == "mine"


def test_an_unusable_folder_is_refused_before_anything_is_rendered(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BatchOutputError, match="a file of this name is in the way; choose a folder"):
            produce(StubPipe(), [make_row(0)], out)

    really_open = os.open

    def fail(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return really_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(BatchOutputError, match="  Permission denied; choose a folder that can be written to"):
        produce(StubPipe(), [make_row(0)], tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_what_the_pipe_cannot_do_is_refused_before_anything_is_rendered(tmp_path):
    rows = [make_row(0, width=32), make_row(1, negative_prompt="blurry", steps=8)]
    with pytest.raises(BatchInputError) as caught:
        produce(PlainPipe(), rows, tmp_path / "out")
    assert str(caught.value) == (
        "Cannot use the rows (2 problems):\n"
        "  line 3: asks for negative_prompt, which PlainPipe does not take; "
        "it takes: prompt, generator, width, height\n"
        "  line 3: asks for num_inference_steps, which PlainPipe does not take; "
        "it takes: prompt, generator, width, height\n"
        "Fix these and run again; nothing was rendered."
    )
    assert not (tmp_path / "out").exists()
    assert run(PlainPipe(), rows[:1], tmp_path / "out")[0].error is None


def test_a_pipe_without_a_generator_cannot_keep_seeds(tmp_path):
    with pytest.raises(BatchInputError, match="function takes no generator, without which no row can be made"):
        produce(lambda prompt: None, [make_row(0)], tmp_path)
    assert run(lambda **settings: StubPipe()(**settings), [make_row(0, steps=2)], tmp_path)[0].error is None


def test_rows_made_by_hand_are_checked_too(tmp_path):
    rows = [make_row(0, file_name="a.png"), make_row(1, file_name="A.png"), make_row(2)]
    with pytest.raises(BatchInputError) as caught:
        produce(StubPipe(), rows, tmp_path, seed=2**64 - 2)
    assert caught.value.problems == (
        (4, "seed 18446744073709551616 is not within 0 to 18446744073709551615; choose another"),
        (
            3,
            "file name 'A.png' is taken by line 2 as 'a.png', "
            "the same name where letter case or Unicode form is ignored; change one",
        ),
    )


def test_progress_is_shown_on_stderr_unless_switched_off(tmp_path, capsys):
    list(produce(StubPipe(), [make_row(0), make_row(1, "fail")], tmp_path / "a"))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"100%.*2/2 .*failed=1", shown.err)
    run(StubPipe(), [make_row(0)], tmp_path / "b")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_file_cut_off_in_the_middle_is_not_left_behind(tmp_path):
    import resource

    (tmp_path / "0.png").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk: the first 4096 bytes go through
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(tmp_path / "0.png", b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "0.png").read_bytes() == b"old"
    assert names(tmp_path) == ["0.png"]


class Polars:
    """Has of a polars.DataFrame what is used."""

    def __init__(self, rows):
        self._rows, self.columns = rows, list(rows[0])

    def iter_rows(self, *, named=False):
        return iter(self._rows if named else [tuple(row.values()) for row in self._rows])

    def to_dict(self, *, as_series=True):
        raise AssertionError("polars' to_dict gives columns")


class Pandas:
    """Has of a pandas.DataFrame what is used; iterated over, it gives the names of its columns."""

    def __init__(self, rows, columns=None):
        self._rows, self.columns = rows, columns or list(rows[0])

    def __repr__(self):
        return "a data frame"  # an address in a test's id keeps pytest-xdist from running any test

    def to_dict(self, orient="dict"):
        assert orient == "records"
        return self._rows

    def __iter__(self):
        return iter(self.columns)


class NAType:
    """As pandas.NA: it is equal to nothing, and no truth value."""

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


ROWS = [
    {"sku": "a", "prompt": "one", "steps": np.int64(4), "guidance_scale": np.float32(1.5), "shelf": 7},
    {"sku": "b", "prompt": "a lid", "steps": NAType(), "guidance_scale": np.float32("nan"), "shelf": None},
]


@pytest.mark.parametrize("wrap", [list, iter, Pandas, Polars, pyarrow.Table.from_pylist], ids=str)
def test_dicts_and_data_frames_are_rows(tmp_path, wrap):
    rows = ROWS
    if wrap == pyarrow.Table.from_pylist:
        scales = [float(row["guidance_scale"]) for row in ROWS]
        rows = [row | {"steps": n, "guidance_scale": g} for row, n, g in zip(ROWS, (4, None), scales, strict=True)]
    pipe = StubPipe()
    results = run(pipe, wrap(rows), tmp_path)
    assert names(tmp_path) == ["a.png", "b.png"]
    assert [call["num_inference_steps"] for call in pipe.calls] == [4, 50]
    assert [call["guidance_scale"] for call in pipe.calls] == [1.5, 4.0]
    assert [dict(result.row.columns)["shelf"] for result in results] == ["7", ""]
    assert [result.row.line for result in results] == [1, 2]


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda prompts: (p for p in prompts)])
def test_prompts_are_rows(tmp_path, wrap):
    results = run(StubPipe(), wrap(["a cup", "一只杯子"]), tmp_path, seed=5)
    assert [(result.row.prompt, result.seed) for result in results] == [("a cup", 5), ("一只杯子", 6)]
    assert names(tmp_path) == ["00000.png", "00001.png"]


def test_rows_of_a_program_are_named_and_filled_as_those_of_a_file():
    rows = read_rows(
        [{"name": "mug", "kind": "cups", "cfg": "x"}],
        pattern="{name}_{index}.png",
        template="a photo of {name}",
        folder_by="kind",
        extra_columns=["cfg"],
        defaults={"steps": 8, "width": 64, "height": 64, "variants": 2},
    )
    assert [(r.path, r.prompt, r.steps, r.width) for r in rows] == [
        ("cups/mug_0_v1.png", "a photo of mug", 8, 64),
        ("cups/mug_0_v2.png", "a photo of mug", 8, 64),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a red mug", "is one str, 'a red mug'; to draw one picture, give a list with one prompt"),
        (Path("prompts.csv"), "to read a table, give what read_table returns"),
        ({"prompt": "a"}, "is one dict; give a list of dicts"),
        (make_row(0), "is one Row; give a list with it"),
        (7, "is of type int; expected rows: prompts, dicts"),
        (None, "is of type NoneType; expected rows: prompts, dicts"),
        (SimpleNamespace(collect=list), "is of type SimpleNamespace: call its collect() first"),
        (Pandas([{"a": 1}], columns=["prompt", "prompt"]), "has more than one column named 'prompt'"),
        (["a", ""], "line 2: prompt is empty"),
        (["a", 5], "line 2: is of type int; expected a prompt or a dict such as {'prompt': 'a red mug'}"),
        (["a", make_row(0)], "line 2: is a Row among others"),
        ([{"text": "a"}], "has no 'prompt' column; found: 'text'"),
        ([{"prompt": "a", "cfg": 3}], "column 'cfg' would be ignored; rename it to 'guidance_scale'"),
        ([{"prompt": "a", "steps": 0}], "line 1: steps 0 is not within 1 to 1000"),
        ([{"prompt": "a", "steps": 7.5}], "line 1: steps '7.5' is not a whole number"),
        ([{"prompt": "a", "width": 1000}], "line 1: width 1000 is not made of multiples of 16"),
        ([{"prompt": "a", "seed": [1]}], "line 1: 'seed' is a list"),
        ([{"prompt": "a", "sku": "../x"}], "file name '../x.png'"),
        ([{"prompt": "a", "sku": "x"}, {"prompt": "b", "sku": "X"}], "line 2: file name 'X.png'"),
        (["\ud800"], "has half of a surrogate pair"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used_are_refused_before_anything_is_drawn(tmp_path, rows, message):
    pipe = StubPipe()
    with pytest.raises(BatchInputError, match=re.escape(message)):
        produce(pipe, rows, tmp_path / "out")
    assert not pipe.calls
    assert not (tmp_path / "out").exists()


def test_aproduce_takes_prompts_too(tmp_path):
    results = asyncio.run(aproduce(StubPipe(), ["a cup"], tmp_path, progress=False))
    assert [result.path.name for result in results] == ["00000.png"]
