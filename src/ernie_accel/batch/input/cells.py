"""Keep spreadsheets from running what a manifest holds: its text may come from anybody, and `=1+1` is a formula."""

from __future__ import annotations

import re
from collections.abc import Iterable

MANIFEST_FIELDS = ("path", "state", "line", "prompt", "seed", "error", "bytes", "seconds", "batch_size")
"""The columns that every manifest begins with."""

# https://owasp.org/www-community/attacks/CSV_Injection, and spaces before the sign, which some spreadsheets leave out.
_FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def escaped(text: str) -> str:
    """Return text as a cell that no spreadsheet treats as a formula: an apostrophe goes before it.

    Numbers stay as they are. Text that begins with an apostrophe and would be a formula without it gets another one,
    so that `unescaped` gives back every text.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def unescaped(cell: str) -> str:
    """Return the text that `escaped` made a cell of."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell, 1) else cell


def is_manifest(header: Iterable[str]) -> bool:
    """Return whether a table with these columns is a manifest, whose cells are escaped."""
    return set(MANIFEST_FIELDS) <= set(header)
