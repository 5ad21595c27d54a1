"""What a row costs does not grow with the number of rows: counted, not timed."""

from __future__ import annotations

import concurrent.futures
import json
import os
import sqlite3
import threading
import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from ernie_accel.batch import produce
from ernie_accel.batch.engines import Request
from ernie_accel.batch.input.formats import read_json
from ernie_accel.batch.input.task import Task, tasks_of
from ernie_accel.batch.line.schedule import BatchSizer, Schedule
from ernie_accel.batch.output import writer as writer_module
from ernie_accel.batch.output.folder import OutputFolder
from ernie_accel.batch.output.ledger import open_job
from ernie_accel.batch.output.manifest import write_manifest
from ernie_accel.batch.output.report import write_report
from ernie_accel.batch.output.writer import Writer
from tests.stub_engine import StubEngine, make_rows


class Pages(StubEngine):
    """Answers at once: the same small picture for every row."""

    def render(self, requests, timeout_s=None):
        return [Image.new("RGB", (16, 16))] * len(requests)


def run(rows, out, engine=None):
    return list(produce(engine or Pages(), rows, out, batch_size=4, progress=False))


def statements_of(monkeypatch, job):
    """Return how often each statement was run on any ledger while `job` runs."""
    counts = Counter()
    connect = sqlite3.connect

    def traced(*arguments, **options):
        database = connect(*arguments, **options)
        database.set_trace_callback(lambda text: counts.update([text.split()[0]]))
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        job()
    return counts


def test_statements_and_commits_per_row_are_constant(tmp_path, monkeypatch):
    few, many = (
        statements_of(monkeypatch, lambda count=count: run(make_rows(count), tmp_path / str(count)))
        for count in (100, 400)
    )
    assert few["INSERT"] - 100 == many["INSERT"] - 400  # one a row; the rest are settings
    assert few["UPDATE"] == 2 * 100  # running, then done
    assert many["UPDATE"] == 2 * 400
    assert few["SELECT"] == many["SELECT"]
    # At most two transactions a batch, beside those of the beginning and the end: each waits for the disk.
    for counts, rows in ((few, 100), (many, 400)):
        assert counts["COMMIT"] <= 2 * rows / 4 + 20


def test_a_resumed_job_looks_at_each_picture_twice_at_most(tmp_path, monkeypatch):
    rows = make_rows(200)
    run(rows, tmp_path)
    looks = Counter()

    def counting(look):
        def counted(path, *arguments, **options):
            looks.update([str(path)] if str(path).endswith(".png") else [])
            return look(path, *arguments, **options)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", counting(os.stat))
        patch.setattr(os, "lstat", counting(os.lstat))
        assert run(rows, tmp_path) == []
    assert len(looks) == 200
    assert max(looks.values()) == 2


def test_lines_of_a_json_array_are_counted_once(tmp_path):
    class Text(str):
        counted = 0

        def count(self, what, start=0, end=None):
            end = len(self) if end is None else end
            Text.counted += end - start
            return super().count(what, start, end)

    content = [{"prompt": f"cup {i}"} for i in range(500)]
    text = Text(json.dumps(content, indent=1))
    records = read_json(tmp_path / "t.json", text)
    assert [line for line, _ in records.rows] == [3 * i + 2 for i in range(500)]
    assert Text.counted <= len(text)


@pytest.mark.parametrize("sizes", [1, 7, 1000])
def test_each_bucket_is_looked_at_once_per_row_at_most(sizes, monkeypatch):
    tasks = [Task(row, Request(prompt="x", seed=row.index, steps=row.index % sizes)) for row in make_rows(1000)]
    looks = []
    sizer = Schedule.sizer
    monkeypatch.setattr(Schedule, "sizer", lambda self, key: (looks.append(key), sizer(self, key))[1])
    schedule = Schedule(lambda task: task.request.shape(), limit=4, start=4, probe=False)
    left, batches = list(tasks), []
    while left or len(schedule):
        while not (batch := schedule.next_batch(only_full=bool(left))) and left:
            some, left = left[:64], left[64:]
            schedule.add(some)
        batches.append(batch)
    assert sorted(task.row.index for batch in batches for task in batch) == list(range(1000))
    assert all(len({task.request.steps for task in batch}) == 1 for batch in batches)
    assert len(looks) <= 5 * 1000  # to look, to take and to remember


def test_the_manifest_and_the_report_take_little_more_memory_than_their_files(tmp_path):
    run([replace(row, prompt="a cup on a table " * 10) for row in make_rows(3000)], tmp_path)
    write_report(tmp_path)  # once unmeasured: it loads the template engine, which is not the report's size
    tracemalloc.start()
    try:
        with open_job(tmp_path) as (_, ledger):
            write_manifest(ledger)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        write_report(tmp_path)
        _, of_report = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (tmp_path / "manifest.jsonl").stat().st_size
    assert size > 3000 * 300
    assert peak < 1.5 * size
    assert of_report < 3_000_000  # the thumbnails and three numbers a row, not the rows


def test_a_reason_of_its_own_for_every_row_does_not_swell_the_report(tmp_path):
    class Failing(StubEngine):
        def render(self, requests, timeout_s=None):
            return [ValueError(f"no {request.seed}") for request in requests]

    run(make_rows(500), tmp_path, Failing())
    write_report(tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for report in (page, text):
        assert report.count("ValueError: no ") == 2 * 200
        assert "300 other reasons, see manifest.csv" in report
    assert len(page) < 50_000


def test_pictures_that_are_finished_while_the_writer_looks_do_not_end_the_job(tmp_path, monkeypatch):
    wait = concurrent.futures.wait
    # Every wait is over only once all pictures are written: the moment at which none is left to wait for.
    monkeypatch.setattr(concurrent.futures, "wait", lambda futures, **_: wait(futures))
    writer = Writer(OutputFolder(tmp_path), {}, threads=2, ahead=1)
    for task in tasks_of(make_rows(6), 0):
        writer.submit(task, Image.new("RGB", (64, 64)), batch_size=1, start=0.0)
    writer.close()
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_the_engine_does_not_wait_until_half_of_a_large_batch_is_written(tmp_path):
    """Room for two batches: the second is rendered while the first is still being written."""
    second = threading.Event()

    class Large(StubEngine):
        def render(self, requests, timeout_s=None):
            if self.batches:
                second.set()
            return super().render(requests, timeout_s)

    encode = writer_module.encode_png

    def wait_and_encode(*arguments):
        assert second.wait(30), "the second batch waits for files of the first"
        return encode(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "encode_png", wait_and_encode)
        results = list(produce(Large(max_batch=32), make_rows(64), tmp_path, batch_size=32, progress=False))
    assert [result.error for result in results] == [None] * 64


def test_a_bucket_begins_with_the_size_that_one_like_it_has_found(tmp_path, monkeypatch):
    class Lengths(StubEngine):
        def bucket(self, request):
            return (request.shape(), request.seed // 60)  # as of two lengths of prompts

    succeeded = BatchSizer.succeeded
    # A batch takes as long as one picture, by a clock that no other process slows down: the largest pays.
    monkeypatch.setattr(BatchSizer, "succeeded", lambda self, count, _: succeeded(self, count, 1.0))
    engine = Lengths(max_batch=4)
    list(produce(engine, make_rows(120), tmp_path, progress=False))
    first, second = ([len(batch) for batch in engine.batches if batch[0].seed // 60 == length] for length in (0, 1))
    assert first[:5] == [1, 1, 2, 2, 4]
    assert set(second) == {4}
