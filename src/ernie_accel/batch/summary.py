"""Write what a job leaves beside its pictures: the manifest, as JSON lines and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from ernie_accel.batch.errors import BatchOutputError
from ernie_accel.batch.ledger import Entry
from ernie_accel.core.atomic import write_atomically

MANIFEST_FIELDS = ("path", "state", "line", "prompt", "seed", "error", "bytes", "seconds", "batch_size")


def write_manifest(out: Path, entries: Iterable[Entry]) -> None:
    """Write ``manifest.jsonl`` and ``manifest.csv``: a line per row, its settings and the input's own columns.

    Raises:
        BatchOutputError: They cannot be written.
    """
    records = [_record(entry) for entry in entries]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    names = list(dict.fromkeys([*MANIFEST_FIELDS, *(name for record in records for name in record)]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(records)
    write_summary(out / "manifest.jsonl", lines)
    write_summary(out / "manifest.csv", text.getvalue())


def write_summary(path: Path, text: str) -> None:
    """Write a text file of a job in one step.

    Raises:
        BatchOutputError: It cannot be written.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        reason = f"{path.name!r} could not be written: {error.strerror or error}; the pictures are not affected"
        raise BatchOutputError(path.parent, [(None, reason)]) from error


def _record(entry: Entry) -> dict[str, object]:
    record: dict[str, object] = {
        "path": entry.path,
        "state": entry.state,
        "line": entry.line,
        **entry.request,
        "seed": entry.request["seed"] if entry.seed is None else entry.seed,
        "error": entry.error,
        "bytes": entry.bytes,
        "seconds": None if entry.seconds is None else round(entry.seconds, 3),
        "batch_size": entry.batch_size,
    }
    # The row's own columns last, and never over a field of ours: `prompt` may have come from a template.
    return record | {name: value for name, value in entry.columns.items() if name not in record}
