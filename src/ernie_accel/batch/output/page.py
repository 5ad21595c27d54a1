"""Draw a job's report as one page of HTML that needs no other file: thumbnails, charts, tables."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ernie_accel.batch.output.ledger import LedgerEntry
from ernie_accel.common.text import one_line

_THUMBNAIL_PX = 240
_MAX_CHARACTERS = 300  # of a prompt; the manifest has all of it
_READERS = 4  # threads: Pillow decodes outside of Python's lock
_FEWEST = 8  # values below which a histogram says nothing
_MAX_BARS = 40
_UNITS = ((3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))  # used from so many seconds on
_NAME_COLUMNS = (("sku", "id", "货号", "编号"), ("name", "title", "product", "名称", "商品名称"))


@dataclass(frozen=True)
class Bar:
    """One bar, in the chart's own units; what it stands for is its title."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Tick:
    """A number beside an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A histogram, ready to draw; without bars `summary` says why."""

    title: str
    summary: str
    x_axis: str = ""
    y_axis: str = ""
    bars: Sequence[Bar] = ()
    x_ticks: Sequence[Tick] = ()
    y_ticks: Sequence[Tick] = ()
    # As wide as a narrow phone shows it: there the numbers have the size of the text around them.
    width: int = 360
    height: int = 200
    left: int = 54
    right: int = 352
    top: int = 24
    bottom: int = 160


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery."""

    href: str
    thumbnail: str
    width: int
    height: int
    name: str
    prompt: str
    details: str


def page(content: Mapping[str, object]) -> str:
    """Return the page; `content` holds what the template names."""
    import jinja2  # here, because a batch without a report needs none
    from markupsafe import Markup

    here = Path(__file__).parent
    style = (here / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((here / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(content, style=Markup(style), style_hash=f"sha256-{digest}")


def gallery(out: Path, entries: Iterable[LedgerEntry]) -> list[Picture]:
    """Return the pictures that can still be read, in their order."""
    with ThreadPoolExecutor(_READERS, "ernie-accel-report") as pool:
        return [picture for picture in pool.map(lambda entry: _picture(out, entry), entries) if picture is not None]


def _picture(out: Path, entry: LedgerEntry) -> Picture | None:
    try:
        with Image.open(out / entry.path) as image:
            full = f"{image.width} x {image.height} px"
            image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
            small = image.convert("RGB")
    # Moved away or damaged, whatever Pillow raises for it: the report shows the others, and counts these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=80)
    seed = entry.request["seed"] if entry.seed is None else entry.seed
    return Picture(
        # "./", so that no name can be read as another scheme, such as javascript:
        href="./" + urllib.parse.quote(entry.path),
        thumbnail="data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
        width=small.width,
        height=small.height,
        name=_name(entry),
        prompt=one_line(str(entry.request["prompt"]), _MAX_CHARACTERS),
        details=one_line(f"{entry.path} \N{MIDDLE DOT} {full} \N{MIDDLE DOT} seed {seed}", _MAX_CHARACTERS),
    )


def _name(entry: LedgerEntry) -> str:
    """Return what the table calls the picture: its SKU and its name, else the file's own name."""
    columns = {name.strip().lower(): value for name, value in entry.columns.items() if value.strip()}
    found = [next((columns[name] for name in names if name in columns), None) for names in _NAME_COLUMNS]
    words = " \N{MIDDLE DOT} ".join(one_line(value, 80) for value in found if value is not None)
    return words or one_line(Path(entry.path).stem, 80)


def latency_chart(latencies: Sequence[float]) -> Chart:
    """Return the histogram of ascending latencies, in seconds."""
    return _histogram("Time per picture, from the start of its batch to the file", latencies, "pictures")


def speed_chart(moments: Sequence[float]) -> Chart:
    """Return the pictures a minute over the time of work; `moments` are ascending seconds of work."""
    return _histogram("Speed over the working time", [0.0, *moments], "pictures per minute", per_minute=True)


def _histogram(title: str, values: Sequence[float], y_axis: str, *, per_minute: bool = False) -> Chart:
    low, high = (values[0], values[-1]) if values else (0.0, 0.0)
    counted = len(values) - per_minute  # there, the first value is only where the time begins
    if counted < _FEWEST or high <= low:
        return Chart(title=title, summary="Too few pictures to draw.")
    divisor, unit = next((divisor, unit) for least, divisor, unit in _UNITS if high >= least)
    number = min(_MAX_BARS, math.ceil(2 * counted ** (1 / 3)))  # Rice's rule
    step = (high - low) / number
    counts = Counter(min(number - 1, int((value - low) / step)) for value in values[per_minute:])
    heights = {place: count * 60 / step if per_minute else count for place, count in counts.items()}
    frame = Chart(title=title, summary="", x_axis=unit if not per_minute else f"{unit} of work")
    top = max(heights.values())
    wide = (frame.right - frame.left) / number

    def up(value: float) -> float:
        return round(frame.bottom - (frame.bottom - frame.top) * value / top, 1)

    def along(value: float) -> float:
        return round(frame.left + (frame.right - frame.left) * (value - low) / (high - low), 1)

    bars = [
        Bar(
            x=round(frame.left + wide * place + 0.5, 2),
            y=up(height),
            width=round(wide - 1, 2),
            height=round(frame.bottom - up(height), 1),
            title=f"{_short((low + step * place) / divisor)} to {_short((low + step * (place + 1)) / divisor)} {unit}: "
            + (f"{_short(height)} pictures per minute" if per_minute else f"{height:.0f} pictures"),
        )
        for place, height in sorted(heights.items())
    ]
    return Chart(
        title=title,
        summary=f"{_short(low / divisor)} to {_short(high / divisor)} {unit}, at most {_short(top)} {y_axis}",
        x_axis=frame.x_axis,
        y_axis=y_axis,
        bars=bars,
        x_ticks=[Tick(along(value * divisor), _short(value)) for value in _round_values(low / divisor, high / divisor)],
        y_ticks=[Tick(up(value), _short(value)) for value in _round_values(0, top)],
    )


def _round_values(low: float, high: float) -> list[float]:
    """Return some three to six round numbers within a range, evenly spaced."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
