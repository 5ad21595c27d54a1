"""Lay out plans and reports as plain text, and make foreign text safe to show."""

from __future__ import annotations

import collections
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

from ernie_accel.common.language import joined, localized, said, say


def width(text: str) -> int:
    """Return how many columns `text` takes in a terminal (East Asian wide characters take two)."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Return `rows` under `header`, columns padded to their widest cell, those in `right` flushed right."""
    lines = [header, *rows]
    widths = [max(width(line[i]) for line in lines) for i in range(len(header))]

    def pad(text: str, column: int) -> str:
        gap = " " * (widths[column] - width(text))
        return gap + text if column in right else text + gap

    return "\n".join("  ".join(pad(cell, i) for i, cell in enumerate(line)).rstrip() for line in lines)


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Return the same table as HTML, for notebooks; all text is shown as it stands."""

    def line(cells: Sequence[str], tag: str) -> str:
        aligned = ("right" if i in right else "left" for i in range(len(cells)))
        shown = (
            f'<{tag} style="text-align:{side}">{html.escape(one_line(cell))}</{tag}>'
            for side, cell in zip(aligned, cells, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def html_lines(lines: Iterable[str], first: str = "") -> str:
    """Return lines as HTML, one below the other, and before them `first` in bold."""
    shown = [f"<b>{html.escape(one_line(first))}</b>"] if first else []
    shown += [html.escape(one_line(line)) for line in lines]
    return f"<p>{'<br>'.join(shown)}</p>" if shown else ""


def human_bytes(count: int) -> str:
    """Return a number of bytes in decimal units, as file sizes of checkpoints are given."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def human_gib(count: int) -> str:
    """Return a number of bytes in binary units, as memory is given."""
    return f"{count / 2**20:.1f} MiB" if 0 < count < 2**30 // 10 else f"{count / 2**30:.1f} GiB"


def summarise(names: Sequence[str], most: int = 3) -> str:
    """Return `names` in few words: numbered siblings fold into one with a count, and many into a number.

    >>> summarise(["transformer.layers.0", "transformer.layers.1", "vae"])
    'transformer.layers.* (2), vae'
    >>> summarise(["unet.a", "unet.b", "unet.c", "unet.d"])
    '4 in unet'
    """
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
    shown = [
        localized(group[0]) if len(group) == 1 else f"{pattern} ({len(group)})" for pattern, group in folded.items()
    ]
    if len(shown) > most and all("." in name and " " not in name for name in names):
        roots = collections.Counter(name.split(".")[0] for name in names)
        shown = [say("{count} in {root}", count=count, root=root) for root, count in roots.items()]
    return localized(joined(shown, "{first}, {second}"))


def effect_text(effect: str, floor_db: float | None) -> str:
    """Return an effect with its declared floor, as tables show it."""
    return said(effect) if floor_db is None else said("{effect}, >= {floor:g} dB", effect=said(effect), floor=floor_db)


# Control characters, lone surrogates and bidirectional overrides: none of them is meant for a reader.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$#!])")


def one_line(text: str, most: int | None = None) -> str:
    """Return foreign text on one line, cut to `most` characters, with U+FFFD in place of control characters."""
    if most is not None and len(text) > most:
        text = text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return " ".join(_UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text).split())


def markdown(text: str, most: int | None = None) -> str:
    """Return foreign text as `one_line` does, so that Markdown shows it as it is: no HTML, link, code or table cell."""
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line(text, most), quote=False))
