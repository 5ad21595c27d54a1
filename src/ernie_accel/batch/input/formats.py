"""Read CSV, JSON, JSON lines and Parquet as the same thing: named columns of text, and where each row stands."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_accel.batch.errors import BatchInputError, Problem, listed, shown
from ernie_accel.batch.input.cells import is_manifest, unescaped
from ernie_accel.batch.input.gate import (
    NotJsonError,
    Repeated,
    decode_json,
    decode_json_array,
    fields_problem,
    nesting_problem,
    read_text,
    text_problem,
)
from ernie_accel.batch.input.row import SETTINGS, Columns
from ernie_accel.common.language import said
from ernie_accel.core.errors import MissingExtraError

if TYPE_CHECKING:
    import pyarrow

MAX_ROWS = 1_000_000
MAX_COLUMNS = 1_000
MAX_VALUES = 20_000_000
"""Rows times columns; a row takes every column, also those that only others name."""
MAX_TOTAL_CHARACTERS = 2**29
"""Of all values together: a small Parquet file can hold one long text a million times."""

_PARQUET_ROWS_AT_ONCE = 1_000
_MAX_BITS = 4_096  # of whole numbers in rows from Python, which does not write out those of thousands of digits
_NUL = "\udc00"  # stands for NUL while csv reads, which refuses it before Python 3.11; UTF-8 cannot hold it


@dataclass
class Records:
    """What a table holds, before its meaning is checked.

    Attributes:
        header_line: 1-based line of the column names; None where every row names its own.
        delimiter: What separates the columns of a CSV.
        columns: The names of the columns, in order.
        rows: Each row's 1-based line and its fields; None for a row that cannot be read, which keeps its number.
        problems: What is wrong with the table as a whole.
        row_problems: What is wrong with single rows.
    """

    header_line: int | None = None
    delimiter: str = ","
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[int, Columns | None]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    row_problems: list[Problem] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _characters: int = 0

    def add(self, line: int, value: object) -> None:
        """Add a row given as a mapping; anything else is noted as a problem of its line."""
        if isinstance(value, Mapping):
            fields, messages = _fields(value)
        else:
            fields, messages = {}, [f'is {_kind(value)}; expected an object such as {{"prompt": "a red mug"}}']
        self._add(line, fields, messages)

    def add_unreadable(self, line: int, message: str) -> None:
        """Add a row that cannot be read."""
        self._add(line, {}, [message])

    def complete(self) -> Records:
        """Leave out blank rows, give every row every column, empty where it does not name it, and return this object.

        Blank are rows of which every one of several fields is empty: spreadsheets leave such behind.
        """
        blank = dict.fromkeys(self.columns, "")
        several = len(self.columns) > 1
        self.rows = [
            (line, None if row is None else Columns(blank | dict(row)))
            for line, row in self.rows
            if row is None or not several or any(map(str.strip, row.values()))
        ]
        return self

    def check_limits(self, path: Path | None) -> None:
        """Stop reading where the table is beyond a limit.

        Raises:
            BatchInputError: It is.
        """
        if problem := _limits_problem(len(self.rows), len(self.columns), self._characters):
            raise BatchInputError(path, [(None, problem)])

    def _add(self, line: int, fields: Mapping[str, str], messages: Sequence[str]) -> None:
        if reason := fields_problem(fields):
            messages = [*messages, reason]
        self.row_problems += [(line, message) for message in messages]
        self.rows.append((line, None if messages else Columns(fields)))
        for name in fields:
            if name not in self._seen and not (messages and text_problem(name)):  # such a name is the row's problem
                self._seen.add(name)
                self.columns.append(name)
        self._characters += sum(map(len, fields.values()))


def _limits_problem(rows: int, columns: int, characters: int) -> str | None:
    """Return which limit a table is beyond (None: none)."""
    if rows > MAX_ROWS:
        return f"has more than {MAX_ROWS:,} rows; split it"
    if columns > MAX_COLUMNS:
        return f"has more than {MAX_COLUMNS:,} columns; leave out those that no picture needs"
    if rows * columns > MAX_VALUES:
        return f"has more than {MAX_VALUES:,} values (rows times columns); split it, or leave columns out"
    if characters > MAX_TOTAL_CHARACTERS:
        return f"holds more than {MAX_TOTAL_CHARACTERS:,} characters; split it"
    return None


def read_records(path: Path) -> Records:
    """Read a table by its file's ending.

    Raises:
        BatchInputError: It cannot be read at all, or is beyond a limit.
        MissingExtraError: pyarrow is not installed, which reads Parquet.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(path)
    text = read_text(path)
    if kind == ".json":
        return read_json(path, text)
    if kind in (".jsonl", ".ndjson"):
        return read_json_lines(path, text)
    return read_csv(path, text, "\t" if kind == ".tsv" else ",")


