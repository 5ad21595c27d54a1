"""Take what Python programs hold as rows (prompts, mappings, data frames), and check it as a table is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn, TypeAlias

from ernie_accel.batch.errors import BatchInputError, Problem, listed, shown
from ernie_accel.batch.input.formats import Records
from ernie_accel.batch.input.row import Row
from ernie_accel.batch.input.table import rows_of

Rows: TypeAlias = object
"""`Row` objects, prompts, mappings with a prompt (any iterable of one of these), or a data frame with such a column."""

_EXPECTED = "expected rows: prompts, dicts such as {'prompt': 'a red mug'}, a data frame, or what read_table returns"
_MISSING = frozenset({"NAType", "NaTType"})  # how pandas names a missing value, by class


def read_rows(
    rows: Rows,
    *,
    pattern: str | None = None,
    size_multiple: int = 16,
    template: str | None = None,
    folder_by: str | None = None,
    extra_columns: Collection[str] = (),
    skipped: list[Problem] | None = None,
    defaults: Mapping[str, float] | None = None,
    image_root: str | Path | None = None,
    lora_root: str | Path | None = None,
) -> list[Row]:
    """Check rows that a Python program holds, all of them, as `read_table` checks those of a file.

    Args:
        rows: Prompts; mappings from column to value; or a data frame of pandas, polars or pyarrow. Missing values
            (None, NaN, NA) are empty fields. A row's line is its number, from 1.
        pattern: As for `read_table`, and so are the others.
        size_multiple: Width and height must be divisible by this, in pixels.
        template: How prompts are made from columns.
        folder_by: A column whose values are sub-folders.
        extra_columns: Columns of your own that look like a setting.
        skipped: A list to which the problems of single rows are added; such rows are left out.
        defaults: Settings for rows that leave them open.
        image_root: The folder below which the columns `image` and `mask` may name pictures; None: the working folder.
        lora_root: The folder below which the column `lora` may name adapters; None: the working folder.

    Returns:
        At least one row per picture, in the given order.

    Raises:
        BatchInputError: With every problem found.
    """
    records = Records()
    for number, value in enumerate(_values(rows), start=1):
        if isinstance(value, str):
            records.add(number, {"prompt": value})
        elif isinstance(value, Mapping):
            records.add(number, {name: _plain(field) for name, field in value.items()})
        else:
            what = "a Row among others" if isinstance(value, Row) else f"of type {type(value).__name__}"
            records.add_unreadable(number, f"is {what}; expected a prompt or a dict such as {{'prompt': 'a red mug'}}")
        records.check_limits(None)
    return rows_of(
        records.complete(),
        None,
        pattern=pattern,
        size_multiple=size_multiple,
        defaults=defaults,
        template=template,
        folder_by=folder_by,
        extra_columns=extra_columns,
        skipped=skipped,
        image_root=Path() if image_root is None else Path(image_root),
        lora_root=Path() if lora_root is None else Path(lora_root),
    )


def as_rows(rows: Rows) -> tuple[Row, ...]:
    """Return rows as they are if they are `Row` objects, else what `read_rows` makes of them.

    Raises:
        BatchInputError: As `read_rows`.
    """
    values = tuple(_values(rows))
    made = tuple(value for value in values if isinstance(value, Row))
    if len(made) == len(values):
        return made
    return tuple(read_rows(values))


def _values(rows: Rows) -> Iterator[object]:
    """Return the rows one by one, from whatever holds them."""
    if isinstance(rows, str | bytes | Path):
        fix = "to draw one picture, give a list with one prompt; to read a table, give what read_table returns"
        _refuse(f"is one {type(rows).__name__}, {shown(str(rows))}; {fix}")
    if isinstance(rows, Mapping):
        _refuse("is one dict; give a list of dicts, one per row: [{'prompt': 'a red mug'}]")
    if isinstance(rows, Row):
        _refuse("is one Row; give a list with it")
    if (of_frame := _reader(rows)) is not None:
        rows = of_frame()
    if not isinstance(rows, Iterable):
        hint = ": call its collect() first" if callable(getattr(rows, "collect", None)) else ""
        _refuse(f"is of type {type(rows).__name__}{hint}; {_EXPECTED}")
    return iter(rows)


def _reader(frame: object) -> Callable[[], Iterable[Mapping[str, object]]] | None:
    """Return what gives a data frame's rows as mappings; None: it is none. No data frame library is imported."""
    if hasattr(frame, "iter_rows") and hasattr(frame, "columns"):  # polars
        return lambda: frame.iter_rows(named=True)
    if hasattr(frame, "to_pylist") and hasattr(frame, "column_names"):  # pyarrow
        _refuse_repeated(frame.column_names)
        return lambda: frame.to_pylist()
    if hasattr(frame, "to_dict") and hasattr(frame, "columns"):  # pandas, and what is like it
        _refuse_repeated(frame.columns)
        return lambda: frame.to_dict("records")
    if hasattr(frame, "to_dicts") and hasattr(frame, "columns"):
        return lambda: frame.to_dicts()
    return None


def _refuse_repeated(columns: Iterable[object]) -> None:
    """Refuse columns of one name: a mapping would hold only the last of them."""
    if repeated := [name for name, count in Counter(map(str, columns)).items() if count > 1]:
        _refuse(f"has more than one column named {listed(repeated)}; rename or delete all but one")


def _plain(value: object) -> object:
    """Return a value with None in place of what stands for a missing one."""
    if type(value).__name__ in _MISSING:
        return None
    # Of numpy's scalars of any size; of arrays the comparison has no one answer, and they are no scalars.
    if getattr(value, "shape", None) == () and bool(value != value):
        return None
    return value


def _refuse(message: str) -> NoReturn:
    raise BatchInputError(None, [(None, message)])
