"""Threads read a safetensors file: the same bits as its own library reads, bounded memory, and clear ends."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ernie_accel.storage import parallel_read
from ernie_accel.storage.parallel_read import ParallelReader
from ernie_accel.storage.tensor_file import write_tensors

TENSORS = {
    "matrix": torch.randn(37, 53),
    "eight bits": torch.randn(64, 48).to(torch.float8_e4m3fn),
    "half": torch.randn(5, 7, 3).bfloat16(),
    "scalar": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def file(tmp_path):
    write_tensors(tmp_path / "weights.safetensors", TENSORS)
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("block", [64, 1000, 2**24])
def test_bits_are_those_of_the_formats_own_library(block, threads, file, monkeypatch):
    monkeypatch.setattr(parallel_read, "BLOCK_BYTES", block)
    with ParallelReader(file, "cpu", threads) as reader:
        reader.start(reader.tensors)
        read = {name: reader.take(name) for name in reversed(list(reader.tensors))}
    expected = load_file(file)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("elsewhere", ["cuda", "meta"])
def test_what_goes_to_a_device_passes_through_one_block_per_thread(elsewhere, file, monkeypatch):
    """Bounds the host's memory; a stand-in tensor says that it is elsewhere."""
    monkeypatch.setattr(parallel_read, "BLOCK_BYTES", 512)
    used, waits = set(), []

    class Elsewhere:
        device = torch.device(elsewhere)

        def __init__(self, target):
            self.target = target

        def numel(self):
            return self.target.numel()

        def copy_(self, block, non_blocking=False):
            used.add((threading.get_ident(), block.untyped_storage().data_ptr()))
            waits.append(not non_blocking)
            self.target.copy_(block)

    with ParallelReader(file, "cpu", 2) as reader:
        read = reader._read
        monkeypatch.setattr(reader, "_read", lambda pieces, start: read(list(map(Elsewhere, pieces)), start))
        reader.start(reader.tensors)
        found = {name: reader.take(name) for name in reader.tensors}
    assert found["matrix"].equal(TENSORS["matrix"])
    assert found["half"].equal(TENSORS["half"])
    assert (waits.count(False) > 0) is (elsewhere == "cuda")  # of a block's pieces it waits only for the last one
    assert 1 <= len(used) <= 2
    assert len({thread for thread, _ in used}) == len(used)


def test_tensors_that_follow_each_other_are_read_at_once(file, monkeypatch):
    blocks, read = [], ParallelReader._read
    monkeypatch.setattr(
        ParallelReader, "_read", lambda self, pieces, start: (blocks.append(len(pieces)), read(self, pieces, start))[1]
    )
    with ParallelReader(file, "cpu", 1) as reader:
        in_order = sorted((each.start, name) for name, each in reader.tensors.items() if each.nbytes)
        names = [name for _, name in in_order]
        for together, expected in ((names, [len(names)]), (names[::2], [1] * len(names[::2]))):
            blocks.clear()
            reader.start(together[::-1])
            for name in together:
                assert reader.take(name).equal(TENSORS[name])
            assert blocks == expected


def test_a_truncated_file_is_refused_by_its_header(file):
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(SafetensorError):
        ParallelReader(file, "cpu")


def test_a_file_that_becomes_shorter_meanwhile_is_an_error_and_ends_the_threads(file):
    with ParallelReader(file, "cpu", 2) as reader:
        file.write_bytes(file.read_bytes()[:-5])
        reader.start(reader.tensors)
        last = max(reader.tensors, key=lambda name: reader.tensors[name].start)
        with pytest.raises(OSError, match="ends at byte"):
            reader.take(last)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ernie-accel-read")]
