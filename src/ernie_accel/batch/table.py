"""Read and check the table of a batch, so that bad input is known, all of it, before a model is loaded."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ernie_accel.batch.errors import BatchInputError, Problem
from ernie_accel.batch.naming import (
    collision_key,
    default_pattern,
    fill_pattern,
    name_problem,
    pattern_problems,
)
from ernie_accel.batch.row import MAX_GUIDANCE, MAX_SEED, MAX_SIDE, MAX_STEPS, SETTINGS, Columns, Row

_UTF8_BOM = b"\xef\xbb\xbf"
_SAVE_AS = "save it as UTF-8 (in Excel: 'CSV UTF-8') and run again"


def read_table(
    path: str | Path,
    *,
    pattern: str | None = None,
    size_multiple: int = 16,
    default_size: tuple[int, int] | None = None,
) -> list[Row]:
    """Read a UTF-8 CSV file with a `prompt` column and check all of it.

    Blank lines, and rows in which every one of several fields is empty (Excel leaves such), are passed over.

    Args:
        path: The file; a byte order mark is accepted.
        pattern: How pictures are named: `{column}` for any column and `{index}` (or `{index:05d}`) for the
            0-based row number. Default: `{sku}.png` if there is a `sku` column, else `{index:05d}.png`.
        size_multiple: Width and height must be divisible by this, in pixels (16 for ERNIE-Image).
        default_size: Width and height in pixels for rows that do not give theirs; None: the pipeline's own.

    Returns:
        At least one row, in the file's order, with file names that are distinct on every file system.

    Raises:
        BatchInputError: With every problem of the file.
    """
    path = Path(path)
    problems: list[Problem] = []
    text = _read_text(path)
    if "\0" in text:
        lines = enumerate(io.StringIO(text, newline=""), start=1)
        problems += [(n, "has a NUL character; remove it") for n, content in lines if "\0" in content]
        text = text.replace("\0", "")  # csv refuses it before Python 3.11, which would hide what follows
    records = _records(text, problems)

    header_line, header = next(records, (1, []))
    header = [name.strip() for name in header]
    named = [name for name in header if name]
    if not named and not problems:
        problems.append((None, "is empty; expected a header such as 'sku,prompt' and a line per picture"))
    if not named:
        raise BatchInputError(path, problems)
    problems += [(header_line, message) for message in _header_problems(header)]
    if "prompt" not in header and _separator(header):
        raise BatchInputError(path, problems)  # every row would be misread for the same reason

    if default_size is not None and (reason := _size_problem(*default_size, size_multiple)):
        problems.append((None, f"default {reason}"))
        default_size = None  # told once, not for every row
    pattern = default_pattern(named) if pattern is None else pattern
    bad_pattern = pattern_problems(pattern, named)
    problems += [(None, message) for message in bad_pattern]

    rows: list[Row] = []
    taken: dict[str, tuple[int, str]] = {}
    unnamed_with_data: set[int] = set()
    for index, (line, fields) in enumerate(records):
        if len(fields) != len(header):
            problems.append((line, _ragged(fields, header)))
            continue
        unnamed_with_data |= {i for i, name in enumerate(header) if not name and fields[i].strip()}
        columns = Columns({name: value for name, value in zip(header, fields, strict=True) if name})
        messages: list[str] = []
        file_name = None if bad_pattern else fill_pattern(pattern, columns, index)
        if file_name is not None and (reason := _name_problem_in_table(file_name, pattern, line, taken)):
            messages.append(reason)
        row = _checked_row(line, index, columns, file_name, size_multiple, default_size, messages)
        problems += [(line, message) for message in messages]
        if row is not None and not problems:
            rows.append(row)
    for i in sorted(unnamed_with_data):
        fix = "name it or delete it (pandas: to_csv(..., index=False))"
        problems.append((header_line, f"column {i + 1} has values but no name; {fix}"))
    if not rows and not problems:
        problems.append((None, "has a header and no rows; add one line per picture"))
    if problems:
        raise BatchInputError(path, sorted(problems, key=lambda problem: problem[0] or 0))
    return rows


def _read_text(path: Path) -> str:
    def refuse(message: str, line: int | None = None) -> NoReturn:
        raise BatchInputError(path, [(line, message)])

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        refuse("does not exist; check the path")
    except IsADirectoryError:
        refuse("is a folder; expected a CSV file")
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
    if len(header) > 1:
        return None
    return next((repr(mark) for mark in (";", "\t", "|") if mark in header[0]), None)


def _header_problems(header: Sequence[str]) -> list[str]:
    messages = []
    if "prompt" not in header:
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


class _Settings:
    """The settings of one row, parsed; what is wrong with them gathers in `messages`."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns
        self.messages: list[str] = []

    def text(self, name: str) -> str | None:
        value = self._columns.get(name, "")
        return value if value.strip() else None

    def whole(self, name: str, low: int, high: int, fix: str) -> int | None:
        text = (self.text(name) or "").strip()
        if not text:
            return None
        # Not int() alone: it also takes '1_000' and the digits of other scripts, and balks at very long ones.
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
            self.messages.append(f"{name} {_shown(text)} is not a whole number; {fix}")
        elif not low <= int(text) <= high:
            self.messages.append(f"{name} {text} is not within {low} to {high}; {fix}")
        else:
            return int(text)
        return None

    def number(self, name: str, high: float, fix: str) -> float | None:
        text = (self.text(name) or "").strip()
        if not text:
            return None
        if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", text):
            self.messages.append(f"{name} {_shown(text)} is not a number; {fix}")
        elif not 0 <= float(text) <= high:
            self.messages.append(f"{name} {text} is not within 0 to {high:g}; {fix}")
        else:
            return float(text)
        return None

    def size(self, multiple: int, default: tuple[int, int] | None) -> tuple[int | None, int | None]:
        # Any whole number passes here, so that a bad size is told with the nearest good one.
        limit = 10**30
        found = len(self.messages)
        width = self.whole("width", -limit, limit, f"write pixels, e.g. {64 * multiple}, or leave it empty")
        height = self.whole("height", -limit, limit, f"write pixels, e.g. {64 * multiple}, or leave it empty")
        if default is not None and len(self.messages) == found:
            width, height = default[0] if width is None else width, default[1] if height is None else height
        if reason := _size_problem(width, height, multiple):
            self.messages.append(reason)
        return width, height


