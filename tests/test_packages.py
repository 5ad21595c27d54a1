"""Libraries that are imported while a pipe is read share one look at what is installed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
import sys
import textwrap

import pytest

import ernie_accel
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
