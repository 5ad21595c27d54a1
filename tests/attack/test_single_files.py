"""Single files of strangers: whatever their bytes are, there is one error or all weights, in little memory and time."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.storage.loading import load_pipeline
from ernie_accel.storage.single_file.tensor_files import open_tensors
from tests.attack import SEED, rounds
from tests.pipelines import tiny_ernie
from tests.single_files import write, write_gguf

_MOST_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The bytes of good files by their names, and where their headers end."""
    folder = tmp_path_factory.mktemp("single")
    pipe = tiny_ernie()
    gguf = write_gguf(pipe.transformer, folder / "w.gguf", "Q8_0").read_bytes()
    plain = write(pipe.transformer, folder / "w.safetensors", "fp8 beside").read_bytes()
    header = 8 + int.from_bytes(plain[:8], "little")
    return {"w.gguf": (gguf, len(gguf) // 8), "w.safetensors": (plain, header)}


def damaged(data: bytes, header: int, chance: random.Random) -> bytes:
    """Return the bytes of a file after an accident, or after somebody meant harm, mostly in its header."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(header)
        how = chance.randrange(4)
        if how == 0:
            changed[place] ^= 1 << chance.randrange(8)
        elif how == 1:  # a length that is out of all bounds
            changed[place : place + 8] = chance.choice((2**63 - 1, 2**64 - 1, 2**40, 0)).to_bytes(8, "little")
        elif how == 2:
            del changed[place : place + chance.randrange(1, 64)]
        else:
            changed[place:place] = chance.randbytes(chance.randrange(1, 64))
    return bytes(changed)


@pytest.mark.parametrize("name", ["w.gguf", "w.safetensors"])
def test_a_header_is_read_in_bounds_or_refused(originals, tmp_path, name):
    pytest.importorskip("gguf")
    chance = random.Random(f"{SEED} {name}")
    data, header = originals[name]
    file = tmp_path / name
    refused, count = 0, rounds(short=150, full=4_000)
    tracemalloc.start()
    for _ in range(count):
        file.write_bytes(damaged(data, header, chance))
        tracemalloc.reset_peak()
        said = ""
        try:
            with open_tensors(file) as opened:
                assert all(len(stored.shape) <= 8 for stored in opened.tensors.values())
        except ErnieAccelError as error:
            said = str(error)
            refused += 1
        assert not said or (str(file) in said and len(said) < 4000)
        assert tracemalloc.get_traced_memory()[1] < _MOST_BYTES
    tracemalloc.stop()
    assert refused > count / 4


@pytest.mark.parametrize("name", ["w.gguf", "w.safetensors"])
def test_a_damaged_file_gives_all_weights_or_one_error(originals, tmp_path, name):
    pytest.importorskip("gguf")
    chance = random.Random(f"{SEED} {name} whole")
    data, header = originals[name]
    tiny_ernie().save_pretrained(tmp_path / "folder")
    for _ in range(rounds(short=8, full=400)):
        (tmp_path / name).write_bytes(damaged(data, header, chance))
        try:
            pipe = load_pipeline(str(tmp_path / "folder"), device="cpu", transformer=tmp_path / name)
        except ErnieAccelError:
            continue
        assert all(not parameter.is_meta for parameter in pipe.transformer.parameters())