def collect(path: Path | None, rows: Iterable[tuple[int, object]], records: Records | None = None) -> Records:
    """Return rows, given as lines and mappings, as records.

    Raises:
        BatchInputError: There are too many of them, or of their columns; known as soon as they are met.
    """
    records = records or Records()
    for line, value in rows:
        records.add(line, value)
        records.check_limits(path)
    return records.complete()


def read_json(path: Path, text: str) -> Records:
    """Read a JSON array of objects; each row's line is the one where its object starts."""
    try:
        if not text.strip():
            raise BatchInputError(path, [(None, 'is empty; expected [{"prompt": "a red mug"}, ...]')])
        elements = decode_json_array(text)
        if elements is None:
            raise BatchInputError(path, [(1, 'is not a JSON array; expected [{"prompt": "a red mug"}, ...]')])
        return collect(path, elements)
    except NotJsonError as error:
        line, message = error.problem
        raise BatchInputError(path, [(line, f"{message}; nothing of the file was used")]) from error


def read_json_lines(path: Path, text: str) -> Records:
    """Read a JSON object per line; blank lines are skipped."""
    records = Records()
    # Not str.splitlines: text in JSON may hold U+2028, U+0085 and others that it treats as line ends.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip(" \t\r"):
            continue
        try:
            records.add(line, decode_json(content))
        except NotJsonError as error:
            records.add_unreadable(line, error.problem[1])
        records.check_limits(path)
    return records.complete()


def read_csv(path: Path, text: str, delimiter: str = ",") -> Records:
    """Read CSV with a header; blank lines are skipped."""
    records = Records(delimiter=delimiter)
    has_nul = "\0" in text
    if has_nul:
        text = text.replace("\0", _NUL)
    lines = _csv_lines(text, delimiter, records.problems)
    records.header_line, header = next(lines, (1, []))
    header = [name.replace(_NUL, "\0").strip() for name in header]
    if not any(header):
        empty = "is empty; expected a header such as 'sku,prompt' and a line per picture"
        raise BatchInputError(path, records.problems or [(None, empty)])
    escapes = is_manifest(header)
    if escapes:
        header = list(map(unescaped, header))
    records.columns, records._seen = header, set(header)
    if "prompt" not in header and separator_of(header, delimiter):
        return records  # every row would be misread for the same reason
    unnamed_with_data: set[int] = set()
    for line, values in lines:
        if has_nul:
            values = [value.replace(_NUL, "\0") for value in values]
        if escapes:
            values = list(map(unescaped, values))
        if len(values) != len(header):
            records.add_unreadable(line, _ragged(values, header, delimiter))
        else:
            unnamed_with_data |= {i for i, name in enumerate(header) if not name and values[i].strip()}
            records._add(line, {k: v for k, v in zip(header, values, strict=True) if k}, [])
        records.check_limits(path)
    for i in sorted(unnamed_with_data):
        fix = said("name it or delete it (pandas: to_csv(..., index=False))")
        unnamed = said("column {column} has values but no name; {fix}", column=i + 1, fix=fix)
        records.problems.append((records.header_line, unnamed))
    return records


