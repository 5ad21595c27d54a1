"""The schema of ``ernie_accel.json``, which `save` writes and `load` checks before it uses anything."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from ernie_accel.common.cores import background_threads
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.core.transform import LayerReceipt
from ernie_accel.storage.checksums import Checking, checksums

MANIFEST = "ernie_accel.json"
INDEX = "model_index.json"
WEIGHTS = "model.safetensors"
FORMAT = "ernie_accel pipeline"
#: 3: with bytes before and after each transform; 2: without; 1: without checksums too, what version 0.1 wrote.
FORMAT_VERSION = 3
FORMAT_VERSIONS = (1, 2, 3)
#: Text files beside weights can be large (a tokenizer's vocabulary), but nothing with a schema is.
MOST_JSON_BYTES = 64 * 2**20
#: What a saved folder may hold: nothing that any library would run or unpickle.
_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".spm", ".tiktoken"})


def _component(name: str) -> str:
    if not re.fullmatch(r"[a-z][A-Za-z0-9_]*", name):
        raise ValueError("a component has a plain name, as 'text_encoder'")
    return name


def _inside(path: str) -> str:
    """Accept a path of a file in the folder or at most two folders below, as ``save_pretrained`` writes them."""
    parts = path.split("/")
    if len(parts) > 3 or not all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", part) for part in parts):
        raise ValueError("a file is named by a path within the folder, as 'vae/config.json'")
    if Path(path).suffix not in _SUFFIXES:
        raise ValueError(f"a folder holds only {', '.join(sorted(_SUFFIXES))}")
    return path


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("not a dtype of torch")
    return name


ComponentName = Annotated[str, AfterValidator(_component)]
FilePath = Annotated[str, AfterValidator(_inside)]
DtypeName = Annotated[str, AfterValidator(_dtype)]
Count = Annotated[int, Field(ge=0)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SavedReceipt(_Schema):
    """A `LayerReceipt` as JSON; an infinite SQNR is null."""

    name: str
    scheme: str
    backend: str
    dtype: DtypeName
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    bytes_before: Count
    bytes_after: Count
    sqnr_db: float | None
    correction_rank: Count = 0
    uncorrected_db: float | None = None

    def receipt(self) -> LayerReceipt:
        """Return what it was made from."""
        return LayerReceipt(**self.model_dump() | {"sqnr_db": float("inf") if self.sqnr_db is None else self.sqnr_db})


class SavedModel(_Schema):
    """One model: its class, and what its file of weights holds."""

    library: Literal["diffusers", "transformers"]
    class_name: str = Field(alias="class")
    dtype: DtypeName
    #: Tensors that have several names: each name -> the one it is written under.
    aliases: dict[str, str]
    layers: tuple[SavedReceipt, ...]
    paths: tuple[str, ...]

    @model_validator(mode="after")
    def _pairs(self) -> SavedModel:
        if len(self.layers) != len(self.paths) or len(set(self.paths)) != len(self.paths):
            raise ValueError(f"{len(self.layers)} layers have {len(set(self.paths))} paths")
        return self

    def receipts(self) -> dict[str, LayerReceipt]:
        """Return the receipt of each quantized layer by its path in the model."""
        return {path: layer.receipt() for path, layer in zip(self.paths, self.layers, strict=True)}


class SavedTransform(_Schema):
    """A transform of the pipe's report."""

    transform: dict[str, JsonValue]
    changed: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: Count = 0
    bytes_after: Count = 0


