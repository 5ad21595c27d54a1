"""Name pictures by patterns like ``{sku}.png``, and refuse every name that could leave the output folder.

The rules are those of the strictest system, everywhere: a table that works on Linux also works on Windows and
macOS, and a folder can be copied between them.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Collection, Iterator, Mapping

from ernie_accel.batch.errors import shown
from ernie_accel.batch.input.gate import text_problem
from ernie_accel.common.language import said

MAX_NAME_BYTES = 255
"""The longest file name in bytes of UTF-8 that ext4, XFS, APFS and NTFS all take."""

REJECTED_FOLDER = "rejected"
"""Where pictures go that did not pass the sifting; nothing else may."""

OLDER_FOLDER = "older"
"""Inside that, the pictures that failed rows would have replaced."""

REROLL_FOLDER = "reroll-{}"
"""Inside that, the pictures of further seeds, by their number."""

JOB_FOLDER = ".ernie-accel"
"""Where a job keeps what it knows, in its output folder."""

JOB_FILES = ("manifest.csv", "manifest.jsonl", "report.html", "report.md")
"""What a job writes beside its pictures, which no folder may be called; its own folder begins with a dot."""

# Not for pictures that are in their place: inside the rejected folder they would meet those that are not.
_RESERVED_FOLDER = re.compile(rf"{REJECTED_FOLDER}|{OLDER_FOLDER}|{REROLL_FOLDER.format('[0-9]+')}")
_PICTURE_SUFFIX = ".png"

_FORBIDDEN = '/\\<>:"|?*'
_ORDINARY = re.compile(r"[A-Za-z0-9 _.()-]*")
_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: controls, lone surrogates, line separators
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file#naming-conventions
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{device}{digit}" for device in ("COM", "LPT") for digit in "123456789¹²³"
}
_MAX_LISTED = 20
_INDEX_SPEC = re.compile(r"(0?[1-9])?d?")


def default_pattern(columns: Collection[str]) -> str:
    """Return ``{sku}.png`` for a table with a ``sku`` column, else ``{index:05d}.png``."""
    return "{sku}.png" if "sku" in columns else "{index:05d}.png"


def pattern_problems(pattern: str, columns: Collection[str]) -> list[str]:
    """Return every reason why a naming pattern cannot name the rows of a table (empty list: it can).

    Args:
        pattern: Text with ``{column}`` fields, and ``{index}`` or ``{index:05d}`` for the 0-based row number.
        columns: The table's column names.
    """
    heading = f"naming pattern {shown(pattern)}"
    try:
        pieces = list(_pieces(pattern))
    except ValueError as error:
        return [f"{heading} cannot be read ({error}); write it like '{{sku}}.png'"]
    valid = _fields(dict.fromkeys([*columns, "index"]))
    problems = []
    for literal, field, suffix in pieces:
        if reason := _bad_characters(literal):
            problems.append(f"{heading} {reason}; pictures go straight into the output folder")
        if field is None:
            continue
        if field == "index" and field in columns:
            problems.append(f"{heading} uses {{index}}, the row number; rename the column of that name")
        elif field == "index":
            if not _INDEX_SPEC.fullmatch(suffix.removeprefix(":")):
                problems.append(f"{heading} has {{index{suffix}}}; expected {{index}} or {{index:05d}}")
        elif field not in columns:
            reason = "attributes and indices are refused" if set(field) & set(".[") else "there is no such column"
            problems.append(f"{heading} uses {{{field}}}, but {reason}; valid here: {valid}")
        elif suffix:
            problems.append(f"{heading} has {{{field}{suffix}}}; columns go in as they are: {{{field}}}")
    literal, field, _ = pieces[-1] if pieces else ("", None, "")
    if field is None and not literal.lower().endswith(".png"):
        problems.append(f"{heading} does not end in '.png', the only format written; end it so")
    return problems


def template_problems(template: str, columns: Collection[str]) -> list[str]:
    """Return every reason why a prompt template cannot be filled from the rows of a table (empty list: it can)."""
    heading = f"template {shown(template)}"
    if reason := text_problem(template):
        return [f"{heading} {reason}"]
    try:
        pieces = list(_pieces(template))
    except ValueError as error:
        return [f"{heading} cannot be read ({error}); write it like 'a photo of {{name}}', and a brace as '{{{{'"]
    fields = [(field, suffix) for _, field, suffix in pieces if field is not None]
    problems = [] if fields else [f"{heading} names no column; every picture would have the same prompt"]
    valid = _fields(columns)
    for field, suffix in fields:
        if field not in columns:
            problems.append(f"{heading} uses {{{field}}}, but there is no such column; valid here: {valid}")
        elif suffix:
            problems.append(f"{heading} has {{{field}{suffix}}}; columns go in as they are: {{{field}}}")
    return problems


def fill_pattern(pattern: str, columns: Mapping[str, str], index: int) -> str:
    """Return one row's file name or prompt, by a pattern or template that nothing was found wrong with."""
    name = ""
    for literal, field, suffix in _pieces(pattern):
        name += literal
        if field == "index" and field not in columns:
            name += format(index, suffix.removeprefix(":"))
        elif field is not None:
            name += columns[field]
    return name


