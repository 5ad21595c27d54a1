"""Write what a job leaves beside its pictures: the manifest, as JSON lines and as CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields

from ernie_accel.batch.engines.base import Request
from ernie_accel.batch.input.cells import MANIFEST_FIELDS, escaped
from ernie_accel.batch.output.ledger import Ledger, LedgerEntry

_REQUEST_FIELDS = sorted(field.name for field in fields(Request))


def write_manifest(ledger: Ledger) -> None:
    """Write ``manifest.jsonl`` and ``manifest.csv``: a line per row, its settings and the input's own columns.

    Raises:
        BatchOutputError: They cannot be written, or other files of their names are in the way.
    """
    # A pass for each file, and no list of rows: of 100,000 it would be larger than both files together.
    ledger.write("manifest.jsonl", _json_lines(ledger))
    ledger.write("manifest.csv", _csv(ledger))


def _json_lines(ledger: Ledger) -> bytes:
    file = io.BytesIO()
    file.writelines(f"{json.dumps(_record(entry), ensure_ascii=False)}\n".encode() for entry in ledger.entries())
    return file.getvalue()


def _csv(ledger: Ledger) -> bytes:
    file = io.BytesIO()
    # With a byte order mark: without one Excel reads the file in the system's old code page, and Chinese is garbled.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    names = list(dict.fromkeys([*MANIFEST_FIELDS, *_REQUEST_FIELDS, *ledger.column_names()]))
    writer = csv.writer(text)
    writer.writerow(map(escaped, names))
    for entry in ledger.entries():
        record = _record(entry)
        writer.writerow(_cell(record.get(name)) for name in names)
    text.flush()
    return file.getvalue()


def _cell(value: object) -> object:
    return escaped(value) if isinstance(value, str) else value


def _record(entry: LedgerEntry) -> dict[str, object]:
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
