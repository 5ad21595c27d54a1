"""Python's search for garbage is off while a pipe is loaded; afterwards it finds what it found before."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from types import ModuleType

import pytest

import ernie_accel
from ernie_accel.common.collecting import without_collecting
from tests.pipelines import tiny_ernie


def test_the_last_of_several_loads_turns_the_search_for_garbage_on_again():
    assert gc.isenabled()
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    try:
        first.enter_context(without_collecting())
        second.enter_context(without_collecting())
        first.close()
        assert not gc.isenabled()
        second.close()
        assert gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("imported", "fails", "frozen", "generation"),
    [(100, False, False, 2), (99, False, False, 0), (100, True, False, 0), (100, False, True, 0)],
)
def test_what_imports_leave_is_old_unless_they_failed_or_somebody_froze_objects(
    imported, fails, frozen, generation, monkeypatch
):
    gc.unfreeze()
    gc.collect()
    try:
        if frozen:
            gc.freeze()
        count = gc.get_freeze_count()
        with contextlib.suppress(KeyboardInterrupt), without_collecting():
            made = [[]]
            for number in range(imported):
                monkeypatch.setitem(sys.modules, f"imported_{number}", ModuleType("imported"))
            if fails:
                raise KeyboardInterrupt
        assert any(each is made for each in gc.get_objects(generation))
        assert gc.get_freeze_count() <= count  # those that ended meanwhile are gone
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.freeze()  # as `collected` has it


def test_loaded_pipes_that_were_dropped_are_found_soon(tmp_path):
    pipe = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks())
    saved, threshold, pipes, most = ernie_accel.save(pipe, tmp_path / "saved"), gc.get_threshold(), [], 0
    del pipe
    ernie_accel.load(saved)  # imports what is missing
    gc.unfreeze()
    try:
        gc.set_threshold(700, 10, 10)  # Python's defaults
        for _ in range(10):
            pipes.append(weakref.ref(ernie_accel.load(saved)))
            between = [[] for _ in range(20_000)]
            most = max(most, sum(pipe() is not None for pipe in pipes))
            del between
    finally:
        gc.set_threshold(*threshold)
        gc.freeze()  # as `collected` has it
    assert most <= 3