class SavedFile(_Schema):
    """What a file must be: its size, and from format version 2 on its checksum (`checksums`)."""

    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class Manifest(_Schema):
    """The whole of ``ernie_accel.json``."""

    format: Literal["ernie_accel pipeline"]
    format_version: Literal[1, 2, 3]
    ernie_accel: str
    versions: dict[str, str]
    pipeline: str
    transforms: tuple[SavedTransform, ...]
    components: dict[ComponentName, SavedModel]
    files: dict[FilePath, SavedFile]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        needed = [INDEX, *(f"{name}/{file}" for name in self.components for file in ("config.json", WEIGHTS))]
        missing = [file for file in needed if file not in self.files]
        if missing:
            raise ValueError(f"files lacks {', '.join(missing)}")
        return self

    @property
    def digest(self) -> str:
        """The SHA-256 of all it says, weights by their checksums, in hexadecimal."""
        return _checksum(self.model_dump(mode="json", by_alias=True))

    def write(self, folder: Path) -> None:
        """Write it into `folder`, with a checksum of its own."""
        data = self.model_dump(mode="json", by_alias=True)
        text = json.dumps(data | {"sha256": self.digest}, indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def saved_receipt(receipt: LayerReceipt) -> SavedReceipt:
    """Return a receipt as it is saved."""
    return SavedReceipt.model_validate(receipt.to_json())


def files_of(folder: Path) -> dict[str, SavedFile]:
    """Return what every file of a folder is, with its checksum, by its path within."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    sums = checksums(files)
    return {
        name: SavedFile(bytes=path.stat().st_size, sha256=digest)
        for name, path, digest in zip(names, files, sums, strict=True)
    }


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder that `save` wrote, once everything it says about files was verified.

    Raises:
        SavedPipelineError: The folder is foreign, incomplete, damaged or of another version.
    """
    manifest = open_manifest(folder)
    with Verification(folder, manifest.files) as files:
        files.verify(*manifest.files)
    return manifest


def open_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder that `save` wrote; its files are still to be verified (`Verification`).

    Raises:
        SavedPipelineError: The folder is foreign, incomplete, of another version, or holds files that are not listed.
    """
    if not folder.is_dir():
        raise SavedPipelineError(folder, "there is no such folder")
    if not (folder / MANIFEST).exists():
        hint = ""
        if (folder / INDEX).is_file():
            hint = "; it is a plain pipeline: load it with DiffusionPipeline.from_pretrained"
        raise SavedPipelineError(folder, f"was not written by ernie_accel.save: there is no {MANIFEST}{hint}")
    data = read_json(folder, MANIFEST)
    if data.get("format") != FORMAT:
        raise SavedPipelineError(folder, f"{MANIFEST} is not of the format {FORMAT!r}")
    version = data.get("format_version")
    if version not in FORMAT_VERSIONS:
        readable = f"{', '.join(map(str, FORMAT_VERSIONS[:-1]))} and {FORMAT_VERSIONS[-1]}"
        raise SavedPipelineError(folder, f"is of format version {version}; this library reads {readable}")
    manifest = _as_manifest(folder, data)
    _check_sizes(folder, manifest.files)
    _check_nothing_else(folder, manifest)
    return manifest


def _as_manifest(folder: Path, data: dict[str, object]) -> Manifest:
    if data["format_version"] == 1:
        files = data.get("files")
        if isinstance(files, dict):
            data = data | {"files": {name: {"bytes": size} for name, size in files.items()}}
    else:
        found = data.pop("sha256", None)
        if found != _checksum(data):
            raise SavedPipelineError(folder, f"is damaged: {MANIFEST} is not what ernie_accel.save wrote")
    try:
        manifest = Manifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise SavedPipelineError(folder, f"{MANIFEST}: {place}: {first['msg']}") from error
    if manifest.format_version > 1 and any(file.sha256 is None for file in manifest.files.values()):
        raise SavedPipelineError(folder, f"{MANIFEST}: files: every file needs a checksum")
    return manifest


def _checksum(data: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class Verification:
    """Verify the files of a folder by their checksums, while the caller does something else.

    A context manager. Small files come first, then weights, the largest first. A quarter of the cores work on it;
    `use_all_cores` gives it the others, too.
    """

    def __init__(self, folder: Path, files: Mapping[str, SavedFile]) -> None:
        """Begin at once.

        Raises:
            SavedPipelineError: A file cannot be looked at.
        """
        self._folder = folder
        self._expected = {name: file.sha256 for name, file in files.items() if file.sha256 is not None}
        order = sorted(self._expected, key=lambda name: (name.endswith(".safetensors"), -files[name].bytes))
        try:
            self._found = Checking((folder / name for name in order), threads=background_threads())
        except OSError as error:
            raise SavedPipelineError(folder, f"cannot be read: {error}") from error

    def verify(self, *names: str) -> None:
        """Return once these files are known to be what was saved; those of format 1 have no checksums.

        Raises:
            SavedPipelineError: A file has other bytes; the error names all that have.
        """
        if any(map(self._is_changed, names)):
            changed = [name for name in self._expected if self._is_changed(name)]
            fix = "copy it again from where it came from, or save the pipe anew"
            raise SavedPipelineError(
                self._folder, f"is damaged: {', '.join(changed)} has other bytes than were saved; {fix}"
            )

    def use_all_cores(self) -> None:
        """Verify on all cores from now on: the caller has nothing else left to do."""
        self._found.use_all_cores()

    def _is_changed(self, name: str) -> bool:
        expected = self._expected.get(name)
        try:
            return expected is not None and self._found.of(self._folder / name) != expected
        except OSError as error:
            raise SavedPipelineError(self._folder, f"cannot be read: {error}") from error

    def __enter__(self) -> Verification:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._found.__exit__(kind, error, trace)


def _check_sizes(folder: Path, files: Mapping[str, SavedFile]) -> None:
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            raise SavedPipelineError(folder, f"is incomplete: {name} is missing")
        if path.stat().st_size != file.bytes:
            raise SavedPipelineError(
                folder, f"is damaged: {name} has {path.stat().st_size} bytes, expected {file.bytes}"
            )


def _check_nothing_else(folder: Path, manifest: Manifest) -> None:
    """Refuse files that the manifest does not list, where a library could read them: in the folder of a component."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if "/" in name and name not in manifest.files and not path.is_dir() and not path.name.startswith("."):
            raise SavedPipelineError(folder, f"holds {name}, which {MANIFEST} does not list; remove it")


def read_json(folder: Path, name: str) -> dict[str, object]:
    """Return the object in a JSON file of a folder from anywhere.

    Raises:
        SavedPipelineError: It is not a JSON object, or not an ordinary file of a reasonable size.
    """
    try:
        found = (folder / name).stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_JSON_BYTES:
            raise SavedPipelineError(folder, f"{name} is not a file of at most {MOST_JSON_BYTES} bytes")
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise SavedPipelineError(folder, f"{name} cannot be read: {error.strerror or error}") from error
    except RecursionError:
        raise SavedPipelineError(folder, f"{name} is nested too deeply") from None
    except ValueError as error:
        raise SavedPipelineError(folder, f"{name} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise SavedPipelineError(folder, f"{name} is not a JSON object")
    return data
