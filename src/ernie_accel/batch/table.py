"""Read and check the table of a batch, so that bad input is known, all of it, before a model is loaded."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ernie_accel.batch.check import RowCheck, size_problem
from ernie_accel.batch.errors import BatchInputError, Problem
from ernie_accel.batch.formats import Records, read_json, read_json_lines, read_parquet
from ernie_accel.batch.naming import default_pattern, pattern_problems, template_problems
from ernie_accel.batch.row import SETTINGS, Columns, Row

_UTF8_BOM = b"\xef\xbb\xbf"
_SAVE_AS = "save it as UTF-8 (in Excel: 'CSV UTF-8') and run again"


def read_table(
    path: str | Path,
    *,
    pattern: str | None = None,
    size_multiple: int = 16,
    default_size: tuple[int, int] | None = None,
    template: str | None = None,
    folder_by: str | None = None,
    skipped: list[Problem] | None = None,
) -> list[Row]:
    """Read a table with a `prompt` column, and check all of it.

    By the file's ending: ``.json`` (an array of objects), ``.jsonl`` (an object per line), ``.parquet``, and anything
    else as UTF-8 CSV. Blank lines of a CSV, and rows in which every one of several fields is empty (Excel leaves
    such), are passed over.

    Args:
        path: The file; a byte order mark is accepted.
        pattern: How pictures are named: `{column}` for any column and `{index}` (or `{index:05d}`) for the
            0-based row number. Default: `{sku}.png` if there is a `sku` column, else `{index:05d}.png`.
        size_multiple: Width and height must be divisible by this, in pixels (16 for ERNIE-Image).
        default_size: Width and height in pixels for rows that do not give theirs; None: the pipeline's own.
        template: How prompts are made: text with `{column}` for any column. Without it the column `prompt` holds them.
        folder_by: A column whose values are the sub-folders that pictures are sorted into.
        skipped: A list to which the problems of single rows are added; such rows are left out, instead of refusing
            the file. They keep their number, so that mending them later changes no other row.

    Returns:
        At least one row per picture, in the file's order, with file names that are distinct on every file system.

    Raises:
        BatchInputError: With every problem of the file.
        MissingExtraError: A Parquet file needs pyarrow.
    """
    path = Path(path)
    records = _read_records(path)
    named = [name for name in records.columns if name]
    problems = list(records.problems)
    if not named and (problems or records.row_problems):  # nothing was read; what follows would only repeat it
        raise BatchInputError(path, sorted([*problems, *records.row_problems], key=_line))
    problems += [(records.header_line, message) for message in _name_problems(records.columns, template is not None)]
    problems += [(None, message) for message in _option_problems(named, template, folder_by)]
    if default_size is not None and (reason := size_problem(*default_size, size_multiple)):
        problems.append((None, f"default {reason}"))
        default_size = None  # told once, not for every row
    pattern = default_pattern(named) if pattern is None else pattern
    bad_pattern = pattern_problems(pattern, named)
    problems += [(None, message) for message in bad_pattern]

    check = RowCheck(
        pattern=None if bad_pattern else pattern,
        template=None if problems else template,
        folder_by=None if problems else folder_by,
        size_multiple=size_multiple,
        default_size=default_size,
    )
    rows: list[Row] = []
    row_problems = list(records.row_problems)
    for index, (line, columns) in enumerate(records.rows):
        if columns is not None:
            made, messages = check.rows(line, index, columns)
            rows += made
            row_problems += [(line, message) for message in messages]
    if skipped is not None and not problems:
        skipped += sorted(row_problems, key=_line)
        row_problems = [] if rows else row_problems
    if not records.rows and not problems:
        problems.append((None, "has a header and no rows; add one line per picture"))
    if problems or row_problems:
        raise BatchInputError(path, sorted([*problems, *row_problems], key=_line))
    return rows


def _line(problem: Problem) -> int:
    return problem[0] or 0


def _read_records(path: Path) -> Records:
    kind = path.suffix.lower()
    if kind == ".parquet":
        if not path.is_file():
            raise BatchInputError(path, [(None, "does not exist; check the path")])
        return read_parquet(path)
    text = _read_text(path)
    if kind == ".json":
        return read_json(path, text)
    if kind in (".jsonl", ".ndjson"):
        return read_json_lines(path, text)
    return _read_csv(path, text)


def _read_csv(path: Path, text: str) -> Records:
    records = Records()
    if "\0" in text:
        lines = enumerate(io.StringIO(text, newline=""), start=1)
        records.row_problems += [(n, "has a NUL character; remove it") for n, content in lines if "\0" in content]
        text = text.replace("\0", "")  # csv refuses it before Python 3.11, which would hide what follows
    lines_of_fields = _records(text, records.problems)
    records.header_line, header = next(lines_of_fields, (1, []))
    header = [name.strip() for name in header]
    if not any(header):
        problems = [*records.problems, *records.row_problems]
        problems = problems or [(None, "is empty; expected a header such as 'sku,prompt' and a line per picture")]
        raise BatchInputError(path, problems)
    if "prompt" not in header and _separator(header):
        # every row would be misread for the same reason
        raise BatchInputError(path, [(records.header_line, message) for message in _name_problems(header, False)])
    records.columns = header
    unnamed_with_data: set[int] = set()
    for line, fields in lines_of_fields:
        if len(fields) != len(header):
            records.row_problems.append((line, _ragged(fields, header)))
            records.rows.append((line, None))
            continue
        unnamed_with_data |= {i for i, name in enumerate(header) if not name and fields[i].strip()}
        records.rows.append((line, Columns({k: v for k, v in zip(header, fields, strict=True) if k})))
    for i in sorted(unnamed_with_data):
        fix = "name it or delete it (pandas: to_csv(..., index=False))"
        records.problems.append((records.header_line, f"column {i + 1} has values but no name; {fix}"))
    return records


def _read_text(path: Path) -> str:
    def refuse(message: str, line: int | None = None) -> NoReturn:
        raise BatchInputError(path, [(line, message)])

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        refuse("does not exist; check the path")
    except IsADirectoryError:
        refuse("is a folder; expected a file such as prompts.csv")
    except (OSError, ValueError) as error:  # ValueError: the path itself has a NUL
        refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]:
        refuse(f"is UTF-16, as Excel's 'Unicode Text' is; {_SAVE_AS}", line=1)
    start = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        line = 1 + len(re.findall(rb"\r\n?|\n", data[:offset]))
        refuse(f"is not UTF-8: byte 0x{data[offset]:02X} at offset {offset}; {_SAVE_AS}", line)


def _records(text: str, problems: list[Problem]) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of each record that is not blank; note a problem where the CSV breaks."""
    # newline="": line ends inside quoted fields stay as they are. skipinitialspace: 'a, "b, c"' is common.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'close every quote, and double a quote inside quotes: "a 5"" plate"'
            first_line = text.splitlines()[0]
            if line == 1 and "," not in first_line and (separator := _separator([first_line])):
                hint = f"the separator looks like {separator}, expected ','"
            problems.append((line, f"is not valid CSV ({error}); {hint}"))
            return
        blank = not fields or (len(fields) > 1 and not any(value.strip() for value in fields))
        if not blank:
            yield line, fields


