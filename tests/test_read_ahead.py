"""A saved folder's weights arrive while the rest of loading goes on; nothing else changes, and nothing stays behind."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.storage import read_ahead, reading
from ernie_accel.storage.manifest import WEIGHTS
from ernie_accel.storage.parallel_read import ParallelReader
from ernie_accel.storage.read_ahead import ReadAhead
from ernie_accel.storage.tensor_file import write_tensors
from tests.pipelines import tiny_ernie
from tests.test_saving import assert_same_bits, bits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return ernie_accel.save(tiny_ernie(), tmp_path_factory.mktemp("read ahead") / "saved")


class _Watch:
    """Notes what is read, and lets a test wait for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes, self.tensors = 0, []
        self._changed = threading.Condition()
        read = ParallelReader._read

        def watched(reader: ParallelReader, pieces: list[torch.Tensor], start: int) -> None:
            read(reader, pieces, start)
            with self._changed:
                self.nbytes += sum(piece.numel() for piece in pieces)
                self.tensors += map(weakref.ref, pieces)
                self._changed.notify_all()

        monkeypatch.setattr(ParallelReader, "_read", watched)

    def wait_for(self, nbytes: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.nbytes >= nbytes, timeout=60)


def readers() -> list[str]:
    """Return the names of threads that are still at work."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ernie-accel-read")]


def ended() -> bool:
    """Return whether threads with nothing left to do have ended by themselves."""
    until = time.monotonic() + 10
    while readers() and time.monotonic() < until:
        time.sleep(0.01)
    return not readers()


def nbytes_of(folder: Any) -> int:
    files = [ParallelReader(file, "cpu") for file in folder.rglob(f"*{WEIGHTS}")]
    return sum(stored.nbytes for file in files for stored in file.tensors.values())


def test_all_weights_arrive_before_the_folder_is_vetted(saved, monkeypatch):
    watch, expected = _Watch(monkeypatch), bits(ernie_accel.load(saved))
    first, vet, arrived = watch.nbytes, reading.vet, []
    monkeypatch.setattr(
        reading, "vet", lambda *args: (arrived.append(watch.wait_for(first + nbytes_of(saved))), vet(*args))[1]
    )
    again = ernie_accel.load(saved)
    assert arrived == [True]
    assert watch.nbytes == 2 * first  # each is read once
    assert_same_bits(bits(again), expected)
    assert ended()


def test_what_was_read_for_nothing_is_dropped(saved, monkeypatch):
    watch = _Watch(monkeypatch)

    def refuse(*args: object) -> None:
        assert watch.wait_for(nbytes_of(saved))
        raise SavedPipelineError(saved, "names what is not data")

    monkeypatch.setattr(reading, "vet", refuse)
    with pytest.raises(SavedPipelineError, match="names what is not data"):
        ernie_accel.load(saved)
    assert not readers()
    assert watch.tensors and not any(tensor() is not None for tensor in watch.tensors)


def test_weights_that_a_plan_places_are_not_read_ahead(saved, monkeypatch):
    watch = _Watch(monkeypatch)
    machine = ernie_accel.Context.detect(device="cpu")
    pipe, _ = reading.read(saved, (), machine, None)
    assert watch.nbytes == 0
    assert_same_bits(bits(pipe), bits(ernie_accel.load(saved)))


@pytest.mark.parametrize("device", [None, "meta"])
def test_unsupported_devices_are_left_alone(device, saved):
    file = saved / "transformer" / WEIGHTS
    with ReadAhead([file], device) as ahead:
        assert ahead.opened(file) is None
        assert not readers()


def test_out_of_memory_raises_the_same_error_as_without_reading_ahead(saved, monkeypatch):
    second = sorted(saved.rglob(f"*{WEIGHTS}"), key=lambda file: -file.stat().st_size)[1]  # the largest comes first
    start = ParallelReader.start

    def full(reader: ParallelReader, names: Iterable[str]) -> None:
        if reader._file == second:
            raise torch.OutOfMemoryError("the device is full")
        start(reader, names)

    def error() -> str:
        with pytest.raises(SavedPipelineError, match="OutOfMemoryError: the device is full") as caught:
            ernie_accel.load(saved)
        return str(caught.value)

    monkeypatch.setattr(ParallelReader, "start", full)
    ahead = error()
    assert f"{second.parent.name}/{WEIGHTS}" in ahead
    assert not readers()
    monkeypatch.setattr(read_ahead, "_KINDS", ())
    assert error() == ahead


def test_a_damaged_file_is_skipped(tmp_path):
    write_tensors(tmp_path / "good", {"weight": torch.arange(5)})
    (tmp_path / "bad").write_bytes(b"\xff" * 100)
    with ReadAhead([tmp_path / "bad", tmp_path / "gone", tmp_path / "good"], "cpu") as ahead:
        assert ahead.opened(tmp_path / "bad") is None
        assert ahead.opened(tmp_path / "gone") is None
        good = ahead.opened(tmp_path / "good")
        good.start(good.tensors)
        assert good.take("weight").equal(torch.arange(5))
    assert ended()


def _as_if_on_cuda(ahead: ReadAhead) -> int:
    ahead._where = torch.device("cuda")
    return 0


def test_memory_that_cannot_be_freed_does_not_hide_what_failed(saved, monkeypatch):
    def fail() -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    with pytest.raises(ZeroDivisionError), ReadAhead([saved / "transformer" / WEIGHTS], "cpu") as ahead:
        1 / _as_if_on_cuda(ahead)
    assert not readers()


@pytest.mark.parametrize("fails", [False, True])
def test_a_load_waits_for_the_end_of_threads_only_where_something_is_left_to_stop(fails, saved, monkeypatch):
    waits, shutdown = [], ThreadPoolExecutor.shutdown

    def noted(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        waits.append(wait)
        shutdown(pool, wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", noted)
    if fails:
        monkeypatch.setattr(reading, "vet", lambda *args: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        ernie_accel.load(saved)
    assert any(waits) is fails
    assert len(waits) >= 4
    assert ended()