def separator_of(header: Sequence[str], delimiter: str = ",") -> str | None:
    """Return what separates the columns, quoted for a message, if that does not seem to be `delimiter`."""
    if len(header) != 1:
        return None
    return next((repr(mark) for mark in (",", ";", "\t", "|") if mark != delimiter and mark in header[0]), None)


def _csv_lines(text: str, delimiter: str, problems: list[Problem]) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of each record that is not blank; note a problem where the CSV breaks."""
    # newline="": line ends inside quoted fields stay as they are. skipinitialspace: 'a, "b, c"' is common.
    source = io.StringIO(text, newline="")
    reader = csv.reader(source, strict=True, skipinitialspace=True, delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = said('close every quote, and double a quote inside quotes: "a 5"" plate"')
            first_line = text[: text.find("\n") if "\n" in text else None]
            if line == 1 and delimiter not in first_line and (found := separator_of([first_line], delimiter)):
                hint = said("the separator looks like {found}, expected {expected!r}", found=found, expected=delimiter)
            problems.append((line, said("is not valid CSV ({error}); {hint}", error=str(error), hint=hint)))
            return
        blank = not fields or (len(fields) > 1 and not any(value.strip() for value in fields))
        if not blank:
            yield line, fields


def _ragged(values: Sequence[str], header: Sequence[str], delimiter: str) -> str:
    mark = said({",": "comma", "\t": "tab"}[delimiter])
    if len(values) > len(header):
        quote = 'put quotes around a value with a {mark} in it: "red{delimiter} glossy"'
        fix = said(quote, mark=mark, delimiter=delimiter)
    else:
        add = "nothing is given for {missing}: add the value, or a {mark} for each empty one"
        fix = said(add, missing=listed(header[len(values) :]), mark=mark)
    return said(
        "has {found} fields, the header has {expected}; {fix}", found=len(values), expected=len(header), fix=fix
    )


def _read_parquet(path: Path) -> Records:
    """Read a Parquet file; a row's line is its number, from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    if not path.is_file():
        found = "is a folder; expected a file" if path.is_dir() else "does not exist; check the path"
        raise BatchInputError(path, [(None, found)])
    # ValueError: text in it that is not UTF-8. MemoryError: sizes in a damaged file that cannot be.
    broken = (pyarrow.ArrowException, OSError, ValueError, MemoryError)
    try:
        metadata, schema = (read(path) for read in (pyarrow.parquet.read_metadata, pyarrow.parquet.read_schema))
        names = [str(name) for name in schema.names]
        size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        if problem := _limits_problem(metadata.num_rows, len(names), size):  # known without reading a row
            raise BatchInputError(path, [(None, problem)])
        # Texts that the file holds once stay single: repeated for each of 1,000 rows they could fill the memory.
        texts = [field.name for field in schema if str(field.type) in ("string", "binary", "large_string")]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            records = Records(columns=[name.strip() for name in names], _seen={name.strip() for name in names})
            batches = file.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE)
            return collect(path, enumerate(_parquet_rows(names, batches), start=1), records)
    except BatchInputError:
        raise
    except broken as error:
        raise BatchInputError(path, [(None, f"cannot be read as Parquet ({error})")]) from error


