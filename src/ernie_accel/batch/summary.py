"""Write what a job leaves beside its pictures: the manifest, as JSON lines and as CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields
from pathlib import Path

from ernie_accel.batch.engines.base import Request
from ernie_accel.batch.errors import BatchOutputError
from ernie_accel.batch.ledger import Entry, Ledger
from ernie_accel.core.atomic import write_atomically

MANIFEST_FIELDS = ("path", "state", "line", "prompt", "seed", "error", "bytes", "seconds", "batch_size")
_REQUEST_FIELDS = sorted(field.name for field in fields(Request))


def write_manifest(out: Path, ledger: Ledger) -> None:
    """Write ``manifest.jsonl`` and ``manifest.csv``: a line per row, its settings and the input's own columns.

    Raises:
        BatchOutputError: They cannot be written.
    """
    # A pass for each file, and no list of rows: of 100,000 it would be larger than both files together.
    write_summary(out / "manifest.jsonl", _json_lines(ledger))
    write_summary(out / "manifest.csv", _csv(ledger))


def write_summary(path: Path, text: bytes) -> None:
    """Write a text file of a job, given as UTF-8, in one step.

    Raises:
        BatchOutputError: It cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        reason = f"{path.name!r} could not be written: {error.strerror or error}; the pictures are not affected"
        raise BatchOutputError(path.parent, [(None, reason)]) from error


def _json_lines(ledger: Ledger) -> bytes:
    file = io.BytesIO()
    file.writelines(f"{json.dumps(_record(entry), ensure_ascii=False)}\n".encode() for entry in ledger.entries())
    return file.getvalue()


def _csv(ledger: Ledger) -> bytes:
    file = io.BytesIO()
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, dict.fromkeys([*MANIFEST_FIELDS, *_REQUEST_FIELDS, *ledger.column_names()]))
    writer.writeheader()
    writer.writerows(map(_record, ledger.entries()))
    text.flush()
    return file.getvalue()


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
