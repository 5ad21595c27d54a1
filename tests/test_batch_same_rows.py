"""The same rows give the same job, or the same refusal, whatever the format: CSV, TSV, JSON, JSON lines, Parquet."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ernie_accel.batch import BatchInputError, read_table

# Few characters, so that names collide; those that formats and file systems treat in ways of their own.
_CHARACTERS = "aAbß\"',;\t\n\r\0\\/.{}é\u0301\u2028\x85\x1c \ufeff<&\U0001f600"
_TEXTS = st.text(_CHARACTERS, max_size=6) | st.sampled_from(
    ["a red mug", "nul", "=1+1", "1e400", "NaN", "null", "true", "<general_tags>x</general_tag>", "512", "4.5", "007"]
)
_NUMBERS = st.integers(-1, 40) | st.sampled_from([512, 1000, 2**53, 2**64 - 1, 2**64, 10**25])
_COLUMNS = {
    "prompt": _TEXTS,
    "sku": _TEXTS,
    "kind": _TEXTS,
    "negative_prompt": _TEXTS,
    "seed": _NUMBERS.filter(lambda number: number < 2**63),  # Arrow has no larger integers that Python writes
    "width": st.sampled_from([16, 512, 1000, 0, -16]) | st.sampled_from(["512", "wide", " 512 "]),
    "steps": st.sampled_from([8.0, 4.5, 0.0]),
    "guidance_scale": st.floats(0, 120),
    "variants": st.sampled_from([1, 2, 0]),
    "note": st.booleans(),
    "cfg": st.integers(0, 9),
    "tags": st.lists(st.text("ab\u2028", max_size=2), max_size=2),
}


@st.composite
def tables(draw):
    """Draw rows with every column in each, a column of one type, as Parquet has them."""
    others = draw(st.lists(st.sampled_from(sorted(_COLUMNS.keys() - {"prompt"})), unique=True, max_size=5))
    names = draw(st.permutations(["prompt", *others]))
    rows = []
    texts = {name: draw(st.booleans()) for name in names}
    for _ in range(draw(st.integers(1, 5))):
        row = {name: draw(st.none() | _COLUMNS[name]) for name in names}
        for name in names:  # a column of mixed types is one of text
            if row[name] is not None and (name == "width" or (texts[name] and not isinstance(row[name], list))):
                row[name] = as_text(row[name])
        rows.append(row)
    return rows


def as_text(value):
    """Return a value as one would write it into CSV."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) <= 2**53 else repr(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


def separated(rows, mark):
    lines = [list(rows[0]), *([as_text(value) for value in row.values()] for row in rows)]
    return "".join(mark.join('"' + text.replace('"', '""') + '"' for text in line) + "\n" for line in lines)


def files(rows, folder: Path):
    texts = {
        "t.csv": separated(rows, ","),
        "t.tsv": separated(rows, "\t"),
        "line.json": json.dumps(rows, ensure_ascii=False),
        "indented.json": json.dumps(rows, indent=1),
        "t.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
        yield folder / name
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "t.parquet")
    yield folder / "t.parquet"


def outcome(path, **options):
    """Return what becomes of a table, but for the lines, which each format counts in its own way."""
    try:
        rows = read_table(path, **options)
    except BatchInputError as error:
        return Counter(_without_lines(message) for _, message in error.problems)
    skipped = options.get("skipped") or []
    kept = [{name: value for name, value in vars(row).items() if name != "line"} for row in rows]
    return [row | {"columns": dict(row["columns"])} for row in kept], Counter(_without_lines(m) for _, m in skipped)


def _without_lines(message):
    return re.sub(r"line [0-9]+|row [0-9]+, on the same line", "line", message)


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(tables(), st.booleans(), st.sampled_from([None, "kind"]), st.booleans())
def test_the_same_rows_are_the_same_job_or_the_same_refusal(rows, skip, folder_by, extra):
    options = {"folder_by": folder_by if "kind" in rows[0] else None, "extra_columns": ["cfg"] if extra else []}
    options["extra_columns"] = [name for name in options["extra_columns"] if name in rows[0]]
    with tempfile.TemporaryDirectory() as folder:
        paths = list(files(rows, Path(folder)))
        outcomes = {path.name: outcome(path, **options, **({"skipped": []} if skip else {})) for path in paths}
    first = outcomes["t.csv"]
    assert {name: found for name, found in outcomes.items() if found != first} == {}, first
