"""Jobs that are killed, interrupted, raced, damaged, moved and led astray: a message, or the right pictures."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ernie_accel.batch import BatchOutputError, produce, read_table
from ernie_accel.batch.output.ledger import JOB_FOLDER
from ernie_accel.batch.output.report import write_report
from ernie_accel.core.errors import ErnieAccelError
from tests.attack import SEED, rounds
from tests.attack.test_interrupts import interrupted_at, lines_of
from tests.stub_engine import StubEngine, make_rows

ROWS = [replace(row, folder=("", "mugs")[row.index % 2]) for row in make_rows(16)]
LEDGER = f"{JOB_FOLDER}/ledger.sqlite"
WAYS_OUT = ("choose another output", "overwriting", "run again", "move it back", "wait for it")
MEMORY = Path("/dev/shm")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where the system has such: these attacks wait for the disk and nothing else."""
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, and takes folders away while they are open")


def make(out: Path, engine: StubEngine | None = None, **options):
    return list(produce(engine or StubEngine(), ROWS, out, batch_size=2, progress=False, **options))


def pictures(out: Path) -> dict[str, bytes]:
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.png"))}
    return {name: data for name, data in found.items() if not name.startswith("rejected/")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    make(out)
    return pictures(out)


@pytest.fixture(scope="module")
def half_done(tmp_path_factory) -> Path:
    """The folder of a job as a kill leaves it: with rows of every state, and SQLite's log not merged."""
    out, copy = (tmp_path_factory.mktemp(name) / "out" for name in ("half", "copy"))

    def before(requests, number):
        if number == 5:
            shutil.copytree(out, copy)
        if any(request.seed == 3 for request in requests):
            raise ValueError("flaky")

    make(out, StubEngine(before))
    assert (copy / f"{LEDGER}-wal").stat().st_size > 0
    return copy


def assert_whole(out: Path, undisturbed: dict[str, bytes]) -> None:
    """Raise unless the folder holds just what a job leaves that was left alone, and its manifest says so."""
    assert pictures(out) == undisturbed
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    said = [(line["path"], line["state"], line["prompt"], line["seed"], line["bytes"], line["error"]) for line in lines]
    assert said == [(row.path, "done", row.prompt, row.index, len(undisturbed[row.path]), None) for row in ROWS]
    assert not list(out.rglob("*.tmp"))


def check_pictures(out: Path, undisturbed: dict[str, bytes]) -> None:
    """Raise if a picture is not what it must be; some may be missing."""
    assert all(data == undisturbed[name] for name, data in pictures(out).items())


def check_message(error: Exception) -> None:
    """Raise unless an error is short and says what to do."""
    assert any(way in str(error) for way in WAYS_OUT), error
    assert len(str(error)) < 8000, error


def run_program(name: str, *arguments: object) -> str:
    command = [sys.executable, "-m", f"tests.{name}", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


# Kills and starts


@posix
def test_jobs_that_are_killed_at_random_moments_lose_nothing_and_make_nothing_twice(tmp_path):
    kills = rounds(30, 400)
    assert run_program("kill_job", tmp_path, kills, SEED).startswith(f"{kills} kills over ")


@posix
def test_of_jobs_that_start_at_once_one_works_and_the_others_say_so(tmp_path):
    jobs, rivals = rounds(2, 30), 8
    said = Counter(json.loads(run_program("rival_jobs", tmp_path, jobs, rivals)))
    worked = said.pop("exit code 0")
    refused = said.pop("another process is working on this job; wait for it, or choose another output")
    assert (said, worked + refused) == (Counter(), jobs * rivals)


# Interrupts


def test_ctrl_c_at_any_line_leaves_a_job_that_goes_on(tmp_path, undisturbed):
    """Also at lines that close what is open: as at any other, the pictures are there or made again."""
    draw = random.Random(SEED)

    def job(out, engine=None):
        make(out, engine, retries=1)
        write_report(out)

    def flaky():
        failing = [3]

        def before(requests, number):
            if any(request.seed in failing for request in requests) and len(requests) == 1:
                failing.clear()
                raise ValueError("flaky")

        return StubEngine(before)

    job(tmp_path / "warm", flaky())  # what is imported once is no part of a job
    hits = lines_of(lambda: job(tmp_path / "traced", flaky()))
    places = [(place, hit) for place, count in hits.items() for hit in {1, count, draw.randint(1, count)}]
    places = [each for each in places if "/batch/" in each[0][0] or each[0][0].endswith("atomic.py")]
    draw.shuffle(places)
    interrupted = 0
    for number, (place, hit) in enumerate(places[: rounds(8, 300)]):
        out = tmp_path / str(number)
        interrupted += interrupted_at(place, hit, lambda out=out: job(out, flaky()))
        gc.collect()  # an interrupt right before a `with` closes what it holds leaves that to the collector
        try:
            job(out)
            assert_whole(out, undisturbed)
        except (ErnieAccelError, AssertionError) as error:
            raise AssertionError(f"after an interrupt at {place}, the {hit}th time") from error
        shutil.rmtree(out)
    assert interrupted > 0.7 * number  # the rest are lines of threads' timing, which did not come again


# Damaged ledgers


def flip(ledger: Path, draw: random.Random) -> None:
    data = bytearray(ledger.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 3, 30))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    ledger.write_bytes(data)


def flip_log(ledger: Path, draw: random.Random) -> None:
    flip(ledger.with_name(f"{ledger.name}-wal"), draw)


def overwrite_part(ledger: Path, draw: random.Random) -> None:
    data = bytearray(ledger.read_bytes())
    start = draw.randrange(len(data))
    data[start : start + 512] = draw.choice((bytes(512), draw.randbytes(512)))
    ledger.write_bytes(data)


def truncate(ledger: Path, draw: random.Random) -> None:
    ledger.write_bytes(ledger.read_bytes()[: draw.randrange(ledger.stat().st_size)])


def truncate_log(ledger: Path, draw: random.Random) -> None:
    truncate(ledger.with_name(f"{ledger.name}-wal"), draw)


def remove_log(ledger: Path, draw: random.Random) -> None:
    ledger.with_name(f"{ledger.name}-wal").unlink()


def remove_ledger(ledger: Path, draw: random.Random) -> None:
    ledger.unlink()


def no_database(ledger: Path, draw: random.Random) -> None:
    ledger.write_bytes(draw.choice((b"", b"x", b"prompt\na mug\n", draw.randbytes(5000), bytes(8192))))


STATEMENTS = (
    "DROP TABLE rows",
    "DROP TABLE settings",
    "DROP TABLE files",
    "ALTER TABLE rows DROP COLUMN error",
    "ALTER TABLE rows RENAME COLUMN state TO status",
    "ALTER TABLE rows ADD COLUMN more",
    "CREATE TABLE more (x)",
    "DELETE FROM rows WHERE rowid % 3 = 0",
    "DELETE FROM settings",
    "DELETE FROM files",
    "UPDATE rows SET state='finished'",
    "UPDATE rows SET state='done'",
    "UPDATE rows SET state='pending'",
    "UPDATE rows SET seed='x'",
    "UPDATE rows SET seed=NULL, bytes='many'",
    "UPDATE rows SET request='{', columns='[]'",
    "UPDATE rows SET path='../' || path",
    "UPDATE rows SET error=x'ff00'",
    "UPDATE rows SET line='x', hash=5",
    "UPDATE rows SET checksum=NULL",
    "UPDATE settings SET value='other'",
    "UPDATE settings SET value=x'ff00ff'",
    "PRAGMA user_version=0",
    "PRAGMA user_version=1",
    "PRAGMA user_version=77",
    "PRAGMA journal_mode=DELETE",
)


def change(ledger: Path, draw: random.Random) -> None:
    with closing(sqlite3.connect(ledger)) as database, database, suppress(sqlite3.OperationalError):
        database.execute(draw.choice(STATEMENTS))  # an older SQLite cannot drop columns


def another_program(ledger: Path, draw: random.Random) -> None:
    ledger.unlink()
    remove_log(ledger, draw)
    with closing(sqlite3.connect(ledger)) as database, database:
        database.execute(
            draw.choice(("CREATE TABLE rows (path)", "CREATE TABLE bookmarks (url)", "CREATE VIEW rows AS SELECT 1"))
        )
        database.execute(f"PRAGMA user_version={draw.choice((0, 1, 2))}")


def content_of(ledger: Path) -> list[tuple[object, ...]]:
    """Return the rows of a ledger, or the tables of another database; nothing of what cannot be read."""
    with TemporaryDirectory() as copy:  # to look is to change: SQLite merges its log
        shutil.copytree(ledger.parent, copy, dirs_exist_ok=True)
        with closing(sqlite3.connect(Path(copy, ledger.name))) as database:
            for statement in ("SELECT * FROM rows ORDER BY path", "SELECT * FROM sqlite_master"):
                with suppress(sqlite3.Error):
                    return list(database.execute(statement))
    return []


DAMAGES = (
    *(flip,) * 6,
    *(change,) * 6,
    *(overwrite_part,) * 2,
    flip_log,
    truncate,
    truncate_log,
    remove_log,
    remove_ledger,
    no_database,
    another_program,
)


def test_a_damaged_ledger_ends_in_a_message_or_in_the_right_pictures(tmp_path, half_done, undisturbed):
    draw = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    for number in range(rounds(42, 1500)):
        out = tmp_path / str(number)
        shutil.copytree(half_done, out)
        damage = DAMAGES[number % len(DAMAGES)]
        damage(out / LEDGER, draw)
        content = content_of(out / LEDGER)
        try:
            try:
                make(out)
            except ErnieAccelError as error:
                outcomes["message"] += 1
                check_message(error)
                check_pictures(out, undisturbed)
                # The way out: without the ledger all is made again, and what was in the way is not lost.
                shutil.move(out / JOB_FOLDER, tmp_path / f"ledger-{number}")
                assert content_of(tmp_path / f"ledger-{number}" / "ledger.sqlite") == content
                make(out, overwrite=True)
            else:
                outcomes["pictures"] += 1
            write_report(out)
            assert_whole(out, undisturbed)
        except Exception as error:
            raise AssertionError(f"round {number}: {damage.__name__} ({traceback.format_exc()})") from error
        shutil.rmtree(out)
    assert outcomes["message"] > 5
    assert outcomes["pictures"] > 5


# Folders and ledgers that vanish


def deleted(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def moved(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.rename(path.with_name(f"{path.name}.moved"))


def replaced(path: Path) -> None:
    moved(path)
    with suppress(FileExistsError):
        path.write_bytes(b"mine") if path.suffix else path.mkdir()


def come_back(out: Path) -> None:
    """Move back what was moved away."""
    for path in sorted(out.parent.rglob("*.moved")):
        deleted(path.with_suffix(""))
        path.rename(path.with_suffix(""))


LOST = ("", "mugs", JOB_FOLDER, LEDGER, f"{LEDGER}-wal", "000.png", "mugs/001.png", "mugs/009.png", "manifest.csv")


@posix
def test_what_vanishes_while_a_job_runs_is_never_claimed(tmp_path, undisturbed):
    draw = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    for number in range(rounds(40, 1000)):
        out = tmp_path / str(number) / "out"
        lost, vanish = draw.choice(LOST), draw.choice((deleted, moved, replaced))
        when = draw.randint(1, 8)

        def before(requests, call, out=out, lost=lost, vanish=vanish, when=when):
            if call == when:
                vanish(out / lost)

        claims: list[str] = []
        try:
            try:
                for result in produce(StubEngine(before), ROWS, out, batch_size=2, progress=False):
                    claims.append(result.row.path)
                    if not lost or "sqlite" in lost or lost == JOB_FOLDER:
                        assert result.path.is_file(), result.row.path
            except BatchOutputError as error:
                outcomes["message"] += 1
                check_message(error)
            else:
                outcomes["pictures"] += 1
                assert_whole(out, undisturbed)
            come_back(out)
            try:
                make(out)
            except ErnieAccelError as error:
                check_message(error)
                make(out, overwrite=True)
            assert_whole(out, undisturbed)
        except Exception as error:
            what = f"{vanish.__name__} {lost or 'the folder'} before batch {when}"
            raise AssertionError(f"round {number}: {what} ({traceback.format_exc()})") from error
        shutil.rmtree(out.parent)
    assert outcomes["message"] > 5


# Links


@posix
def test_links_that_come_and_go_while_a_job_runs_lead_nothing_out(tmp_path, undisturbed):
    """Somebody changes a folder for a link and back, as fast as they can."""
    for number in range(rounds(6, 150)):
        out, elsewhere = tmp_path / str(number), tmp_path / f"elsewhere-{number}"
        elsewhere.mkdir()
        out.mkdir()
        name = ("mugs", "rejected", JOB_FOLDER)[number % 3]
        (out / "link").symlink_to(elsewhere)
        over = threading.Event()

        def swap(out=out, name=name, over=over):
            while not over.is_set():
                with suppress(OSError):
                    (out / name).rename(out / "aside")
                with suppress(OSError):
                    (out / "link").rename(out / name)
                time.sleep(0.0003)
                with suppress(OSError):
                    (out / name).rename(out / "link")
                with suppress(OSError):
                    (out / "aside").rename(out / name)
                time.sleep(0.001)

        attacker = threading.Thread(target=swap)
        attacker.start()
        said = ""
        try:
            make(out, StubEngine(seconds=0.002), overwrite=True, sift=None)
        except ErnieAccelError as error:
            said = str(error)
        finally:
            over.set()
            attacker.join()
        assert list(elsewhere.iterdir()) == [], said
        assert not said or any(way in said for way in WAYS_OUT), said


# Signals


SLOW_JOB = """
import sys
from pathlib import Path
from ernie_accel.cli import batch as command
from ernie_accel.batch.input.job import plan_job
from tests.stub_engine import StubEngine
command._engine = lambda job, facts: StubEngine(lambda *_: print("rendering", flush=True), seconds=0.05)
command._note_run = lambda job: None  # it loads torch
given = dict(output_dir=Path(sys.argv[2]), model="a/b", preset="exact", batch_size=1, report=False)
sys.exit(command.run_job(plan_job(Path(sys.argv[1]), given)))
"""


@posix
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_finishes_the_batch_and_the_same_command_goes_on(tmp_path, number):
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text("prompt\n" + "".join(f"cup {i}\n" for i in range(100)))  # 5 s
    command = [sys.executable, "-c", SLOW_JOB, str(table), str(out)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for _ in range(3):
        assert job.stdout.readline() == "rendering\n"
    job.send_signal(number)
    said, told = job.communicate(timeout=60)
    assert job.returncode == 128 + number, told
    assert "Interrupted; run the same command again to resume." in told
    made = len(list(out.glob("*.png")))
    assert 3 <= made < 100
    assert f"{made} succeeded, 0 failed" in said
    engine = StubEngine()
    assert len(list(produce(engine, read_table(table), out, facts={"model": "a/b", "preset": "exact"}))) == 100 - made
    assert len(list(out.glob("*.png"))) == 100
