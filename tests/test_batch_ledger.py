"""A job remembers what is done: it goes on where it stopped, names what has changed, and one process owns it."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from ernie_accel.batch import BatchChangedError, BatchOutputError, produce
from ernie_accel.batch.input.task import tasks_of
from ernie_accel.batch.line.produce import renew_manifest
from ernie_accel.batch.output.ledger import _ROWS, JOB_FOLDER, Ledger, open_job
from ernie_accel.batch.output.report import write_report
from tests.child_paths import PYTHONPATH
from tests.stub_engine import StubEngine, make_rows


def run(engine, rows, out, **options):
    results = list(produce(engine, rows, out, progress=False, **options))
    return sorted(results, key=lambda result: result.row.index)


def rendered(engine):
    return sum(map(len, engine.batches))


def stop_after(count):
    """Return a `stop` for `produce` that lets `count` batches begin."""
    asked = iter([False] * count)
    return lambda: next(asked, True)


def test_a_stopped_job_goes_on_where_it_stopped(tmp_path):
    rows = make_rows(10)
    first = run(StubEngine(), rows, tmp_path, batch_size=2, stop=stop_after(2))
    assert 0 < len(first) < 10
    second = run(StubEngine(), rows, tmp_path, batch_size=2)
    assert sorted(result.row.index for result in first + second) == list(range(10))
    third = StubEngine()
    assert run(third, rows, tmp_path) == []
    assert third.batches == []


def test_a_lost_or_truncated_picture_is_made_again(tmp_path):
    rows = make_rows(4)
    run(StubEngine(), rows, tmp_path)
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[:100])
    (tmp_path / "002.png").unlink()
    again = run(StubEngine(), rows, tmp_path)
    assert sorted(result.row.index for result in again) == [1, 2]
    assert (tmp_path / "001.png").read_bytes() == whole


def test_rows_may_be_added_to_a_finished_job(tmp_path):
    run(StubEngine(), make_rows(3), tmp_path)
    assert [result.row.index for result in run(StubEngine(), make_rows(5), tmp_path, batch_size=1)] == [3, 4]


def test_the_manifest_keeps_the_order_of_the_input_when_rows_are_added_in_the_middle(tmp_path):
    rows = make_rows(5)
    run(StubEngine(), [rows[0], rows[3]], tmp_path)
    run(StubEngine(), [rows[4], *rows[:4]], tmp_path)
    listed = [json.loads(line)["path"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert listed == ["004.png", "000.png", "001.png", "002.png", "003.png"]


def test_what_has_changed_is_named_and_refused(tmp_path):
    rows = make_rows(3)
    run(StubEngine(), rows, tmp_path, facts={"preset": "exact"})
    changed = [replace(rows[0], prompt="a jug", steps=4), rows[1]]
    engine = StubEngine()
    with pytest.raises(BatchChangedError) as caught:
        run(engine, changed, tmp_path, facts={"preset": "turbo-fp8"})
    assert str(caught.value) == (
        f"Cannot resume the job in '{tmp_path}': it has changed (3 problems):\n"
        "  setting 'preset' was 'exact' and is now 'turbo-fp8'\n"
        "  line 2: '000.png': prompt was 'cup 0' and is now 'a jug'; steps was None and is now 4\n"
        "  '002.png' is in the folder's ledger and no longer in the input\n"
        "Change it back, choose another output, or allow overwriting: then what changed is made again."
    )
    assert engine.batches == []
    assert run(StubEngine(), rows, tmp_path, facts={"preset": "exact"}) == []  # the refusal has changed nothing


def test_overwriting_makes_what_changed_again_and_nothing_else(tmp_path):
    rows = make_rows(3)
    run(StubEngine(), rows, tmp_path)
    untouched = (tmp_path / "001.png").stat().st_mtime_ns
    results = run(StubEngine(), [replace(rows[0], seed=77), *rows[1:]], tmp_path, overwrite=True)
    assert [(result.row.index, result.seed) for result in results] == [(0, 77)]
    assert (tmp_path / "001.png").stat().st_mtime_ns == untouched
    engine = StubEngine()
    run(engine, rows, tmp_path, overwrite=True, facts={"preset": "exact"})
    assert rendered(engine) == 3  # another preset changes every picture


def broken(requests, call):
    raise RuntimeError("flaky")


def test_a_row_that_fails_leaves_no_older_picture_in_its_place_and_loses_none(tmp_path):
    rows = [replace(row, folder="a") for row in make_rows(3)]
    run(StubEngine(), rows, tmp_path)
    older = (tmp_path / "a" / "000.png").read_bytes()
    changed = [replace(rows[0], seed=77), *rows[1:]]
    (result,) = run(StubEngine(broken), changed, tmp_path, overwrite=True)
    assert (result.path, result.error) == (None, "RuntimeError: flaky")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["001.png", "002.png"]
    assert (tmp_path / "rejected" / "older" / "a" / "000.png").read_bytes() == older
    (result,) = run(StubEngine(), changed, tmp_path)  # fixed: no picture is in the way of the next run
    assert result.path.is_file()


def test_an_older_picture_stays_in_its_place_until_its_row_is_final(tmp_path):
    """Neither an attempt that has a successor, nor a row that is not begun, touches it."""
    rows = make_rows(2)
    run(StubEngine(), rows, tmp_path)
    older = (tmp_path / "000.png").read_bytes()
    seen = []

    def before(requests, call):
        seen.append((tmp_path / "000.png").read_bytes() == older)
        if call == 1:
            raise RuntimeError("flaky")

    changed = [replace(row, seed=70 + row.index) for row in rows]
    results = produce(
        StubEngine(before),
        changed,
        tmp_path,
        batch_size=1,
        retries=1,
        overwrite=True,
        progress=False,
        stop=stop_after(2),
    )
    assert [result.error for result in results] == [None]
    assert seen == [True, True]
    assert (tmp_path / "000.png").read_bytes() != older
    assert (tmp_path / "001.png").is_file()
    assert not (tmp_path / "rejected").exists()


@pytest.mark.parametrize("kind", ["killed", "truncated", "stale"])
def test_a_file_of_this_job_that_waits_to_be_replaced_is_in_no_later_runs_way(tmp_path, kind):
    """Its row was about to be begun when the job was stopped."""
    rows = make_rows(3)
    run(StubEngine(), rows, tmp_path)
    if kind == "killed":  # after the file, before its entry
        with open_job(tmp_path) as (_, ledger):
            ledger.running(tasks_of(rows, 0))
    elif kind == "truncated":
        for path in tmp_path.glob("*.png"):
            path.write_bytes(path.read_bytes()[:99])
    else:
        rows = [replace(row, seed=70 + row.index) for row in rows]
    run(StubEngine(), rows, tmp_path, batch_size=1, stop=stop_after(1), overwrite=kind == "stale")
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert len(run(StubEngine(), rows, tmp_path)) == 2


def test_a_ledger_that_cannot_be_written_leaves_the_folder_unlocked(tmp_path, monkeypatch):
    def settle(self, entries):
        raise BatchOutputError(tmp_path, [(None, "no space")])

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "settle", settle)
        with pytest.raises(BatchOutputError, match="no space") as caught:
            run(StubEngine(), make_rows(2), tmp_path)
    assert len(run(StubEngine(), make_rows(2), tmp_path)) == 2
    assert caught  # kept until here: it keeps what was under way, and must not keep the lock


def test_what_a_kill_left_of_any_file_is_removed(tmp_path):
    rows = [replace(row, folder="a") for row in make_rows(1)]
    leftovers = [tmp_path / folder / f".{0:016x}.tmp" for folder in ("", "a", "rejected", "rejected/reroll-1/a")]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run(StubEngine(), rows, tmp_path)
    assert not [path for path in leftovers if path.exists()]


@pytest.mark.parametrize("what", [lambda rows, out: renew_manifest(rows, out), lambda rows, out: write_report(out)])
def test_what_a_kill_left_of_manifest_or_report_is_removed_though_no_picture_is_made(tmp_path, what):
    run(StubEngine(), make_rows(1), tmp_path)
    leftover = tmp_path / f".{0:016x}.tmp"
    leftover.touch()
    what(make_rows(1), tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("column", [*_ROWS, "checksum"])
def test_a_row_of_which_any_column_is_damaged_is_refused_and_the_ledger_stays(tmp_path, column):
    rows = make_rows(3)
    run(StubEngine(), rows, tmp_path)
    path = tmp_path / JOB_FOLDER / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as ledger, ledger:
        ledger.execute(f"UPDATE rows SET {column}=CASE {column} WHEN 7 THEN 8 ELSE 7 END WHERE path='001.png'")
        damaged = list(ledger.execute("SELECT * FROM rows"))
    for attempt in (lambda: run(StubEngine(), rows, tmp_path, overwrite=True), lambda: write_report(tmp_path)):
        with pytest.raises(
            BatchOutputError, match=r"the checksum of row 2 does not match\); move it away and allow over"
        ):
            attempt()
    with closing(sqlite3.connect(path)) as ledger:
        assert list(ledger.execute("SELECT * FROM rows")) == damaged


def test_a_job_that_began_with_a_ledger_of_format_1_goes_on(tmp_path):
    rows = make_rows(4)
    run(StubEngine(), rows, tmp_path, batch_size=1, stop=stop_after(2))
    with closing(sqlite3.connect(tmp_path / JOB_FOLDER / "ledger.sqlite")) as ledger, ledger:
        columns = [
            name for _, name, *_ in ledger.execute("PRAGMA table_info(rows)") if name not in ("place", "checksum")
        ]
        ledger.execute(f"CREATE TABLE former AS SELECT {', '.join(columns)} FROM rows")
        for statement in ("DROP TABLE rows", "DROP TABLE files", "ALTER TABLE former RENAME TO rows"):
            ledger.execute(statement)
        ledger.execute("CREATE UNIQUE INDEX paths ON rows (path)")
        ledger.execute("PRAGMA user_version=1")
    manifest = (tmp_path / "manifest.csv").read_bytes()
    assert len(run(StubEngine(), rows, tmp_path)) == 2
    assert (tmp_path / "manifest.csv").read_bytes() != manifest
    assert run(StubEngine(), rows, tmp_path) == []


def test_changes_before_anything_is_finished_are_no_obstacle(tmp_path):
    rows = make_rows(2)
    run(StubEngine(), rows, tmp_path, stop=lambda: True)
    assert len(run(StubEngine(), [replace(rows[0], prompt="a jug")], tmp_path, facts={"preset": "x"})) == 1


def test_failed_rows_are_tried_again_by_the_next_run(tmp_path):
    def fail(requests, call):
        raise RuntimeError("flaky")

    assert [result.error for result in run(StubEngine(fail), make_rows(1), tmp_path)] == ["RuntimeError: flaky"]
    assert [result.error for result in run(StubEngine(), make_rows(1), tmp_path)] == [None]


def test_a_second_process_is_refused_while_the_first_works(tmp_path):
    results = produce(StubEngine(), make_rows(9), tmp_path, progress=False, batch_size=1)
    next(results)
    code = (
        "import sys; from tests.stub_engine import *; from ernie_accel.batch import produce;"
        "list(produce(StubEngine(), make_rows(9), sys.argv[1], progress=False))"
    )
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", code, str(tmp_path)]
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "another process is working on this job; wait for it, or choose another output" in second.stderr
    results.close()
    third = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert third.returncode == 0, third.stderr


@pytest.mark.parametrize("content", [b"no database at all, but a text of some length" * 99, None])
def test_a_ledger_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / JOB_FOLDER / "ledger.sqlite"
    path.parent.mkdir()
    if content is None:
        with sqlite3.connect(path) as ledger:
            ledger.execute("PRAGMA user_version=99")
        ledger.close()
    else:
        path.write_bytes(content)
    with pytest.raises(BatchOutputError, match=r"the job's ledger \.ernie-accel/ledger\.sqlite cannot be used"):
        run(StubEngine(), make_rows(1), tmp_path)


def test_without_resuming_nothing_but_pictures_is_left(tmp_path):
    for _ in range(2):
        assert len(run(StubEngine(), make_rows(2), tmp_path, resume=False, overwrite=True)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.png", "001.png"]


def test_the_manifest_lists_every_row_with_its_own_columns(tmp_path):
    rows = [replace(row, columns={"sku": f"S{row.index}", "prompt": "from a template"}) for row in make_rows(3)]

    def fail(requests, call):
        if requests[0].seed == 1:
            raise ValueError("no")

    run(StubEngine(fail), rows, tmp_path, batch_size=1)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [(line["path"], line["state"], line["seed"], line["sku"]) for line in lines] == [
        ("000.png", "done", 0, "S0"),
        ("001.png", "failed", 1, "S1"),
        ("002.png", "done", 2, "S2"),
    ]
    assert lines[1]["error"] == "ValueError: no"
    assert lines[0]["bytes"] == (tmp_path / "000.png").stat().st_size
    with (tmp_path / "manifest.csv").open(newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    assert [(line["path"], line["prompt"], line["sku"]) for line in table] == [
        (f"00{i}.png", f"cup {i}", f"S{i}") for i in range(3)
    ]


def test_the_largest_seed_survives_the_ledger(tmp_path):
    (row,) = make_rows(1, seed=2**64 - 1)
    run(StubEngine(), [row], tmp_path)
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["seed"] == 2**64 - 1
    assert run(StubEngine(), [row], tmp_path) == []
