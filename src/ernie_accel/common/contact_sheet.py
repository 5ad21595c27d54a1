"""Show pictures of several runs side by side on one sheet, so that a difference in quality cannot hide."""

from __future__ import annotations

import bisect
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ernie_accel.common.atomic import write_atomically

_PAPER, _INK, _MUTED, _EDGE = "#ffffff", "#1f2328", "#656d76", "#d0d7de"
_MAX_CAPTION_LINES = 6
_MAX_CAPTION = 1000  # characters: more than fit, and a longer text is measured only so far

# Pillow's own font covers little more than ASCII. If a text needs more, the installed font of this list that covers
# most of it is used: fonts with Chinese come first, since most captions beyond ASCII are Chinese.
_SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
    "simsun.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "arial.ttf",
)
_WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef"  # scripts that wrap after any character
_PIECES = re.compile(rf"\s+|[{_WIDE}]|[^\s{_WIDE}]+")


@dataclass(frozen=True)
class Column:
    """One prompt and its picture from every run.

    Attributes:
        caption: The prompt, for instance; wrapped under the pictures.
        pictures: One for each row of the sheet, top to bottom.
    """

    caption: str
    pictures: Sequence[Image.Image]


def contact_sheet(
    columns: Sequence[Column],
    path: str | Path,
    *,
    rows: Sequence[str] = ("stock", "optimized"),
    cell: int = 256,
) -> Path:
    """Draw one column per prompt and one row per run, and write the sheet as a PNG.

    Pictures are scaled, up or down, to fit a square cell with their aspect ratio kept.

    Args:
        columns: At least one, each with as many pictures as there are rows.
        path: Where to write; a file there is replaced in one step.
        rows: Each row's label, left of it, as in `"optimized\\n171 ms a picture"`: the first line is larger.
        cell: Side of a cell in pixels; the type grows with it.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw, or a column has too many or too few pictures.
        OSError: If the file cannot be written.
    """
    if not columns or not rows:
        raise ValueError("a contact sheet needs at least one column and one row; none was given")
    for column in columns:
        if len(column.pictures) != len(rows):
            raise ValueError(
                f"column {column.caption!r} has {len(column.pictures)} pictures for {len(rows)} rows "
                f"({', '.join(repr(label.partition(chr(10))[0]) for label in rows)}); give one for each row"
            )
    sheet = _draw(columns, rows, cell)
    file = io.BytesIO()
    sheet.save(file, format="PNG", optimize=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())
    return path


def _draw(columns: Sequence[Column], rows: Sequence[str], cell: int) -> Image.Image:
    margin, gap = cell // 8, cell // 16
    pictures = [[_fit(picture, cell) for picture in column.pictures] for column in columns]
    labels = [_Block.label(text, cell) for text in rows]
    captions = [_Block.caption(column.caption, cell) for column in columns]

    label_width = max(label.width for label in labels) + gap
    row_heights = [max(label.height, *(column[i].height for column in pictures)) for i, label in enumerate(labels)]
    width = margin + label_width + len(columns) * (cell + gap) - gap + margin
    height = margin + sum(row_heights) + len(rows) * gap + max(block.height for block in captions) + margin
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)

    top = margin
    for i, (label, row_height) in enumerate(zip(labels, row_heights, strict=True)):
        label.draw(draw, margin, top + (row_height - label.height) // 2)
        for j, column in enumerate(pictures):
            picture = column[i]
            x = margin + label_width + j * (cell + gap) + (cell - picture.width) // 2
            y = top + (row_height - picture.height) // 2
            sheet.paste(picture, (x, y))
            # One pixel outside, so that it covers nothing, and a white picture still has an edge.
            draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=_EDGE)
        top += row_height + gap
    for j, caption in enumerate(captions):
        caption.draw(draw, margin + label_width + j * (cell + gap), top, centred_in=cell)
    return sheet


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """Return the picture as RGB, scaled to the cell; transparent parts show the paper."""
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, _PAPER), picture.convert("RGBA"))
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Block:
    """Lines of text, each with its font and colour, measured and ready to draw."""

    lines: tuple[tuple[str, ImageFont.FreeTypeFont, str], ...]

    @classmethod
    def label(cls, text: str, cell: int) -> _Block:
        first, *rest = text.split("\n")
        return cls((_line(first, cell // 12, _INK), *(_line(line, cell // 15, _MUTED) for line in rest)))

    @classmethod
    def caption(cls, text: str, cell: int) -> _Block:
        shown, font, colour = _line(text[:_MAX_CAPTION], cell // 15, _INK)
        return cls(tuple((line, font, colour) for line in _wrap(shown, font, cell)))

    @property
    def width(self) -> int:
        return max(round(font.getlength(text)) for text, font, _ in self.lines)

    @property
    def height(self) -> int:
        return sum(_leading(font) for _, font, _ in self.lines)

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int, centred_in: int | None = None) -> None:
        for text, font, colour in self.lines:
            indent = 0 if centred_in is None else (centred_in - font.getlength(text)) / 2
            draw.text((left + indent, top + 1.05 * font.size), text, font=font, fill=colour, anchor="ls")
            top += _leading(font)


def _leading(font: ImageFont.FreeTypeFont) -> int:
    return round(1.4 * font.size)


def _line(text: str, size: int, colour: str) -> tuple[str, ImageFont.FreeTypeFont, str]:
    """Return a drawable form of a text, the font that can draw it, and the colour."""
    # Composed, because an accent on its own is drawn beside its letter where text shaping is missing.
    text = " ".join(unicodedata.normalize("NFC", text).split())
    font = max(_fonts(size), key=lambda font: sum(_has_glyph(font, character) for character in text))
    return _spell_out(text, font), font, colour


@lru_cache(maxsize=8)
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """Return Pillow's own font and then every system font of the list that is installed."""
    own = ImageFont.load_default(size)
    if not isinstance(own, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType; reinstall it: pip install --force-reinstall pillow")
    found = [own]
    for name in _SYSTEM_FONTS:
        try:
            found.append(ImageFont.truetype(name, size))  # looks in the system's font folders
        except OSError:  # not installed
            continue
    return tuple(found)


@lru_cache(maxsize=4096)
def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    # Pillow does not expose a font's character map, but it draws missing characters like this noncharacter.
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\U0010ffff"))


def _spell_out(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Replace what the font lacks: `é` by `e`, full-width signs by plain ones, and the rest by `U+679C`."""
    shown = ""
    for character in text:
        if _has_glyph(font, character):
            shown += character
            continue
        plain = unicodedata.normalize("NFKD", character).translate({0x3002: ".", 0x3001: ","})
        kept = "".join(part for part in plain if part.isascii())
        shown += kept or f" U+{ord(character):04X} "
    return " ".join(shown.split())


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines no wider than `width` pixels; a text too long for a caption ends in '...'."""
    lines, line = [], ""
    for piece in _PIECES.findall(text):
        if font.getlength((line + piece).rstrip()) <= width:
            line += piece
            continue
        if line.strip():
            lines.append(line.rstrip())
        line = piece.lstrip()
        while font.getlength(line) > width:  # a word wider than the column
            lengths = range(1, len(line) + 1)
            fits = max(1, bisect.bisect(lengths, float(width), key=lambda n: font.getlength(line[:n])))
            lines.append(line[:fits])
            line = line[fits:]
    lines.append(line.rstrip())
    if len(lines) <= _MAX_CAPTION_LINES:
        return lines
    last = lines[_MAX_CAPTION_LINES - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: _MAX_CAPTION_LINES - 1], last.rstrip() + "..."]
