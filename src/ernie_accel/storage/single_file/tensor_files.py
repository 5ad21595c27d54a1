"""Open safetensors and GGUF files: names, shapes and formats from the header, tensors mapped one at a time.

The header of a GGUF file is read here and not by the ``gguf`` package, whose reader believes every length it finds: a
file of a few bytes can keep it busy until memory is gone. Its blocks are decoded by diffusers.
"""

from __future__ import annotations

import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast, final

import torch

from ernie_accel.core.errors import MissingExtraError, SavedPipelineError

#: Formats of safetensors that are read: name in the header -> dtype. The eight-bit ones need a scale or are cast.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I8": torch.int8,
        "U8": torch.uint8,
    }
)
#: Formats of GGUF: number -> name, values per block, bytes per block (ggml.h, ggml-common.h).
BLOCKS: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        30: ("BF16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        20: ("IQ4_NL", 32, 18),
        23: ("IQ4_XS", 256, 136),
    }
)
_MOST_TENSORS = 2**16
_MOST_NAME_BYTES = 1024
_MOST_KEY_BYTES = 2**16
#: Bytes of a GGUF value by the number of its type; 8 is text and 9 an array.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY, _UINT32 = 8, 9, 4


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        shape: As torch has it.
        format: Its dtype or block format, by the name that the file's format gives it.
    """

    shape: tuple[int, ...]
    format: str


class TensorFile(ABC):
    """A file of tensors whose header has been read.

    Attributes:
        path: The file.
        tensors: What it holds, by name.
        metadata: Its text entries, where it has them.
    """

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @abstractmethod
    def get(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored, mapped from the file: of a block format, the blocks, uint8 [N, bytes]."""

    @abstractmethod
    def floats(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Return the values of `stored`, which is some rows of tensor `name`, in float32 or as they are."""

    @abstractmethod
    def close(self) -> None:
        """Close the file; mapped tensors stay."""

    def wrong(self, why: str) -> SavedPipelineError:
        """Return an error about this file."""
        return SavedPipelineError(self.path, why)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(path: Path) -> TensorFile:
    """Open a file by what its name ends in, ``.safetensors`` or ``.gguf``, and read its header.

    Raises:
        SavedPipelineError: It is no such file, or damaged.
        MissingExtraError: It is GGUF, and the package that decodes it is not installed.
    """
    kinds = {".safetensors": SafetensorsFile, ".gguf": GgufFile}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise SavedPipelineError(path, f"a transformer is read from {' or '.join(kinds)}, not from {path.suffix!r}")
    if not path.is_file():
        raise SavedPipelineError(path, "is not a file" if path.exists() else "there is no such file")
    return kind(path)


@final
class SafetensorsFile(TensorFile):
    """A safetensors file; the format's own library checks that header and size agree."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = file = cast(Any, safe_open(path, framework="pt"))
            names = file.keys()
            if len(names) > _MOST_TENSORS:
                raise self.wrong(f"has {len(names):,} tensors; expected at most {_MOST_TENSORS:,}")
            slices = {name: file.get_slice(name) for name in names}
            self.tensors = {name: Stored(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            self.metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self.wrong(f"cannot be read: {error}") from error

    def get(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise self.wrong(f"{name} cannot be read: {error}") from error
        return tensor

    def floats(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return stored if stored.dtype.itemsize > 1 else stored.float()

    def close(self) -> None:
        self._file = None


@final
class GgufFile(TensorFile):
    """A GGUF file of version 2 or 3, little-endian, as ComfyUI-GGUF and llama.cpp write it."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        self.path, self.metadata = path, {}
        with path.open("rb") as file:
            try:
                found = _Header(file, os.fstat(file.fileno()).st_size).tensors()
            except _DamagedError as error:
                raise self.wrong(f"cannot be read: {error}") from error
        self.tensors = {name: Stored(shape, BLOCKS[number][0]) for name, (shape, number, _, _) in found.items()}
        self._places = {name: (number, start, size) for name, (_, number, start, size) in found.items()}
        if any(number not in (0, 1, 30) for number, _, _ in self._places.values()):
            _check_gguf()
        # Copied on write: torch has no read-only tensors.
        self._bytes: Any = np.memmap(path, dtype=np.uint8, mode="c")

    def get(self, name: str) -> torch.Tensor:
        number, start, size = self._places[name]
        stored = torch.from_numpy(self._bytes[start : start + size])
        kind, shape = BLOCKS[number][0], self.tensors[name].shape
        if kind in DTYPES:
            return stored.view(DTYPES[kind]).reshape(shape)
        return stored.reshape(math.prod(shape[:-1]), -1)

    def floats(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        number = self._places[name][0]
        if BLOCKS[number][0] in DTYPES:
            return stored
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions, dequantize_gguf_tensor

        kind = gguf.GGMLQuantizationType(number)
        if kind not in dequantize_functions:
            raise self.wrong(f"{name} is {kind.name}, which the diffusers installed here does not decode; update it")
        values: torch.Tensor = dequantize_gguf_tensor(GGUFParameter(stored, quant_type=kind))
        return values.float()

    def close(self) -> None:
        self._bytes = None


def _check_gguf() -> None:
    """Refuse blocks before they are read where the package that diffusers decodes them by is missing.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error


class _DamagedError(Exception):
    """The header says what cannot be."""


class _Header:
    """Reads the header of a GGUF file; no length in it is believed before it is held against the file's size."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def tensors(self) -> dict[str, tuple[tuple[int, ...], int, int, int]]:
        """Return shape, format, place and bytes of each tensor.

        Raises:
            _DamagedError: The file is damaged, or in a format that is not known here.
        """
        if self._take(4) != b"GGUF":
            raise _DamagedError("it does not begin as a GGUF file")
        version = self._uint32()
        if version not in (2, 3):
            raise _DamagedError(f"version {version}; expected 2 or 3, little-endian")
        tensors, entries = self._uint64(), self._uint64()
        for what, count in (("tensors", tensors), ("entries", entries)):
            if count > _MOST_TENSORS:
                raise _DamagedError(f"{count:,} {what}; expected at most {_MOST_TENSORS:,}")
        alignment = 32
        for _ in range(entries):
            key = self._text(_MOST_KEY_BYTES)
            value = self._value(self._uint32())
            if key == b"general.alignment":
                alignment = value if isinstance(value, int) else 0
        if not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment is {alignment}; expected a power of two")
        found = [self._tensor(alignment) for _ in range(tensors)]
        data = -(-self._file.tell() // alignment) * alignment
        places: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
        for name, shape, number, offset in found:
            _, values, of_block = BLOCKS[number]
            if shape and shape[-1] % values:
                raise _DamagedError(f"{name!r}: rows of {shape[-1]} are not made of blocks of {values}")
            size = math.prod(shape) // values * of_block
            if data + offset + size > self._size:
                raise _DamagedError(f"{name!r} ends at byte {data + offset + size:,} of {self._size:,}")
            if name in places:
                raise _DamagedError(f"{name!r} is there twice")
            places[name] = (shape, number, data + offset, size)
        return places

    def _tensor(self, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        try:
            name = self._text(_MOST_NAME_BYTES).decode()
        except UnicodeDecodeError:
            raise _DamagedError("a tensor's name is no text") from None
        dimensions = self._uint32()
        if dimensions > 8:
            raise _DamagedError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self._uint64() for _ in range(dimensions))[::-1]
        number, offset = self._uint32(), self._uint64()
        if number not in BLOCKS:
            known = ", ".join(kind for kind, _, _ in BLOCKS.values())
            raise _DamagedError(f"{name!r} is of format {number}, which is not read; known: {known}")
        if offset % alignment:
            raise _DamagedError(f"{name!r} begins at {offset}, which is no multiple of {alignment}")
        return name, shape, number, offset

    def _value(self, kind: int) -> int | None:
        """Skip a value, and return it if it is a uint32."""
        if kind == _UINT32:
            return self._uint32()
        if kind == _TEXT:
            self._skip(self._uint64())
        elif kind == _ARRAY:
            of, count = self._uint32(), self._uint64()
            if of == _TEXT:
                self._room(count * 8)
                for _ in range(count):
                    self._skip(self._uint64())
            else:
                self._skip(count * self._bytes_of(of))
        else:
            self._skip(self._bytes_of(kind))
        return None

    def _bytes_of(self, kind: int) -> int:
        if kind not in _VALUE_BYTES:
            raise _DamagedError(f"a value of type {kind}, which is not known")
        return _VALUE_BYTES[kind]

    def _text(self, most: int) -> bytes:
        length = self._uint64()
        if length > most:
            raise _DamagedError(f"a name of {length:,} bytes; expected at most {most:,}")
        return self._take(length)

    def _uint32(self) -> int:
        return int(struct.unpack("<I", self._take(4))[0])

    def _uint64(self) -> int:
        return int(struct.unpack("<Q", self._take(8))[0])

    def _take(self, count: int) -> bytes:
        self._room(count)
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._room(count)
        self._file.seek(count, os.SEEK_CUR)

    def _room(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise _DamagedError(f"it ends at byte {self._size:,}, and {count:,} more were announced")
