"""Threads that read and verify are as many as this process's cores allow, and never more than help."""

from __future__ import annotations

import os

import pytest

import ernie_accel
from ernie_accel.common import cores
from ernie_accel.storage import manifest, read_ahead
from tests.pipelines import tiny_ernie


@pytest.mark.parametrize(("has_affinity", "expected"), [(True, 3), (False, 192)])
def test_cores_are_those_that_this_process_may_use(has_affinity, expected, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    if has_affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7}, raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores.cores() == expected


@pytest.mark.parametrize(("available", "threads"), [(1, 2), (16, 4), (192, 8)])
def test_a_quarter_of_the_cores_reads_and_as_many_verify_while_a_pipe_is_loaded(
    available, threads, tmp_path, monkeypatch
):
    folder, used = ernie_accel.save(tiny_ernie(), tmp_path / "saved"), []
    checking, reader = manifest.Checking, read_ahead.ParallelReader
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(available)), raising=False)
    monkeypatch.setattr(
        manifest, "Checking", lambda files, threads: (used.append(threads), checking(files, threads))[1]
    )
    monkeypatch.setattr(read_ahead, "ParallelReader", lambda *args: (used.append(args[2]), reader(*args))[1])
    ernie_accel.load(folder)
    assert len(used) > 1
    assert set(used) == {threads}
