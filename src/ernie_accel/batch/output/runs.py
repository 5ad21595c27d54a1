"""Remember where the runs of a job made its pictures: the report may be written later, and on another machine."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from ernie_accel.batch.errors import BatchOutputError
from ernie_accel.batch.input.naming import JOB_FOLDER
from ernie_accel.batch.output.folder import OutputFolder

_FILE = "runs.jsonl"
_VERSIONS = ("torch", "diffusers", "transformers")
_MOST_BYTES = 100_000  # of the file's end that are read


def note_run(out: Path, machine: str, versions: Mapping[str, str]) -> None:
    """Note that a run begins to make pictures.

    Args:
        out: The output folder, which holds a ledger or will.
        machine: What renders, in words.
        versions: Of the packages there; those that matter for pictures are kept.

    Raises:
        BatchOutputError: It cannot be written.
    """
    name = f"{JOB_FOLDER}/{_FILE}"
    kept = {name: versions[name] for name in _VERSIONS if name in versions}
    line = json.dumps({"time": time.time(), "machine": machine, "versions": kept}) + "\n"
    folder = OutputFolder(out)
    try:
        folder.append(name, line.encode())
    except OSError as error:
        reason = f"{name} could not be written: {error.strerror or error}; free space, or move it away"
        raise BatchOutputError(out, [(None, reason)]) from error
    finally:
        folder.close()


def read_runs(out: Path) -> dict[str, str]:
    """Return the machines and the versions of all runs as the report shows them; nothing where none is known."""
    try:
        with (out / JOB_FOLDER / _FILE).open("rb") as file:
            file.seek(max(0, (out / JOB_FOLDER / _FILE).stat().st_size - _MOST_BYTES))
            lines = file.read(_MOST_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    machines: dict[str, None] = {}
    versions: dict[str, None] = {}
    for line in lines:
        try:
            run = json.loads(line)
            machines[str(run["machine"])] = None
            versions[", ".join(f"{name} {version}" for name, version in run["versions"].items())] = None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # half a line, by a kill
            continue
    found = {"hardware": "; ".join(machines), "versions": "; ".join(text for text in versions if text)}
    return {name: text for name, text in found.items() if text}