def _parquet_rows(names: Sequence[str], batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Mapping[str, object]]:
    for batch in batches:
        columns = [_python_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _python_values(column: pyarrow.Array) -> list[object]:
    """Return a column's values as Python holds them: what it cannot hold (nanoseconds, the year 300,000) as text."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        known = _python_values(column.dictionary)
        places = column.indices.to_pylist()
        if any(place is not None and not 0 <= place < len(known) for place in places):
            raise ValueError("a value points beyond its dictionary")  # Arrow does not look in a damaged file
        return [None if place is None else known[place] for place in places]
    if pyarrow.types.is_float16(column.type) or pyarrow.types.is_float32(column.type):
        column = column.cast(pyarrow.string()).cast(pyarrow.float64())  # 4.1 as it was written, not 4.099999904632568
    try:
        return list(column.cast(_readable(column.type, utc=True)).cast(_readable(column.type)).to_pylist())
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):
        pass  # a type without such a cast, or a value that is not UTF-8: each for itself
    values: list[object] = []
    for value in column:
        try:
            values.append(value.as_py())
        except (pyarrow.ArrowException, ValueError, OverflowError, TypeError) as error:
            values.append(_Unreadable(f"holds a {column.type} that cannot be read ({error}); save it as text"))
    return values


def _readable(kind: pyarrow.DataType, utc: bool = False) -> pyarrow.DataType:
    """Return the Arrow type in which a type is read: dates and times as text.

    Args:
        kind: The type.
        utc: Only put timestamps into UTC, whose time zone, other than theirs, is known everywhere.
    """
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return _readable(kind.value_type, utc)
    if types.is_struct(kind):
        return pyarrow.struct([each.with_type(_readable(each.type, utc)) for each in kind])
    if types.is_map(kind):
        return pyarrow.map_(_readable(kind.key_type, utc), _readable(kind.item_type, utc))
    if types.is_list(kind) or types.is_large_list(kind):
        return pyarrow.list_(_readable(kind.value_type, utc))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(_readable(kind.value_type, utc), kind.list_size)
    if utc:
        return pyarrow.timestamp(kind.unit, "UTC") if types.is_timestamp(kind) and kind.tz else kind
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pyarrow.string()
    return kind


class _Unreadable:
    """A value that has no reading."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _fields(value: Mapping[object, object]) -> tuple[dict[str, str], list[str]]:
    """Return a row's fields as CSV would hold them, and what is wrong with it."""
    fields: dict[str, str] = {}
    repeated = value.names if isinstance(value, Repeated) else ()
    messages = [f"names {shown(name)} twice; keep one" for name in repeated]
    for given, content in value.items():
        name = str(given).strip()
        text, reason = _text(name, content)
        if reason:
            messages.append(f"{shown(name)} {reason}")
        elif not name:
            if text.strip():
                messages.append(f"has a value without a name, {shown(text)}; name it or delete it")
        elif name in fields:
            messages.append(f"names {shown(name)} twice, once with spaces around it; keep one")
        else:
            fields[name] = text
    return fields, messages


def _text(name: str, value: object) -> tuple[str, str | None]:
    """Return a value as CSV would hold it, and why it cannot be held."""
    if isinstance(value, str):
        return value, None
    if value is None:
        return "", None
    if isinstance(value, bool):
        return str(value).lower(), None
    if isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            return "", "has thousands of digits; save it as text"
        return str(value), None
    if isinstance(value, float):
        if math.isnan(value):
            return "", None  # how tables with gaps hold numbers
        # Beyond 2^53 floats leave out whole numbers: what a seed there was is not known any more.
        return str(int(value)) if value.is_integer() and abs(value) <= 2**53 else repr(value), None
    if isinstance(value, Decimal):
        return str(int(value)) if value.is_finite() and value == int(value) else str(value), None
    if isinstance(value, bytes):  # older writers of Parquet do not say that their bytes are text
        try:
            return value.decode("utf-8"), None
        except UnicodeDecodeError:
            return value.hex(), "is not UTF-8; save it as text" if name in SETTINGS else None
    if isinstance(value, _Unreadable):
        return "", value.reason
    if not isinstance(value, dict | list | tuple):
        return str(value), None
    if name in SETTINGS:
        return "", f"is {_kind(value)}; expected text, a number, true, false or null"
    if reason := nesting_problem(value):
        return "", reason
    try:
        return json.dumps(value, ensure_ascii=False, default=str), None
    except (TypeError, ValueError) as error:  # rows from Python: keys that JSON does not have, huge numbers
        return "", f"cannot be kept as JSON text ({error})"


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), "a list" if isinstance(value, list) else f"a {type(value).__name__}")