@functools.lru_cache(maxsize=4096)  # a row's name is looked at when the table is checked and when the row is made
def name_problem(name: str) -> str | None:
    """Return why `name` cannot be a picture's file name, directly inside a folder (None: it can)."""
    stem, suffix = name[:-4], name[-4:]
    if suffix.lower() == ".png":
        return _part_problem(name, stem, "has nothing before '.png'")
    reasons = ("does not end in '.png'", _part_problem(name, name, "has nothing before '.png'"))
    return " and ".join(reason for reason in reasons if reason)


@functools.lru_cache(maxsize=4096)
def folder_problem(name: str) -> str | None:
    """Return why `name` cannot be a sub-folder for pictures, directly inside the output folder (None: it can)."""
    key = collision_key(name)
    if _RESERVED_FOLDER.fullmatch(key):
        return "is a folder the job itself uses"
    if key in JOB_FILES:
        return "is a file the job itself writes"
    if key.endswith(_PICTURE_SUFFIX):
        return "ends in '.png', as pictures do: a folder and a picture of one name exclude each other"
    return _part_problem(name, name, "is empty")


def _part_problem(name: str, stem: str, if_empty: str) -> str | None:
    """Return why `name` cannot be one part of a path; `stem` is what stands before the file type."""
    reasons = []
    if reason := _bad_characters(name):
        reasons.append(reason)
    if ".." in name:
        reasons.append("has '..'")
    if not stem:
        reasons.append(if_empty)
    elif stem.startswith((".", " ")):
        reasons.append("starts with a dot or space")
    if stem.endswith((".", " ")):
        reasons.append("has a dot or space at its end")
    if stem.split(".")[0].rstrip(" ").upper() in _RESERVED:
        reasons.append("is a device name on Windows")
    # "replace": a lone surrogate is refused above, and must not break the count here.
    if (size := len(name.encode("utf-8", "replace"))) > MAX_NAME_BYTES:
        reasons.append(f"takes {size} bytes, more than the {MAX_NAME_BYTES} a file name may have")
    return " and ".join(reasons) or None


def collision_key(name: str) -> str:
    """Return what two names share when some file system holds them for one (case, Unicode composition)."""
    # Canonical caseless matching, Unicode Standard section 3.13, definition D145.
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def is_name_of_the_job(name: str) -> bool:
    """Return whether a path in the output folder is a picture's, or that of something else that a job keeps there."""
    key = collision_key(name)
    return key in JOB_FILES or key.endswith(".png") or key.startswith((f"{JOB_FOLDER}/", f"{REJECTED_FOLDER}/"))


class TakenNames:
    """The names that the rows of one job have taken, as the strictest file system compares them."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[str, int, int]] = {}
        self._folders: dict[str, tuple[str, int]] = {}

    def take_folder(self, folder: str, line: int) -> str | None:
        """Return how another row spells the same folder (None: nobody spells it otherwise)."""
        spelt, first_line = self._folders.setdefault(collision_key(folder), (folder, line))
        if spelt == folder:
            return None
        same = "is {name} on line {line}, the same where letter case or Unicode form is ignored"
        return said(same, name=shown(spelt), line=first_line)

    def take(self, path: str, line: int, index: int) -> str | None:
        """Take a picture's path for a row; return by which other row it is taken (None: it was free).

        Args:
            path: As `Row.path`.
            line: The row's 1-based line.
            index: The row's 0-based number, which tells rows on one line apart.
        """
        mine = (path, line, index)
        first = self._names.setdefault(collision_key(path), mine)
        if first is mine:
            return None
        first_path, first_line, first_index = first
        by = said("line {line}", line=first_line)
        if first_line == line:
            by = said("row {row}, on the same line", row=first_index + 1)
        if first_path != path:
            alike = "{by} as {name}, the same name where letter case or Unicode form is ignored"
            by = said(alike, by=by, name=shown(first_path.rpartition("/")[2]))
        return said("is taken by {by}", by=by)


def _pieces(pattern: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield (literal text, the field after it or None, what follows the field's name: '!r', ':05d')."""
    # Only parsed, never `str.format`: that would follow attributes such as {sku.__class__}.
    for literal, field, spec, conversion in string.Formatter().parse(pattern):
        yield literal, field, (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")


def _fields(names: Collection[str]) -> str:
    shown_names = [f"{{{name}}}" for name in list(names)[:_MAX_LISTED]]
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(shown_names) + more


def _bad_characters(text: str) -> str | None:
    if _ORDINARY.fullmatch(text):  # nearly always, and quickly known
        return None
    bad = [c for c in dict.fromkeys(text) if c in _FORBIDDEN or unicodedata.category(c) in _CONTROLS]
    return "has " + ", ".join("NUL" if c == "\0" else repr(c) for c in bad) if bad else None
