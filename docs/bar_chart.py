"""Bar charts as SVG, the same bytes everywhere: a test can hold a picture to the figures that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, MARGIN, ROW, BAR = 500, 14, 44, 15
#: Fills that differ in lightness too, for readers who do not tell hues apart.
FILLS = ("#3f51b5", "#ff7043", "#9aa5b1", "#26a69a")
STYLE = """\
<style>
text { font: 13px system-ui, sans-serif; fill: #333 } .panel { fill: #fff; stroke: #d8dce2 }
.strong { font-weight: 600 } .soft { fill: #666 } .limit { stroke: #c62828; stroke-width: 2; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
text { fill: #e4e6ea } .panel { fill: #22242c; stroke: #3a3d48 } .soft { fill: #a4a8b4 } .limit { stroke: #ff8a80 } }
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


def bar_chart(title: str, bars: Sequence[Bar], series: Sequence[str] = (), limit: str = "", note: str = "") -> str:
    """Return a chart of horizontal bars.

    Args:
        title: What is compared, with the unit.
        bars: From top to bottom.
        series: Names of the parts of a bar, for the legend; none: the bars have one part each.
        limit: What the limits mean, for the legend.
        note: A line below the bars: the source.
    """
    longest = max(max(sum(bar.parts), bar.limit or 0) for bar in bars)
    widest_text = max(len(bar.value) for bar in bars) * 7 + 12
    scale = (WIDTH - 2 * MARGIN - widest_text) / longest
    legend = [*zip(FILLS, series, strict=False)]
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
    for fill, name in legend:
        lines.append(f'<rect x="{at:g}" y="{MARGIN + 23}" width="11" height="11" rx="2" fill="{fill}"/>')
        lines.append(_text(at + 16, MARGIN + 33, name))
        at += 30 + 6.7 * len(name)
    if limit:
        lines.append(f'<path class="limit" d="M{at + 4:g} {MARGIN + 21}v15"/>')
        lines.append(_text(at + 12, MARGIN + 33, limit))
    for index, bar in enumerate(bars):
        y = top + ROW * index
        x = float(MARGIN)
        lines.append(_text(MARGIN, y + 15, bar.label))
        for fill, part in zip(FILLS, bar.parts, strict=False):
            lines.append(f'<rect x="{x:.1f}" y="{y + 21}" width="{part * scale:.1f}" height="{BAR}" fill="{fill}"/>')
            x += part * scale
        if bar.limit is not None:
            x = max(x, MARGIN + bar.limit * scale)
            lines.append(f'<path class="limit" d="M{MARGIN + bar.limit * scale:.1f} {y + 18}v{BAR + 6}"/>')
        lines.append(_text(x + 6, y + 33, bar.value, "strong"))
    if note:
        lines.append(_text(MARGIN, height - 11, note, "soft"))
    return "\n".join([*lines, "</svg>", ""])


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})
