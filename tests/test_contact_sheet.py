"""A contact sheet shows every picture unclipped, keeps its shape, and writes any caption legibly."""

from __future__ import annotations

import os

import pytest
from PIL import Image, ImageFont

from ernie_accel.common import contact_sheet as sheet
from ernie_accel.common.contact_sheet import Column, contact_sheet
from tests.little_work import little_work

COLOURS = [(255, 0, 0), (0, 0, 255), (0, 128, 0), (128, 0, 128)]


def column(caption="a cup", size=(128, 128), colours=COLOURS[:2]):
    return Column(caption, [Image.new("RGB", size, colour) for colour in colours])


def box_of(picture, colour):
    """Return the bounding box of exactly one colour."""
    red, green, blue = (
        band.point(lambda v, c=c: 255 * (v == c)) for band, c in zip(picture.split(), colour, strict=True)
    )
    mask = Image.merge("RGB", (red, green, blue)).convert("L").point(lambda v: 255 * (v == 255))
    return mask.getbbox()


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((128, 128), (256, 256)),
        ((1024, 1024), (256, 256)),
        ((768, 1376), (143, 256)),
        ((1376, 768), (256, 143)),
        ((4096, 1), (256, 1)),
    ],
)
def test_pictures_fill_their_cell_with_their_aspect_ratio_kept(tmp_path, size, shown):
    picture = Image.open(contact_sheet([column(size=size)], tmp_path / "sheet.png"))
    stock, optimized = (box_of(picture, colour) for colour in COLOURS[:2])
    assert (stock[2] - stock[0], stock[3] - stock[1]) == shown
    assert (optimized[2] - optimized[0], optimized[3] - optimized[1]) == shown
    assert stock[0] == optimized[0]
    assert stock[3] < optimized[1]  # above, and not touching


def test_columns_stand_side_by_side_in_order(tmp_path):
    columns = [column(colours=COLOURS[:2]), column(colours=COLOURS[2:], size=(64, 128))]
    picture = Image.open(contact_sheet(columns, tmp_path / "sheet.png", cell=128))
    boxes = [box_of(picture, colour) for colour in COLOURS]
    assert boxes[0][2] < boxes[2][0]
    assert (boxes[0][1], boxes[1][1]) == (boxes[2][1], boxes[3][1])


def test_labels_stand_left_of_the_pictures_and_captions_below(tmp_path):
    rows = ("stock\n412 ms", "optimized\n171 ms a picture")
    picture = Image.open(contact_sheet([column("a red cup")], tmp_path / "sheet.png", rows=rows))
    left, _, right, bottom = box_of(picture, COLOURS[1])
    paper = Image.new("RGB", picture.size, "white")

    def has_ink(box):
        return picture.crop(box).tobytes() != paper.crop(box).tobytes()

    assert has_ink((0, 0, left - 2, bottom))
    assert has_ink((left, bottom + 2, right, picture.height))
    assert not has_ink((right + 2, 0, picture.width, picture.height))


def test_transparent_pictures_lie_on_paper(tmp_path):
    pictures = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGBA", (8, 8), (0, 0, 255, 255))]
    picture = Image.open(contact_sheet([Column("", pictures)], tmp_path / "sheet.png"))
    left, top, _, _ = box_of(picture, (0, 0, 255))
    assert picture.getpixel((left + 9, top - 100)) == (255, 255, 255)


@pytest.fixture
def only_own_font(monkeypatch):
    """Hide the system's fonts, so that a test sees the same everywhere."""
    monkeypatch.setattr(sheet, "_SYSTEM_FONTS", ())
    sheet._fonts.cache_clear()
    yield
    sheet._fonts.cache_clear()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red cup, 50% off", "a red cup, 50% off"),
        ("a  b\n\tc", "a b c"),
        ("café, \uff21\uff11", "cafe, A1"),
        ("红 cup。", "U+7EA2 cup."),
        ("红苹果", "U+7EA2 U+82F9 U+679C"),
        ("🙂", "U+1F642"),
        ("", ""),
    ],
)
@pytest.mark.usefixtures("only_own_font")
def test_what_no_font_can_draw_is_spelt_out(text, shown):
    assert sheet._line(text, 16, "black")[0] == shown


def test_a_system_font_that_covers_more_is_taken(monkeypatch):
    own = ImageFont.load_default(16)
    other = ImageFont.load_default(16)
    monkeypatch.setattr(sheet, "_fonts", lambda size: (own, other))
    monkeypatch.setattr(sheet, "_has_glyph", lambda font, character: font is other or character.isascii())
    assert sheet._line("红苹果 cup", 16, "black")[:2] == ("红苹果 cup", other)
    assert sheet._line("a cup", 16, "black")[:2] == ("a cup", own)


@pytest.mark.parametrize(
    "text",
    [
        "a small red circle in the upper left, on white",
        "supercalifragilistic" * 4,
        "红苹果" * 20,
        "a " * 500,
        "",
        "W",
    ],
)
@pytest.mark.parametrize("width", [40, 256])
def test_no_line_is_wider_than_its_column_and_short_texts_are_whole(text, width):
    font = ImageFont.load_default(16)
    lines = sheet._wrap(text, font, width)
    assert all(font.getlength(line) <= width for line in lines)
    if len(lines) < sheet._MAX_CAPTION_LINES:
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    else:
        assert len(lines) == sheet._MAX_CAPTION_LINES
        assert lines[-1].endswith("...")


def test_the_wrong_number_of_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs at least one column and one row"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="has 1 pictures for 2 rows") as caught:
        contact_sheet([column(colours=COLOURS[:1])], tmp_path / "sheet.png", rows=("stock\n1 s", "optimized"))
    assert str(caught.value) == (
        "column 'a cup' has 1 pictures for 2 rows ('stock', 'optimized'); give one for each row"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_sheet_and_no_other_file(tmp_path, monkeypatch):
    path = contact_sheet([column()], tmp_path / "sheet.png")
    old = path.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        contact_sheet([column("another")], path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_caption_of_one_long_word_costs_no_time(tmp_path):
    word = "masterpiece,best_quality," * 1400
    with little_work(5):
        contact_sheet([Column(word, [Image.new("RGB", (8, 8))])], tmp_path / "sheet.png", rows=("",))
    assert (tmp_path / "sheet.png").exists()
