"""Bar charts as SVG, the same bytes everywhere: a test can hold a picture to the figures that it shows."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from xml.sax.saxutils import escape

WIDTH, MARGIN, ROW, BAR = 500, 14, 44, 15
#: Fills that differ in lightness too, for readers who do not tell hues apart: on a light page and on a dark one.
FILLS = (("#3f51b5", "#8c9eff"), ("#ff7043", "#ff8a65"), ("#9aa5b1", "#78838f"), ("#26a69a", "#4db6ac"))
STYLE = f"""\
<style>
{" ".join(f".part{i} {{ fill: {light} }}" for i, (light, _) in enumerate(FILLS))}
text {{ font: 13px system-ui, sans-serif; fill: #333 }} .panel {{ fill: #fff; stroke: #d8dce2 }}
.strong {{ font-weight: 600 }} .soft {{ fill: #666 }}
.limit {{ stroke: #c62828; stroke-width: 2; stroke-dasharray: 3 2 }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e4e6ea }} .panel {{ fill: #22242c; stroke: #3a3d48 }}
.soft {{ fill: #a4a8b4 }} .limit {{ stroke: #ff8a80 }}
{" ".join(f".part{i} {{ fill: {dark} }}" for i, (_, dark) in enumerate(FILLS))} }}
</style>"""


@dataclass(frozen=True)
class Bar:
    """One row of a chart.

    Attributes:
        label: What it is; stands above the bar.
        parts: Lengths of its parts, one for each series.
        value: What is written behind it, with its unit.
        limit: Where a limit is drawn; None for none.
    """

    label: str
    parts: tuple[float, ...]
    value: str
    limit: float | None = None


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    series: Sequence[str] = (),
    limit: str = "",
    note: str = "",
    say: Callable[[str], str] = str,
) -> str:
    """Return a chart of horizontal bars.

    Args:
        title: What is compared, with the unit.
        bars: From top to bottom.
        series: Names of the parts of a bar, for the legend; none: the bars have one part each.
        limit: What the limits mean, for the legend.
        note: A line below the bars: the source.
        say: Gives each of these texts in the language of the page.
    """
    title, limit, note, series = say(title), limit and say(limit), note and say(note), [*map(say, series)]
    bars = [replace(bar, label=say(bar.label), value=say(bar.value)) for bar in bars]
    longest = max(max(sum(bar.parts), bar.limit or 0) for bar in bars)
    widest_text = max(_width(bar.value) for bar in bars) + 12
    scale = (WIDTH - 2 * MARGIN - widest_text) / longest
    legend = [*enumerate(series)]
    top = MARGIN + 22 + (22 if legend or limit else 0)
    height = top + ROW * len(bars) + (26 if note else 6)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{_quoted(title)}">',
        STYLE,
        f'<rect class="panel" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        _text(MARGIN, MARGIN + 12, title, "strong"),
    ]
    at = float(MARGIN)
    for part, name in legend:
        lines.append(f'<rect class="part{part}" x="{at:g}" y="{MARGIN + 23}" width="11" height="11" rx="2"/>')
        lines.append(_text(at + 16, MARGIN + 33, name))
        at += 30 + _width(name)
    if limit:
        lines.append(f'<path class="limit" d="M{at + 4:g} {MARGIN + 21}v15"/>')
        lines.append(_text(at + 12, MARGIN + 33, limit))
    for index, bar in enumerate(bars):
        y = top + ROW * index
        x = float(MARGIN)
        lines.append(_text(MARGIN, y + 15, bar.label))
        for index_of_part, part in enumerate(bar.parts):
            size = f'width="{part * scale:.1f}" height="{BAR}"'
            if part:
                lines.append(f'<rect class="part{index_of_part}" x="{x:.1f}" y="{y + 21}" {size}/>')
            x += part * scale
        if bar.limit is not None:
            if x + 1.2 * _width(bar.value) > MARGIN + bar.limit * scale - 12:  # between bar and limit, if it fits there
                x = max(x, MARGIN + bar.limit * scale)
            lines.append(f'<path class="limit" d="M{MARGIN + bar.limit * scale:.1f} {y + 18}v{BAR + 6}"/>')
        lines.append(_text(x + 6, y + 33, bar.value, "strong"))
    if note:
        lines.append(_text(MARGIN, height - 11, note, "soft"))
    return "\n".join([*lines, "</svg>", ""])


def _width(text: str) -> float:
    """Return about how many pixels a text takes."""
    return sum(13 if unicodedata.east_asian_width(each) in "WF" else 7 for each in text)


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})