def _checked_row(
    line: int,
    index: int,
    columns: Columns,
    file_name: str | None,
    size_multiple: int,
    default_size: tuple[int, int] | None,
    messages: list[str],
) -> Row | None:
    """Return the row, or None with what is wrong with it added to `messages`."""
    settings = _Settings(columns)
    prompt = settings.text("prompt")
    if prompt is None and "prompt" in columns:
        settings.messages.append("prompt is empty; write what to draw, or delete the line")
    seed = settings.whole("seed", 0, MAX_SEED, "write digits, e.g. 42, or leave it empty")
    width, height = settings.size(size_multiple, default_size)
    steps = settings.whole("steps", 1, MAX_STEPS, "write digits, e.g. 8, or leave it empty")
    guidance_scale = settings.number("guidance_scale", MAX_GUIDANCE, "write e.g. 4.0, or leave it empty")
    messages += settings.messages
    if prompt is None or file_name is None or messages:
        return None
    return Row(
        line=line,
        index=index,
        prompt=prompt,
        file_name=file_name,
        negative_prompt=settings.text("negative_prompt"),
        seed=seed,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
        columns=columns,
    )


def _size_problem(width: int | None, height: int | None, multiple: int) -> str | None:
    """Return why a size cannot be made, with the nearest that can (None: it can, or is not given)."""
    given = {name: side for name, side in (("width", width), ("height", height)) if side is not None}
    nearest = {name: _nearest_side(side, multiple) for name, side in given.items()}
    if nearest == given:
        return None
    what = "size" if len(given) == 2 else next(iter(given))
    return (
        f"{what} {_by(given)} is not made of multiples of {multiple} from {multiple} to {MAX_SIDE}; "
        f"the nearest valid {what} is {_by(nearest)}"
    )


def _nearest_side(side: int, multiple: int) -> int:
    nearest = (side + multiple // 2) // multiple * multiple  # a tie goes up: no detail is lost
    return min(max(nearest, multiple), MAX_SIDE // multiple * multiple)


def _by(sides: Mapping[str, int]) -> str:
    return "x".join(str(side) for side in sides.values())


def _name_problem_in_table(file_name: str, pattern: str, line: int, taken: dict[str, tuple[int, str]]) -> str | None:
    """Return why a row cannot have its file name, by itself or beside the rows before (kept in `taken`)."""
    what = f"file name {_shown(file_name)} (from {pattern!r})"
    if reason := name_problem(file_name):
        return f"{what} {reason}; change the value, or name pictures by another column"
    first_line, first_name = taken.setdefault(collision_key(file_name), (line, file_name))
    if first_line == line:
        return None
    taken_by = f"line {first_line}"
    if first_name != file_name:
        taken_by += f" as {_shown(first_name)}, the same name where letter case or Unicode form is ignored"
    unique = pattern.removesuffix(".png") + "_{index}.png"
    return f"{what} is taken by {taken_by}; change one, or name pictures by {unique!r}"


def _shown(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")
