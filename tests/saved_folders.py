"""Change a folder that `save` wrote, by accident or on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernie_accel.storage.manifest import MANIFEST, _checksum, files_of


def change(folder: Path, do: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Let `do` change the manifest, then write checksums of what the folder now holds, as whoever means harm would."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    data.pop("sha256", None)
    if data["format_version"] >= 2:
        found = files_of(folder)
        data["files"] = {name: file.model_dump() for name, file in found.items() if name != MANIFEST}
    do(data)
    if data["format_version"] >= 2:
        data["sha256"] = _checksum(data)
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def as_version_1(folder: Path) -> None:
    """Turn a folder into what version 0.1 wrote: sizes only, and all fields of a transform."""
    from ernie_accel.transforms import transform_from_json

    def older(data: dict[str, Any]) -> None:
        data["format_version"] = 1
        data["files"] = {name: file["bytes"] for name, file in data["files"].items()}
        for saved in data["transforms"]:
            saved["transform"] = transform_from_json(saved["transform"]).to_json()

    change(folder, older)


def edit_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
