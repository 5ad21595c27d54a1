"""Read and check the table of a batch, so that bad input is known, all of it, before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ernie_accel.batch.errors import BatchInputError, Problem, listed, shown, tidy
from ernie_accel.batch.input.check import RowCheck, default_problems
from ernie_accel.batch.input.formats import MAX_ROWS, Records, read_records, separator_of
from ernie_accel.batch.input.gate import text_problem
from ernie_accel.batch.input.naming import default_pattern, pattern_problems, template_problems
from ernie_accel.batch.input.near_miss import ignored_column
from ernie_accel.batch.input.pictures import AdapterFolder, PictureFolder
from ernie_accel.batch.input.row import OF_FILES, SETTINGS, Row
from ernie_accel.common.language import said


def read_table(
    path: str | Path,
    *,
    pattern: str | None = None,
    size_multiple: int = 16,
    default_size: tuple[int, int] | None = None,
    template: str | None = None,
    folder_by: str | None = None,
    extra_columns: Collection[str] = (),
    skipped: list[Problem] | None = None,
    defaults: Mapping[str, float] | None = None,
    image_root: str | Path | None = None,
    lora_root: str | Path | None = None,
) -> list[Row]:
    """Read a table with a `prompt` column, and check all of it.

    By the file's ending: ``.json`` (an array of objects), ``.jsonl`` (an object per line), ``.parquet``, ``.tsv``
    (separated by tabs), and anything else as UTF-8 CSV. Blank lines, and rows in which every one of several fields is
    empty (Excel leaves such), are left out and not numbered. The same rows give the same pictures in every format.

    Args:
        path: The file; a byte order mark is accepted.
        pattern: How pictures are named: `{column}` for any column and `{index}` (or `{index:05d}`) for the
            0-based row number. Default: `{sku}.png` if there is a `sku` column, else `{index:05d}.png`.
        size_multiple: Width and height must be divisible by this, in pixels (16 for ERNIE-Image).
        default_size: Width and height in pixels for rows that do not give theirs; None: the pipeline's own.
        template: How prompts are made: text with `{column}` for any column. Without it the column `prompt` holds them.
        folder_by: A column whose values are the sub-folders that pictures are sorted into.
        extra_columns: Columns of your own that look like a setting (`cfg`, `step`) but are not. Such a column is
            refused unless it is named here, since it would be ignored. Other columns of your own need no mention.
        skipped: A list to which the problems of single rows are added; such rows are left out, instead of refusing
            the file. They keep their number, so that fixing them later changes no other row.
        defaults: Settings for rows that leave them open: any of `width`, `height` (which go before `default_size`),
            `steps`, `guidance_scale` and `variants`.
        image_root: The folder below which the columns `image` and `mask` may name pictures; None: the table's own.
        lora_root: The folder below which the column `lora` may name adapters; None: the table's own.

    Returns:
        At least one row per picture, in the file's order, with file names that are distinct on every file system.

    Raises:
        BatchInputError: With every problem of the file.
        MissingExtraError: A Parquet file needs pyarrow.
    """
    path = Path(path)
    sides = {} if default_size is None else dict(zip(("width", "height"), default_size, strict=True))
    return rows_of(
        read_records(path),
        path,
        pattern=pattern,
        size_multiple=size_multiple,
        defaults=sides | dict(defaults or {}),
        template=template,
        folder_by=folder_by,
        extra_columns=extra_columns,
        skipped=skipped,
        image_root=path.parent if image_root is None else Path(image_root),
        lora_root=path.parent if lora_root is None else Path(lora_root),
    )


def rows_of(
    records: Records,
    path: Path | None,
    *,
    pattern: str | None = None,
    size_multiple: int = 16,
    defaults: Mapping[str, float] | None = None,
    template: str | None = None,
    folder_by: str | None = None,
    extra_columns: Collection[str] = (),
    skipped: list[Problem] | None = None,
    image_root: Path | None = None,
    lora_root: Path | None = None,
) -> list[Row]:
    """Check what a table holds, wherever it was read from, and return its rows; the arguments are `read_table`'s.

    Raises:
        BatchInputError: With every problem found.
    """
    defaults = defaults or {}
    named = [name for name in records.columns if name]
    problems = list(records.problems)
    if not named and (problems or records.row_problems):  # nothing was read; what follows would only repeat it
        raise BatchInputError(path, sorted([*problems, *records.row_problems], key=_line))
    if not named:
        raise BatchInputError(
            path, [(None, said('has no rows; add one per picture, such as {{"prompt": "a red mug"}}'))]
        )
    header = records.header_line
    misread = header is not None and "prompt" not in named and separator_of(records.columns, records.delimiter)
    has_template = template is not None and not misread
    names = [(header, message) for message in _name_problems(records, has_template, extra_columns)]
    if misread:  # every row was, for the same reason
        raise BatchInputError(path, names)
    problems += names
    problems += [(None, message) for message in _option_problems(named, template, folder_by)]
    if bad_defaults := default_problems(defaults, size_multiple):
        problems += [(None, message) for message in bad_defaults]
        defaults = {}  # reported once, not for every row
    pattern = default_pattern(named) if pattern is None else pattern
    bad_pattern = pattern_problems(pattern, named)
    problems += [(None, message) for message in bad_pattern]

    check = RowCheck(
        pattern=None if bad_pattern else pattern,
        template=None if problems else template,
        folder_by=None if problems else folder_by,
        size_multiple=size_multiple,
        defaults=defaults,
        pictures=None if image_root is None else PictureFolder(image_root),
        adapters=None if lora_root is None else AdapterFolder(lora_root),
        own=[name for name in extra_columns if name in OF_FILES],
    )
    rows: list[Row] = []
    row_problems = list(records.row_problems)
    for index, (line, columns) in enumerate(records.rows):
        if columns is not None:
            made, messages = check.rows(line, index, columns)
            rows += made
            row_problems += [(line, message) for message in messages]
            if len(rows) > MAX_ROWS:
                raise BatchInputError(
                    path, [(line, said("asks for more than {most:,} pictures; split the table", most=MAX_ROWS))]
                )
    if skipped is not None and not problems:
        skipped += [(line, tidy(message)) for line, message in sorted(row_problems, key=_line)]
        row_problems = [] if rows else row_problems
    if not records.rows and not problems:
        problems.append((None, said("has a header and no rows; add one line per picture")))
    if problems or row_problems:
        raise BatchInputError(path, sorted([*problems, *row_problems], key=_line))
    return rows


def _line(problem: Problem) -> int:
    return problem[0] or 0


def _name_problems(records: Records, has_template: bool, extra: Collection[str]) -> list[str]:
    """Return what is wrong with the names of the columns."""
    header = records.columns
    messages: list[str] = []
    if "prompt" not in header and not has_template:
        message = said("has no 'prompt' column; found: {found}", found=listed(name for name in header if name))
        if records.header_line and (separator := separator_of(header, records.delimiter)):
            message = said(
                "{problem}. The separator looks like {separator}; expected {expected}: save the file with {mark}",
                problem=message,
                separator=separator,
                expected=repr(records.delimiter),
                mark=said("tabs, or name it .csv") if records.delimiter == "\t" else said("commas"),
            )
        messages.append(message)
    for name, count in Counter(name for name in header if name).items():
        if count > 1:
            messages.append(
                said("has {count} columns named {name}; rename or delete all but one", count=count, name=shown(name))
            )
        if reason := text_problem(name):
            messages.append(said("column {name} {reason}", name=shown(name), reason=reason))
        # A setting by another name would be ignored, and the pictures quietly not what was asked for.
        elif name not in extra and (fix := ignored_column(name, header, has_template=has_template)):
            ignored = (
                "column {name} would be ignored; {fix}, "
                "or, if it is a column of your own, name it in extra_columns (--extra-columns)"
            )
            messages.append(said(ignored, name=shown(name), fix=fix))
    for name in dict.fromkeys(extra):
        if name in SETTINGS and name not in OF_FILES:
            messages.append(f"extra_columns names {shown(name)}, which is a setting; leave it out there")
        elif name not in header:
            found = listed(each for each in header if each)
            messages.append(f"extra_columns names {shown(name)}, but there is no such column; found: {found}")
    return messages


def _option_problems(columns: Sequence[str], template: str | None, folder_by: str | None) -> list[str]:
    messages = [] if template is None else template_problems(template, columns)
    if folder_by is not None and folder_by not in columns:
        by = shown(folder_by)
        messages.append(f"pictures cannot be sorted by {by}: there is no such column; found: {listed(columns)}")
    return messages
