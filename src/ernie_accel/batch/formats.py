"""Read JSON, JSON lines and Parquet as what a CSV file is: named columns of text, and where each row stands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_accel.batch.errors import BatchInputError, Problem
from ernie_accel.batch.row import Columns
from ernie_accel.core.errors import MissingExtraError

_SPACE = re.compile(r"[\s,]*")


@dataclass
class Records:
    """What a file holds, before its meaning is checked.

    Attributes:
        header_line: 1-based line of the column names; None where every row names its own.
        columns: The names of the columns, in order.
        rows: Each row's 1-based line and its fields; None for a row that cannot be read, which keeps its number.
        problems: What is wrong with the file as a whole.
        row_problems: What is wrong with single rows.
    """

    header_line: int | None = None
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[int, Columns | None]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    row_problems: list[Problem] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def add(self, line: int, value: object) -> None:
        """Add a row given as a mapping of scalars; anything else is noted as a problem of its line."""
        fields = self._fields(line, value) if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping):
            found = _kind(value)
            self.row_problems.append((line, f'is {found}; expected an object such as {{"prompt": "a red mug"}}'))
        self.rows.append((line, None if fields is None else Columns(fields)))
        for name in fields or ():
            if name not in self._seen:
                self._seen.add(name)
                self.columns.append(name)

    def complete(self) -> Records:
        """Give every row every column, empty where the row does not name it, and return this object."""
        blank = dict.fromkeys(self.columns, "")
        self.rows = [(line, None if row is None else Columns(blank | dict(row))) for line, row in self.rows]
        return self

    def _fields(self, line: int, value: Mapping[Any, Any]) -> dict[str, str] | None:
        fields: dict[str, str] = {}
        good = True
        for name, content in value.items():
            text = _text(content)
            if text is None:
                message = f"{name!r} is {_kind(content)}; expected text, a number, true, false or null"
                self.row_problems.append((line, message))
                good = False
            else:
                fields[str(name)] = text
        return fields if good else None


def read_json(path: Path, text: str) -> Records:
    """Read a JSON array of objects; each row's line is the one where its object starts."""
    records = Records()
    decoder = json.JSONDecoder()
    position = _SPACE.match(text).end()  # type: ignore[union-attr]  # the pattern matches everywhere
    if text[position : position + 1] != "[":
        raise BatchInputError(path, [(1, 'is no JSON array; expected [{"prompt": "a red mug"}, ...]')])
    line, counted = 1, 0  # lines are counted on from row to row: from the start each time would be quadratic
    position += 1
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return records.complete()
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            records.problems.append((error.lineno, f"is not valid JSON ({error.msg}); what follows was not read"))
            return records.complete()
        records.add(line, value)


def read_json_lines(path: Path, text: str) -> Records:
    """Read a JSON object per line; blank lines are passed over."""
    records = Records()
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            records.add(line, json.loads(content))
        except json.JSONDecodeError as error:
            records.rows.append((line, None))
            records.row_problems.append((line, f"is not valid JSON ({error.msg} at column {error.colno})"))
    return records.complete()


def read_parquet(path: Path) -> Records:
    """Read a Parquet file; a row's line is its number, from 1.

    Raises:
        MissingExtraError: pyarrow is not installed.
        BatchInputError: The file is no Parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BatchInputError(path, [(None, f"cannot be read as Parquet ({error})")]) from error
    records = Records(columns=list(table.column_names), _seen=set(table.column_names))
    for line, value in enumerate(table.to_pylist(), start=1):
        records.add(line, value)
    return records.complete()


def _text(value: object) -> str | None:
    """Return a scalar as CSV would hold it, or None for what is no scalar."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return ""  # how tables with gaps hold numbers
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value) if isinstance(value, str | int) else None


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), "a list" if isinstance(value, list) else f"a {type(value).__name__}")
