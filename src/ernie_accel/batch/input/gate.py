"""The one gate for text from outside: a file's bytes become text, JSON becomes values, or a problem with its place."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ernie_accel.batch.errors import BatchInputError, Problem, shown
from ernie_accel.common.language import said

MAX_TABLE_BYTES = 2**29
"""Of a table that is text: half a gigabyte, some 1,000,000 rows. All of it is read before anything is drawn."""

MAX_JOB_BYTES = 100_000
"""Of a job file, which has some 40 keys."""

MAX_CHARACTERS = 131_072
"""Of one value: the default limit of Python's csv, here for every format."""

MAX_DEPTH = 32
"""Of lists and objects in one another."""

_UTF8_BOM = b"\xef\xbb\xbf"
_SAVE_AS = said("save it as UTF-8 (in Excel: 'CSV UTF-8') and run again")
_MAX_DIGITS = 30  # of a whole number; longer ones stay text, since int() refuses those of thousands of digits
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{\]}]', re.DOTALL)


class Repeated(dict[str, object]):
    """A JSON object in which `names` stand more than once; it holds the last value of each."""

    names: tuple[str, ...] = ()


class NotJsonError(ValueError):
    """Text that is no JSON; caught inside the package.

    Attributes:
        problem: The line within the text, and what is wrong.
    """

    def __init__(self, line: int, reason: str) -> None:
        self.problem: Problem = (line, reason)
        super().__init__(line, reason)


def read_text(path: Path, most: int = MAX_TABLE_BYTES) -> str:
    """Return what a UTF-8 file holds, without a byte order mark.

    Raises:
        BatchInputError: It cannot be read, is larger than `most` bytes, or is not UTF-8.
    """

    def refuse(message: str, line: int | None = None) -> NoReturn:
        raise BatchInputError(path, [(line, message)])

    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        refuse(said("does not exist; check the path"))
    except IsADirectoryError:
        refuse(said("is a folder; expected a file such as prompts.csv"))
    except (OSError, ValueError) as error:  # ValueError: the path itself has a NUL, or cannot be encoded
        refuse(said("cannot be read: {reason}", reason=getattr(error, "strerror", None) or str(error)))
    if len(data) > most:
        refuse(said("has more than {most:,} bytes; split it", most=most))
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]:
        refuse(said("is UTF-16, as Excel's 'Unicode Text' is; {fix}", fix=_SAVE_AS), line=1)
    start = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        line = 1 + len(re.findall(rb"\r\n?|\n", data[:offset]))
        wrong = "is not UTF-8: byte 0x{byte:02X} at offset {offset}; {fix}"
        refuse(said(wrong, byte=data[offset], offset=offset, fix=_SAVE_AS), line)


def text_problem(text: str) -> str | None:
    """Return why a text cannot be used anywhere (None: it can): every file, name and request is UTF-8 without NUL."""
    if len(text) > MAX_CHARACTERS:
        return said("has {count:,} characters; expected at most {most:,}", count=len(text), most=MAX_CHARACTERS)
    if "\0" in text:
        return said("has a NUL character; remove it")
    if not text.isascii() and (found := _SURROGATE.search(text)):
        return f"has half of a surrogate pair, {shown(found[0])}, at character {found.start() + 1}; write it whole"
    return None


def fields_problem(fields: Mapping[str, str]) -> str | None:
    """Return which of a row's texts, or of their names, cannot be used (None: all can)."""
    together = "".join((*fields, *fields.values()))
    if len(together) <= MAX_CHARACTERS and text_problem(together) is None:  # nearly always, and quickly known
        return None
    for name, text in fields.items():
        if reason := text_problem(name) or text_problem(text):
            return said("{name} {reason}", name=shown(name), reason=reason)
    return None


def decode_json(text: str) -> object:
    """Return the value that JSON text holds; an object that names a key twice becomes a `Repeated`.

    Raises:
        NotJsonError: It is not JSON, or is nested too deeply.
    """
    with _json_problems(text):
        return _DECODER.decode(text)


def decode_json_array(text: str) -> Iterator[tuple[int, object]] | None:
    """Yield the line and the value of each element of a JSON array; None if the text holds something else.

    Raises:
        NotJsonError: The text is not JSON from end to end. This is known before the first element.
    """
    with _json_problems(text):
        # Read for its form alone, by the standard parser, which keeps no places; nothing of it is kept.
        whole = json.loads(text, object_pairs_hook=lambda pairs: None, parse_int=len, parse_float=len)
    return _elements(text) if isinstance(whole, list) else None


def _elements(text: str) -> Iterator[tuple[int, object]]:
    """Yield the elements of what is known to be a JSON array, so that only its commas stand between them."""
    position = text.index("[") + 1
    line, counted = 1, 0  # lines are counted on from row to row: from the start each time would be quadratic
    while True:
        position = _SPACE_OR_COMMA.match(text, position).end()  # type: ignore[union-attr]  # it matches everywhere
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        with _json_problems(text):
            value, position = _DECODER.raw_decode(text, position)
        yield line, value


@contextmanager
def _json_problems(text: str) -> Iterator[None]:
    """Turn what the standard parser raises into a `NotJsonError` with a place."""
    try:
        yield
    except json.JSONDecodeError as error:
        hint = "; expected one array or object: put an object on each line and name the file .jsonl, or join them"
        reason = f"is not valid JSON ({error.msg} at column {error.colno}){hint if error.msg == 'Extra data' else ''}"
        raise NotJsonError(error.lineno, reason) from error
    except RecursionError as error:
        raise NotJsonError(*_too_deep(text)) from error


def _too_deep(text: str) -> tuple[int, str]:
    """Return the line where brackets are nested too deeply, and say so."""
    depth = start = 0
    for token in _JSON_TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            start = token.start()
            break
    column = start - text.rfind("\n", 0, start)
    reason = f"is nested more than {MAX_DEPTH} levels deep at column {column}; flatten it"
    return 1 + text.count("\n", 0, start), reason


def nesting_problem(value: object) -> str | None:
    """Return why a list or object cannot be kept as JSON text (None: it can)."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for each in level:
            if isinstance(each, Repeated):
                return f"has the key {shown(each.names[0])} twice; keep one"
            inner += each.values() if isinstance(each, dict) else each if isinstance(each, list | tuple) else ()
        if not inner:
            return None
        if len(inner) > MAX_CHARACTERS:  # also a list that holds itself, which only rows from Python can
            return f"has more than {MAX_CHARACTERS:,} values in it; flatten it"
        level = inner
    return f"is nested more than {MAX_DEPTH} levels deep; flatten it"


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = Repeated(found)
    repeated.names = tuple(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return repeated


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MAX_DIGITS else digits


def _fraction(digits: str) -> float | str:
    number = float(digits)
    return number if abs(number) != float("inf") else digits  # 1e400 is nothing that a float holds


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_float=_fraction)
_SPACE_OR_COMMA = re.compile(r"[ \t\n\r,]*")