def _separator(header: Sequence[str]) -> str | None:
    """Return what separates the columns, quoted for a message, if that does not seem to be a comma."""
    if len(header) != 1:
        return None
    return next((repr(mark) for mark in (";", "\t", "|") if mark in header[0]), None)


def _name_problems(header: Sequence[str], has_template: bool) -> list[str]:
    """Return what is wrong with the names of the columns."""
    messages = []
    if "prompt" not in header and not has_template:
        found = ", ".join(repr(name) for name in header if name)
        message = f"has no 'prompt' column; found: {found}"
        if separator := _separator(header):
            message += f". The separator looks like {separator}; expected ',': save the file with commas"
        messages.append(message)
    for name, count in Counter(name for name in header if name).items():
        if count > 1:
            messages.append(f"has {count} columns named {name!r}; rename or delete all but one")
        # A setting under another spelling would be ignored, and the pictures quietly not what was asked for.
        meant = re.sub(r"[\s-]+", "_", name.lower()).replace("num_inference_steps", "steps")
        if meant in SETTINGS and meant != name:
            messages.append(f"column {name!r} would be ignored; rename it to {meant!r}")
    return messages


def _ragged(fields: Sequence[str], header: Sequence[str]) -> str:
    message = f"has {len(fields)} fields, the header has {len(header)}; "
    if len(fields) > len(header):
        return message + 'put quotes around a value with a comma in it: "red, glossy"'
    missing = ", ".join(repr(name) for name in header[len(fields) :])
    return message + f"nothing is given for {missing}: add the value, or a comma for each empty one"


def _option_problems(columns: Sequence[str], template: str | None, folder_by: str | None) -> list[str]:
    messages = [] if template is None else template_problems(template, columns)
    if folder_by is not None and folder_by not in columns:
        found = ", ".join(repr(name) for name in columns)
        messages.append(f"pictures cannot be sorted by {folder_by!r}: there is no such column; found: {found}")
    return messages
