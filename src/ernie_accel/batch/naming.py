"""Name pictures by patterns like ``{sku}.png``, and refuse every name that could leave the output folder.

The rules are those of the strictest system, everywhere: a table that works on Linux also works on Windows and
macOS, and a folder can be copied between them.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Collection, Iterator, Mapping

MAX_NAME_BYTES = 255
"""The longest file name in bytes of UTF-8 that ext4, XFS, APFS and NTFS all take."""

REJECTED_FOLDER = "rejected"
"""Where pictures go that did not pass the sifting; nothing else may."""

OLDER_FOLDER = "older"
"""Inside that, the pictures that failed rows would have replaced."""

REROLL_FOLDER = "reroll-{}"
"""Inside that, the pictures of further seeds, by their number."""

# Not for pictures that are in their place: inside the rejected folder they would meet those that are not.
_RESERVED_FOLDER = re.compile(rf"{REJECTED_FOLDER}|{OLDER_FOLDER}|{REROLL_FOLDER.format('[0-9]+')}")

_FORBIDDEN = '/\\<>:"|?*'
_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: controls, lone surrogates, line separators
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file#naming-conventions
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{device}{digit}" for device in ("COM", "LPT") for digit in "123456789¹²³"
}
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
    heading = f"naming pattern {pattern!r}"
    try:
        pieces = list(_pieces(pattern))
    except ValueError as error:
        return [f"{heading} cannot be read ({error}); write it like '{{sku}}.png'"]
    valid = ", ".join(f"{{{name}}}" for name in dict.fromkeys([*columns, "index"]))
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
            why = "attributes and indices are refused" if set(field) & set(".[") else "there is no such column"
            problems.append(f"{heading} uses {{{field}}}, but {why}; valid here: {valid}")
        elif suffix:
            problems.append(f"{heading} has {{{field}{suffix}}}; columns go in as they are: {{{field}}}")
    literal, field, _ = pieces[-1] if pieces else ("", None, "")
    if field is None and not literal.lower().endswith(".png"):
        problems.append(f"{heading} does not end in '.png', the only format written; end it so")
    return problems


def template_problems(template: str, columns: Collection[str]) -> list[str]:
    """Return every reason why a prompt template cannot be filled from the rows of a table (empty list: it can)."""
    heading = f"template {template!r}"
    try:
        pieces = list(_pieces(template))
    except ValueError as error:
        return [f"{heading} cannot be read ({error}); write it like 'a photo of {{name}}', and a brace as '{{{{'"]
    fields = [(field, suffix) for _, field, suffix in pieces if field is not None]
    problems = [] if fields else [f"{heading} names no column; every picture would have the same prompt"]
    valid = ", ".join(f"{{{name}}}" for name in columns)
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


def name_problem(name: str) -> str | None:
    """Return why `name` cannot be a picture's file name, directly inside a folder (None: it can)."""
    stem, suffix = name[:-4], name[-4:]
    if suffix.lower() == ".png":
        return _part_problem(name, stem, "has nothing before '.png'")
    reasons = ("does not end in '.png'", _part_problem(name, name, "has nothing before '.png'"))
    return " and ".join(reason for reason in reasons if reason)


def folder_problem(name: str) -> str | None:
    """Return why `name` cannot be a sub-folder for pictures, directly inside the output folder (None: it can)."""
    if _RESERVED_FOLDER.fullmatch(collision_key(name)):
        return "is a folder the job itself uses"
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


def _pieces(pattern: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield (literal text, the field after it or None, what follows the field's name: '!r', ':05d')."""
    # Only parsed, never `str.format`: that would follow attributes such as {sku.__class__}.
    for literal, field, spec, conversion in string.Formatter().parse(pattern):
        yield literal, field, (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")


def _bad_characters(text: str) -> str | None:
    bad = [c for c in dict.fromkeys(text) if c in _FORBIDDEN or unicodedata.category(c) in _CONTROLS]
    return "has " + ", ".join("NUL" if c == "\0" else repr(c) for c in bad) if bad else None
