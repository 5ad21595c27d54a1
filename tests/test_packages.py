"""Libraries that are imported while a pipe is read share one look at what is installed."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import itertools
import subprocess
import sys
import textwrap
import threading
from unittest import mock

import pytest

import ernie_accel
from ernie_accel.common import packages
from ernie_accel.common.packages import packages_looked_up_once
from tests.pipelines import tiny_ernie


@pytest.fixture
def looks(monkeypatch):
    """Each time somebody looks at what is installed."""
    found = []

    def look() -> dict[str, list[str]]:
        found.append(None)
        return {"PIL": ["pillow"], "torch": ["torch"]}

    monkeypatch.setattr(importlib.metadata, "packages_distributions", look)
    return found


def test_it_is_looked_up_once_within_a_block_and_each_caller_has_a_copy(looks):
    before = importlib.metadata.packages_distributions
    with packages_looked_up_once():
        first, second = (importlib.metadata.packages_distributions() for _ in range(2))
        first["PIL"].append("changed")
        first.clear()
        assert second == importlib.metadata.packages_distributions() == {"PIL": ["pillow"], "torch": ["torch"]}
    assert len(looks) == 1
    assert importlib.metadata.packages_distributions is before
    with packages_looked_up_once():  # something may have been installed meanwhile
        importlib.metadata.packages_distributions()
    assert len(looks) == 2


def test_the_last_of_several_blocks_restores_it_whatever_fails_within(looks):
    before = importlib.metadata.packages_distributions
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(packages_looked_up_once())
    second.enter_context(packages_looked_up_once())
    importlib.metadata.packages_distributions()
    first.close()
    importlib.metadata.packages_distributions()
    assert len(looks) == 1
    second.close()
    assert importlib.metadata.packages_distributions is before
    with pytest.raises(KeyboardInterrupt), packages_looked_up_once():
        raise KeyboardInterrupt
    assert importlib.metadata.packages_distributions is before


def test_what_somebody_else_put_there_meanwhile_stays(looks, monkeypatch):
    other = dict
    with packages_looked_up_once():
        monkeypatch.setattr(importlib.metadata, "packages_distributions", other)
    assert importlib.metadata.packages_distributions is other


def test_a_function_that_a_library_kept_for_later_looks_again(looks):
    with packages_looked_up_once():
        kept = importlib.metadata.packages_distributions
        kept()
        kept()
    assert len(looks) == 1
    kept()
    kept()  # something may have been installed meanwhile
    assert len(looks) == 3
    with packages_looked_up_once():
        importlib.metadata.packages_distributions()
        kept()
    assert len(looks) == 5


def test_a_thread_that_looks_while_the_block_ends_leaves_nothing_behind(monkeypatch):
    looking, ends, looks = threading.Event(), threading.Event(), []

    def look() -> dict[str, list[str]]:
        looks.append(None)
        looking.set()
        assert ends.wait(timeout=10)
        return {}

    monkeypatch.setattr(importlib.metadata, "packages_distributions", look)
    with packages_looked_up_once():
        kept = importlib.metadata.packages_distributions
        thread = threading.Thread(target=kept)
        thread.start()
        assert looking.wait(timeout=10)
    ends.set()
    thread.join()
    kept()
    assert len(looks) == 2


def test_a_library_that_wraps_what_it_finds_there_can_be_asked_in_later_blocks(looks, monkeypatch):
    with packages_looked_up_once():
        first = importlib.metadata.packages_distributions
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: first())
    with packages_looked_up_once():
        assert importlib.metadata.packages_distributions() == {"PIL": ["pillow"], "torch": ["torch"]}


@pytest.fixture
def installed(tmp_path):
    """A distribution that declares no packages, some of whose files are gone."""
    about = tmp_path / "some_thing-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-thing\nVersion: 1.0\n\nText\nName: no\n")
    there = ["thing/__init__.py", "thing/a, b.txt", "single.py", "native.abi3.so", "no_suffix", "partly/second.py"]
    gone = ["gone/__init__.py", "gone.py", "partly/first.py"]
    outside = ["../../bin/thing", "some_thing-1.0.dist-info/METADATA", "some_thing-1.0.dist-info/RECORD"]
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with (about / "RECORD").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows((name, "sha256=0", "1") for name in [*there, *gone, *outside])
    return importlib.metadata.Distribution.at(about)


@pytest.mark.parametrize("later", [False, True])
def test_packages_are_those_with_a_file_that_is_there(later, installed, monkeypatch):
    monkeypatch.delattr(importlib.metadata, "_get_toplevel_name", raising=False)
    if later:
        monkeypatch.setattr(importlib.metadata, "_get_toplevel_name", None, raising=False)
    found = sorted(packages._inferred(installed))
    assert found == ["native", *(["no_suffix"] if later else []), "partly", "single", "thing"]


#: What Python's own function looks for differs before 3.12, where it is fast.
SAME = pytest.mark.skipif(sys.version_info < (3, 12), reason="Python's own function looks for other files")


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(None, marks=SAME),
        OSError("no such folder"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        KeyError("Name"),
        TypeError("no text"),
        AttributeError("_top_level_inferred"),
        csv.Error("field larger than field limit"),
    ],
    ids=lambda odd: type(odd).__name__,
)
def test_it_says_what_pythons_own_function_says(odd, installed, monkeypatch):
    some = [installed, *itertools.islice(importlib.metadata.distributions(), 40)]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(some))
    monkeypatch.setattr(packages, "_LOOKS_FOR_ALL_FILES", True)
    quick, inferred = mock.Mock(wraps=packages._looked_up), mock.Mock(wraps=packages._inferred, side_effect=odd)
    monkeypatch.setattr(packages, "_looked_up", quick)
    monkeypatch.setattr(packages, "_inferred", inferred)
    with packages_looked_up_once():
        assert importlib.metadata.packages_distributions() == packages._STANDARD()
    assert quick.call_count == 1
    assert inferred.called


def test_a_load_in_a_fresh_process_looks_once(tmp_path):
    ernie_accel.save(tiny_ernie(), tmp_path / "saved")
    code = f"""
        import importlib.metadata as metadata
        looks, look = [], metadata.packages_distributions
        def counted():
            looks.append(None)
            return look()
        metadata.packages_distributions = counted
        import torch, ernie_accel
        looks.clear()
        ernie_accel.load({str(tmp_path / "saved")!r})
        assert metadata.packages_distributions is counted
        print(len(looks))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "1"
