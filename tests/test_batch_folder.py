"""A job writes inside its folder and nowhere else, replaces nothing that is not its own, and claims no lost picture."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ernie_accel.batch import BatchOutputError, Producer, Sift, produce, read_table
from ernie_accel.batch.input.cells import escaped, unescaped
from ernie_accel.batch.input.job import plan_job
from ernie_accel.batch.input.naming import JOB_FILES
from ernie_accel.batch.line.produce import check_folder, renew_manifest
from ernie_accel.batch.output.folder import OutputFolder
from ernie_accel.batch.output.ledger import JOB_FOLDER, open_job
from ernie_accel.batch.output.report import REPORTS, write_report
from ernie_accel.batch.output.runs import note_run
from ernie_accel.cli import batch as command
from tests.stub_engine import StubEngine, make_rows

MINE = b"sku,prompt\nmine,a mug\n"


def run(engine, rows, out, **options):
    return list(produce(engine, rows, out, progress=False, **options))


def in_folder(count, folder="mugs"):
    return [replace(row, folder=folder) for row in make_rows(count)]


def after(batches, do):
    """Return an engine that calls `do` before it renders the batch after so many."""
    return StubEngine(lambda requests, number: do() if number == batches + 1 else None)


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# Links


def test_the_output_folder_itself_may_be_a_link(tmp_path, elsewhere):
    (tmp_path / "link").symlink_to(elsewhere)
    results = run(StubEngine(), in_folder(3), tmp_path / "link")
    assert all(result.path.is_file() for result in results)
    assert len(list(elsewhere.rglob("*.png"))) == 3
    assert run(StubEngine(), in_folder(3), elsewhere) == []


@pytest.mark.parametrize("link", ["mugs", ".ernie-accel", "rejected", "rejected/older", "rejected/reroll-1/mugs"])
def test_a_link_to_a_folder_is_refused_before_anything_is_rendered(out, elsewhere, link):
    (out / link).parent.mkdir(parents=True, exist_ok=True)
    (out / link).symlink_to(elsewhere)
    engine = StubEngine()
    for attempt in (
        lambda: run(engine, in_folder(2), out, overwrite=True),
        lambda: run(engine, in_folder(2), out, overwrite=True, resume=False),
        lambda: check_folder(in_folder(2), out, overwrite=True),
    ):
        with pytest.raises(BatchOutputError, match=f"'{link}' is a link, which can lead out of the folder; replace it"):
            attempt()
    assert engine.batches == []
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-journal", "runs.jsonl"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_the_ledgers_files_is_refused(out, elsewhere, name, there):
    if there:
        (elsewhere / "target").write_bytes(MINE)
    (out / JOB_FOLDER).mkdir()
    (out / JOB_FOLDER / name).symlink_to(elsewhere / "target")
    refused = f"'{JOB_FOLDER}/{name}' is a link, which can lead out of the folder"
    for attempt in (
        lambda: run(StubEngine(), make_rows(2), out, overwrite=True),
        lambda: check_folder(make_rows(2), out),
    ):
        with pytest.raises(BatchOutputError, match=refused):
            attempt()
    if name == "runs.jsonl":
        with pytest.raises(BatchOutputError, match=r"runs\.jsonl' is a link"):
            note_run(out, "cpu", {})
    assert [path.read_bytes() for path in elsewhere.iterdir()] == [MINE] * there


@pytest.mark.parametrize("name", ["mugs", "rejected"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_is_rendered(out, name):
    (out / name).write_bytes(MINE)
    engine = StubEngine()
    with pytest.raises(BatchOutputError, match=f"'{name}' is a file, and must be a folder; move it"):
        run(engine, in_folder(1), out, overwrite=True)
    assert engine.batches == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_link_that_is_made_while_the_job_runs_leads_nothing_out(out, elsewhere, overwrite):
    def hijack():
        while not (out / "mugs").is_symlink():
            shutil.rmtree(out / "mugs", ignore_errors=True)
            with suppress(FileExistsError):  # a picture was written just now, and made the folder again
                (out / "mugs").symlink_to(elsewhere)

    # Whichever is noticed first: that the next picture has no place, or that one before it is gone.
    message = "'mugs.*(is a link, which can lead out of the folder|removed or changed by somebody else)"
    with pytest.raises(BatchOutputError, match=message):
        run(after(2, hijack), in_folder(12), out, batch_size=2, overwrite=overwrite)
    assert list(elsewhere.iterdir()) == []
    (out / "mugs").unlink()
    run(StubEngine(), in_folder(12), out)
    assert len(list((out / "mugs").iterdir())) == 12


@pytest.mark.parametrize("name", ["000.png", "rejected/older/000.png", "manifest.csv"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(out, elsewhere, name):
    (elsewhere / "target").write_bytes(MINE)

    def link():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(elsewhere / "target")

    run(after(0, link), make_rows(1), out, overwrite=True)
    assert (elsewhere / "target").read_bytes() == MINE
    assert name.startswith("rejected") or not (out / name).is_symlink()


def test_a_picture_is_moved_aside_within_the_folder_only(out, elsewhere):
    run(StubEngine(), make_rows(1), out)

    def hijack(requests, number):
        (out / "rejected").symlink_to(elsewhere)
        raise ValueError("flaky")

    (result,) = run(StubEngine(hijack), make_rows(1, seed=5), out, overwrite=True)
    assert "ValueError: flaky; an older picture is still in its place ('rejected' is a link" in result.error
    assert list(elsewhere.iterdir()) == []


def test_a_producer_follows_no_link(out, elsewhere):
    (out / "mugs").symlink_to(elsewhere)
    (first,), (second,) = in_folder(1), in_folder(1, "cups")
    with Producer(StubEngine(), out, overwrite=True) as producer:
        with pytest.raises(BatchOutputError, match="'mugs' is a link"):
            producer.submit(first)
        assert producer.submit(second).result(30).path.is_file()
    assert list(elsewhere.iterdir()) == []
    (out / "rejected").symlink_to(elsewhere)
    with pytest.raises(BatchOutputError, match="'rejected' is a link"):
        Producer(StubEngine(), out)


def test_names_are_refused_links_without_descriptors_too(out, elsewhere, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr("ernie_accel.batch.output.folder._BY_DESCRIPTOR", False)
    run(StubEngine(), in_folder(2), out)
    assert len(list((out / "mugs").iterdir())) == 2
    run(StubEngine(lambda *_: 1 / 0), [replace(row, seed=9) for row in in_folder(2)], out, overwrite=True)
    assert len(list((out / "rejected/older/mugs").iterdir())) == 2
    folder = OutputFolder(out)
    (out / "cups").symlink_to(elsewhere)
    for attempt in (folder.write, folder.append):
        with pytest.raises(OSError, match="'cups' is a link"):
            attempt("cups/a.png", b"")
    assert list(elsewhere.iterdir()) == []
    folder.remove("gone/a.png")
    folder.remove("gone.png")


# Files of somebody else


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl"])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_file_that_the_job_did_not_write_is_in_the_way(out, elsewhere, name, kind):
    if kind == "folder":
        (out / name).mkdir()
    elif kind == "link":
        (elsewhere / name).write_bytes(MINE)
        (out / name).symlink_to(elsewhere / name)
    else:
        (out / name).write_bytes(MINE)
    engine = StubEngine()
    for attempt in (lambda: run(engine, make_rows(1), out), lambda: check_folder(make_rows(1), out)):
        with pytest.raises(
            BatchOutputError, match=f"'{name}' (exists, and is not as this job wrote it|is a folder); move it"
        ):
            attempt()
    assert engine.batches == []
    assert kind == "folder" or (out / name).read_bytes() == MINE
    if kind != "folder":
        assert len(run(engine, make_rows(1), out, overwrite=True)) == 1
        assert (out / name).read_bytes() != MINE
        assert kind == "file" or (elsewhere / name).read_bytes() == MINE


def test_the_jobs_own_files_are_replaced_until_somebody_changes_them(out):
    for count in (1, 2):
        run(StubEngine(), make_rows(count), out)
        write_report(out)
    renew_manifest(make_rows(2), out)
    for name in JOB_FILES:
        whole = (out / name).read_bytes()
        (out / name).write_bytes(MINE)
        files = {"files": JOB_FILES}
        with pytest.raises(BatchOutputError, match=f"'{name}' exists, and is not as this job wrote it; move it, allow"):
            check_folder(make_rows(3), out, **files)
        with pytest.raises(BatchOutputError, match=f"'{name}' exists, and is not as this job wrote it; move it, allow"):
            write_report(out) if name in REPORTS else renew_manifest(make_rows(2), out)
        assert (out / name).read_bytes() == MINE
        check_folder(make_rows(3), out, overwrite=True, **files)
        (out / name).write_bytes(whole)
        check_folder(make_rows(3), out, **files)
    (out / "report.md").write_bytes(MINE)
    write_report(out, overwrite=True)
    assert (out / "report.md").read_bytes() != MINE
    write_report(out)


def test_a_manifest_that_was_changed_while_the_job_ran_is_left_and_the_pictures_are_whole(out):
    run(StubEngine(), make_rows(1), out)
    with pytest.raises(BatchOutputError, match=r"'manifest\.csv' exists, and is not as this job wrote it"):
        run(after(0, lambda: (out / "manifest.csv").write_bytes(MINE)), make_rows(3), out)
    assert (out / "manifest.csv").read_bytes() == MINE
    (out / "manifest.csv").unlink()
    assert run(StubEngine(), make_rows(3), out) == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_the_manifest_is_written_leaves_none_that_is_unknown(out, monkeypatch, moment):
    run(StubEngine(), make_rows(1), out)
    write = OutputFolder.write

    def killed(self, name, data):
        if name == "manifest.csv":
            if moment == "after":
                write(self, name, data)
            raise KeyboardInterrupt  # as a kill: nothing of the ledger's is done after it
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(StubEngine(), make_rows(2), out)
    assert run(StubEngine(), make_rows(2), out) == []
    with sqlite3.connect(out / JOB_FOLDER / "ledger.sqlite") as ledger:
        assert ledger.execute("SELECT count(*) FROM files").fetchone() == (2,)
    ledger.close()


@pytest.mark.parametrize("option", ["log_json", "prometheus"])
@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("in.csv", MINE, "'in.csv' exists, and is not a (JSON log|Prometheus file) that a job wrote; move it"),
        ("in.jsonl", b'{"prompt": "a"}\n', "'in.jsonl' exists, and is not a"),
        ("in.json", b"[" * 100_000, "'in.json' exists, and is not a"),
        ("out/manifest.csv", None, "'manifest.csv' is a name that the job itself uses; choose another"),
        ("out/Report.html", None, "'Report.html' is a name that the job itself uses"),
        ("out/000.png", None, "'000.png' is a name that the job itself uses"),
        ("out/.ernie-accel/ledger.sqlite", None, "'ledger.sqlite' is a name that the job itself uses"),
        ("out/link/log", None, "'log' leads out of the output folder by a link; choose another"),
        ("out", None, "'out' is a folder; choose another name"),
    ],
)
def test_the_jobs_state_is_written_over_nothing_else(tmp_path, out, elsewhere, option, path, content, message):
    (out / "link").symlink_to(elsewhere)
    if content is not None:
        (tmp_path / path).write_bytes(content)
    engine = StubEngine()
    with pytest.raises(BatchOutputError, match=message):
        run(engine, make_rows(1), out, overwrite=True, **{option: tmp_path / path})
    assert engine.batches == []
    assert content is None or (tmp_path / path).read_bytes() == content


def test_the_jobs_state_goes_on_in_files_of_earlier_jobs(tmp_path, out):
    files = {"log_json": out / "job.jsonl", "prometheus": tmp_path / "job.prom"}
    (tmp_path / "job.prom").touch()
    (tmp_path / ".job.prom.tmp").write_text("left by a kill")
    for count in (1, 2):
        run(StubEngine(), make_rows(count), out, **files)
    assert len((out / "job.jsonl").read_text().splitlines()) == 2
    assert "ernie_accel_pictures_done_total 1" in (tmp_path / "job.prom").read_text()
    assert not (tmp_path / ".job.prom.tmp").exists()


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes in the file system")
def test_a_device_takes_the_log_and_is_not_replaced_by_a_file(tmp_path, out):
    with pytest.raises(BatchOutputError, match="'null' is not a file; choose another name"):
        run(StubEngine(), make_rows(1), out, prometheus="/dev/null")
    assert len(run(StubEngine(), make_rows(1), out, log_json="/dev/null")) == 1
    assert not Path("/dev/null").is_file()
    with pytest.raises(BatchOutputError, match="cannot be both the log and Prometheus' file"):
        run(StubEngine(), make_rows(1), out, log_json=tmp_path / "a", prometheus=tmp_path / "out" / ".." / "a")


@pytest.mark.parametrize("name", JOB_FILES)
def test_the_command_never_replaces_its_own_table(tmp_path, monkeypatch, name):
    loads = []
    monkeypatch.setattr(command, "_engine", lambda *_: loads.append(1))
    table = tmp_path / name
    table.write_bytes(b'{"prompt": "a mug"}\n' if name.endswith(".jsonl") else b"prompt\na mug\n")
    if name in REPORTS:
        table = table.rename(tmp_path / "t.csv")
        (tmp_path / name).symlink_to(table)
    before = table.read_bytes()
    job = plan_job(table, {"output_dir": tmp_path, "overwrite": True, "model": "a/b"})
    with pytest.raises(BatchOutputError, match=f"the job would replace its own table, '{name}'; rename the table"):
        command.run_job(job)
    assert table.read_bytes() == before
    assert loads == []


def test_the_command_refuses_reports_of_somebody_else_before_it_loads_a_model(tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(command, "_engine", lambda *_: (loads.append(1), StubEngine())[1])
    (tmp_path / "t.csv").write_bytes(b"prompt\na mug\n")
    (tmp_path / "report.html").write_bytes(MINE)
    given = {"output_dir": tmp_path, "model": "a/b"}
    with pytest.raises(BatchOutputError, match=r"'report\.html' exists, and is not as this job wrote it"):
        command.run_job(plan_job(tmp_path / "t.csv", given))
    assert loads == []
    assert command.run_job(plan_job(tmp_path / "t.csv", given | {"report": False})) == 0
    assert (tmp_path / "report.html").read_bytes() == MINE
    assert command.run_job(plan_job(tmp_path / "t.csv", given | {"overwrite": True})) == 0
    assert command.run_job(plan_job(tmp_path / "t.csv", given)) == 0
    assert b"<html" in (tmp_path / "report.html").read_bytes()


# What is lost


def moved(out):
    out.rename(out.parent / "away")


def replaced(out):
    moved(out)
    out.mkdir()


def deleted(folder):
    """Delete a folder in one step, so that what is being written does not keep it."""
    away = (folder if folder.name == "out" else folder.parent).with_name("deleted")
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


LOSSES = {
    "folder deleted": (deleted, "it was moved, deleted or replaced while the job ran; move it back"),
    "folder moved": (moved, "it was moved, deleted or replaced while the job ran; move it back"),
    "folder replaced": (replaced, "it was moved, deleted or replaced while the job ran; move it back"),
    "ledger deleted": (lambda out: (out / JOB_FOLDER / "ledger.sqlite").unlink(), "the job's ledger .* was deleted or"),
    "ledger's log deleted": (
        lambda out: (out / JOB_FOLDER / "ledger.sqlite-wal").unlink(),
        "the job's ledger .* was deleted or replaced",
    ),
    "job's folder deleted": (
        lambda out: shutil.rmtree(out / JOB_FOLDER),
        "the job's ledger .* was deleted or replaced",
    ),
    "sub-folder deleted": (
        lambda out: deleted(out / "mugs"),
        "'mugs/.*png' (first, were|was written, and) removed or changed by somebody else",
    ),
    "picture deleted": (
        lambda out: (out / "mugs/000.png").unlink(),
        "'mugs/000.png' was (written, and )?removed or changed by somebody",
    ),
    "picture cut": (
        lambda out: (out / "mugs/000.png").write_bytes(b""),
        "'mugs/000.png' was (written, and )?removed or changed by somebody else",
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_no_picture_is_claimed_that_is_no_file(out, loss):
    lose, message = LOSSES[loss]
    rows = in_folder(20)
    results = produce(after(5, lambda: lose(out)), rows, out, batch_size=2, progress=False)
    claimed = []

    def claim():
        for result in results:
            claimed.append(result.path.is_file())

    with pytest.raises(BatchOutputError, match=message):
        claim()
    assert claimed
    assert all(claimed) or "sub-folder" in loss or "picture" in loss  # that of the end looks at these
    if loss in ("folder moved", "folder replaced"):
        away = out.parent / "away"
        assert not out.exists() or list(out.iterdir()) == []
        if out.exists():
            out.rmdir()
        away.rename(out)
    overwrite = "ledger" in loss or "job's" in loss
    with open_job(out) if out.exists() else open_job(out.parent) as (_, ledger):
        done = {entry.path for entry in ledger.entries() if entry.state == "done"}
    there = {path for path in done if (out / path).is_file()}
    assert there == done or "sub-folder" in loss  # then the next run looks
    again = run(StubEngine(), rows, out, overwrite=overwrite)
    assert {result.row.path for result in again} == {row.path for row in rows} - there
    assert len(list((out / "mugs").iterdir())) == 20
    listed = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert {line["state"] for line in listed} == {"done"}


def test_without_a_ledger_finished_pictures_may_be_taken_away(out):
    taken = []
    for result in produce(StubEngine(), make_rows(6), out, resume=False, batch_size=1, progress=False):
        result.path.unlink()
        taken.append(result.row.path)
    assert sorted(taken) == sorted(row.path for row in make_rows(6))


def test_a_producer_whose_folder_is_gone_answers_everybody(out):
    submitted = threading.Event()
    producer = Producer(after(1, lambda: submitted.wait(30) and deleted(out)), out, batch_size=1)
    futures = [producer.submit(row) for row in make_rows(4)]
    submitted.set()
    errors = [future.exception(30) for future in futures]
    assert any(isinstance(error, BatchOutputError) and "moved, deleted or replaced" in str(error) for error in errors)
    producer.close()
    assert not out.exists()


def test_the_working_directory_may_change(out, elsewhere, monkeypatch):
    monkeypatch.chdir(out.parent)
    run(after(1, lambda: os.chdir(elsewhere)), in_folder(6), "out", batch_size=2, log_json="job.jsonl")
    assert len(list((out / "mugs").iterdir())) == 6
    assert (out.parent / "job.jsonl").is_file()
    assert list(elsewhere.iterdir()) == []


def test_a_picture_that_sifting_set_aside_is_where_its_row_says(out):
    rows = make_rows(2)

    class Blank(StubEngine):
        def render(self, requests, timeout_s=None):
            return [Image.new("RGB", (32, 32))] * len(requests)

    results = run(Blank(), rows, out, sift=Sift())
    assert [result.rejected for result in results] == [True, True]
    assert sorted(path.name for path in (out / "rejected").iterdir()) == ["000.png", "001.png"]


# The manifest


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1", "＝1", "'=1", "''-x"]
)
def test_no_text_is_a_formula_and_every_text_comes_back(text):
    cell = escaped(text)
    assert cell == f"'{text}"
    assert unescaped(cell) == text


@pytest.mark.parametrize("text", ["-5", "-5.25", "+7", "-1e-3", "-.5", "a=b", "'tis", "'", "", "1-2", "红=1"])
def test_numbers_and_other_text_stay_as_they_are(text):
    assert escaped(text) == text
    assert unescaped(text) == text


def test_a_manifest_opens_in_excel_runs_no_formula_and_can_be_read_back(out):
    texts = {"=cmd|' /C calc'!A0": "=HYPERLINK(1)", "weight": "-5", "note": '-soft; "x"\r\n', "q": "'=1"}
    rows = [replace(row, prompt="@mug, =1", columns=texts | {"sku": f"红{row.index}"}) for row in make_rows(2)]
    run(StubEngine(), rows, out)
    raw = (out / "manifest.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbfpath,state,line,prompt")
    with (out / "manifest.csv").open(encoding="utf-8-sig", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert {cell for cell in cells if cell[:1] and cell[0] in "=+-@\t\r"} == {"-5"}
    again = read_table(out / "manifest.csv", extra_columns=("batch_size",))
    assert [row.prompt for row in again] == ["@mug, =1"] * 2
    assert {name: again[0].columns[name] for name in texts} == texts
    for line in (out / "manifest.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        assert json.loads(line).items() >= texts.items()
