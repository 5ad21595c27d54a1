"""A folder is replaced as a whole: killed or interrupted at any line, its name leads to the old content or the new."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_accel.storage import folders
from ernie_accel.storage.folders import current, exchange, replace_folder

SOURCE = folders.__file__


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Neither a kill nor an interrupt loses what the system holds; only a power cut would, which no test makes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def exchanges(request, monkeypatch):
    """Let the system exchange names, or be one that cannot."""
    if not request.param:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    return request.param


def write(text):
    def do(folder):
        (folder / "part").mkdir()
        (folder / "part" / "content").write_text(text)

    return do


def content(folder):
    return (current(folder) / "part" / "content").read_text()


def beside(folder):
    return sorted(path.name for path in folder.parent.iterdir())


def stop_at(number, stop, do):
    """Call `stop` before the line that runs as the `number`-th in folders.py; return whether it came to that."""
    left = number

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != SOURCE:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                stop()
        return trace

    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(None)
    return left <= 0


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def killed_at(number, do):
    """Do something in a process that is killed at a line; return whether it came to that."""
    process = os.fork()
    if not process:
        with contextlib.suppress(BaseException):
            stop_at(number, kill, do)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def all_lines(stopped_at):
    """Call `stopped_at` with 1, 2, 3 ... until it says that there are no more lines."""
    number = 1
    while stopped_at(number):
        number += 1
    return number - 1


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_a_kill_at_any_line_leaves_the_old_content_or_the_new(there, exchanges, tmp_path):
    """In a process without torch, which forks in a tenth of the time."""
    code = "import sys; from tests.test_folder_switch import kill_at_all_lines; kill_at_all_lines(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path), *("yes" if each else "" for each in (there, exchanges))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 30


def kill_at_all_lines(parent, there, exchanges):
    """Replace a folder in `parent`, killed at one line after the other, and print how many there were."""
    os.fsync = lambda descriptor: None  # as in `no_waiting_for_the_disk`
    if not exchanges:
        folders.exchange = lambda one, other: False
    folder = Path(parent) / "saved"

    def round_of(number):
        if there:
            replace_folder(folder, write("old"))
        elif folder.exists():
            shutil.rmtree(folder)
        was_killed = killed_at(number, lambda: replace_folder(folder, write("new")))
        if there or current(folder).exists():
            assert content(folder) in (("old", "new") if there else ("new",)), number
        if was_killed:
            replace_folder(folder, write("next"))  # puts back, and clears up
            assert (content(folder), beside(folder)) == ("next", ["saved"]), number
        return was_killed

    print(all_lines(round_of))


@pytest.mark.parametrize("exchanges", [True, False], indirect=True, ids=["exchange", "two renames"])
def test_an_interrupt_at_any_line_leaves_the_old_content_or_the_new(exchanges, tmp_path):
    folder = tmp_path / "saved"

    def round_of(number):
        replace_folder(folder, write("old"))
        try:
            return stop_at(number, interrupt, lambda: replace_folder(folder, write("new")))
        except KeyboardInterrupt:
            assert content(folder) in ("old", "new"), number
            return True

    assert all_lines(round_of) > 30
    replace_folder(folder, write("next"))
    assert beside(folder) == ["saved"]


@pytest.mark.parametrize("exchanges", [True, False], indirect=True, ids=["exchange", "two renames"])
def test_an_error_while_writing_leaves_no_trace(exchanges, tmp_path):
    def fail(folder):
        write("half")(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(tmp_path / "saved", fail)
    assert list(tmp_path.iterdir()) == []
    replace_folder(tmp_path / "saved", write("old"))
    with pytest.raises(OSError, match="disk full"):
        replace_folder(tmp_path / "saved", fail)
    assert (content(tmp_path / "saved"), beside(tmp_path / "saved")) == ("old", ["saved"])


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    def write_while_another_finishes(folder):
        write("slow")(folder)
        replace_folder(tmp_path / "saved", write("fast"))
        assert (folder / "part" / "content").read_text() == "slow"

    replace_folder(tmp_path / "saved", write("old"))
    replace_folder(tmp_path / "saved", write_while_another_finishes)
    assert (content(tmp_path / "saved"), beside(tmp_path / "saved")) == ("slow", ["saved"])


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    replace_folder(tmp_path / "v1", write("old"))
    (tmp_path / "latest").symlink_to("v1")
    replace_folder(tmp_path / "latest", write("new"))
    assert (tmp_path / "latest").is_symlink()
    assert (content(tmp_path / "v1"), beside(tmp_path / "v1")) == ("new", ["latest", "v1"])
    (tmp_path / "v1").rename(tmp_path / ".v1.ernie_accel.old")  # as a kill between two renames leaves it
    assert content(tmp_path / "latest") == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_names_are_exchanged_in_one_step_here(tmp_path):
    """If this fails, the tests above go one way twice."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "nothing")


def test_others_folders_beside_it_stay(tmp_path):
    mine = [".saved.old", ".saved.unfinished", "saved.ernie_accel.old", ".other.0123456789abcdef.unfinished"]
    for name in mine:
        (tmp_path / name).mkdir()
    for text in ("old", "new"):
        replace_folder(tmp_path / "saved", write(text))
    assert beside(tmp_path / "saved") == sorted([*mine, "saved"])


def test_all_of_a_folder_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    synced, switch = set(), folders._switch

    def checked(new, folder):
        assert {path.stat().st_ino for path in (new, *new.rglob("*"))} <= synced
        switch(new, folder)

    def write(folder):
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_bytes(b"1")

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(folders, "_switch", checked)
    folders.replace_folder(tmp_path / "saved", write)
    assert (tmp_path / "saved" / "part" / "weights").read_bytes() == b"1"


@pytest.mark.parametrize("name", [".", "", "/"])
def test_a_folder_without_a_name_is_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert current(Path(name)) == Path(name)
