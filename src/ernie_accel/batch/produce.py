"""Make the pictures of a batch: a row that fails does not stop the others, and no picture is ever partial."""

from __future__ import annotations

import inspect
import io
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ernie_accel.batch.errors import BatchInputError, BatchOutputError, Problem
from ernie_accel.batch.naming import collision_key
from ernie_accel.batch.table import MAX_SEED, Row
from ernie_accel.core.atomic import write_atomically

_log = logging.getLogger(__name__)

Pipe = Callable[..., Any]
"""A diffusers pipeline: called with a prompt and keyword settings, it returns an object with `.images`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one row.

    Attributes:
        row: The row.
        seed: The seed its generator had.
        seconds: From the call of the pipe to the finished file.
        path: The picture; None if the row failed.
        error: Why it failed; None if it did not.
    """

    row: Row
    seed: int
    seconds: float
    path: Path | None = None
    error: str | None = None


def produce(
    pipe: Pipe,
    rows: Iterable[Row],
    out: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Iterator[Result]:
    """Check everything that can be checked now, and return an iterator that makes one picture per step.

    Nothing is rendered until the iterator is advanced::

        for result in produce(pipe, read_table("prompts.csv"), "out"):
            print(result.row.line, result.path or result.error)

    A row whose picture cannot be made yields a `Result` with `error`, and the next one follows. Each row has
    a generator of its own on the CPU, so that its noise depends neither on its neighbours nor on the device.
    What a row leaves open is left to the pipe's own defaults. Each PNG carries text chunks: ``prompt``,
    ``negative_prompt`` (if any), ``seed`` and ``settings`` (JSON).

    Args:
        pipe: A diffusers pipeline, or any callable like one.
        rows: What to make, as `read_table` returns.
        out: The folder; created if it is missing.
        seed: Rows that give none get ``seed + row.index``.
        overwrite: Replace pictures that exist. Otherwise they are an error, before anything is rendered.
        progress: Show a progress bar on stderr.

    Raises:
        BatchInputError: If rows share a name, a seed is out of range, or a row asks for what the pipe's
            ``__call__`` has no argument for.
        BatchOutputError: If the folder cannot be used or holds such pictures already; and, from the iterator,
            if a picture cannot be written (full disk), which ends the batch: the next one could not either.
    """
    rows = tuple(rows)
    out = Path(out)
    if problems := [*_seed_problems(rows, seed), *_name_problems(rows), *_argument_problems(pipe, rows)]:
        raise BatchInputError(None, problems)
    _prepare_folder(out, rows, overwrite)
    return _produce(pipe, rows, out, seed, progress)


def _produce(pipe: Pipe, rows: Sequence[Row], out: Path, seed: int, progress: bool) -> Iterator[Result]:
    failed = 0
    with tqdm(total=len(rows), unit="picture", disable=not progress) as bar:
        for row in rows:
            result = _make(pipe, row, out, _seed_of(row, seed))
            failed += result.error is not None
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
            yield result


def _make(pipe: Pipe, row: Row, out: Path, seed: int) -> Result:
    start = time.perf_counter()
    try:
        png = _render(pipe, row, seed)
    # Broad on purpose: a pipe can raise anything (out of memory, a kernel, a prompt it chokes on), and one
    # row must not cost the others. Ctrl-C and SystemExit are no Exception and pass.
    except Exception as error:
        _log.debug("line %d failed", row.line, exc_info=True)
        message = f"{type(error).__name__}: {error}".removesuffix(": ")
        return Result(row=row, seed=seed, seconds=time.perf_counter() - start, error=message)
    path = out / row.file_name
    try:
        write_atomically(path, png)
    except OSError as error:
        reason = f"{row.file_name!r} could not be written: {error.strerror or error}"
        fix = "mend this and go on with the rows that are left; finished pictures stay"
        raise BatchOutputError(out, [(row.line, f"{reason}; {fix}")]) from error
    return Result(row=row, seed=seed, seconds=time.perf_counter() - start, path=path)


def _render(pipe: Pipe, row: Row, seed: int) -> bytes:
    """Return the finished PNG of a row."""
    import torch  # here, so that checking a table does not wait for it

    arguments = _arguments(row)
    images = pipe(**arguments, generator=torch.Generator("cpu").manual_seed(seed)).images
    if not (isinstance(images, Sequence) and len(images) == 1 and isinstance(images[0], Image.Image)):
        raise TypeError(f"the pipe returned {_shown(images)} in .images; expected a list of one PIL picture")
    picture = images[0]
    settings = {name: value for name, value in arguments.items() if name not in ("prompt", "negative_prompt")}
    settings |= {"width": picture.width, "height": picture.height, "pipeline": type(pipe).__name__}
    texts = {"prompt": row.prompt, "seed": str(seed), "settings": json.dumps(settings, sort_keys=True)}
    if row.negative_prompt is not None:
        texts["negative_prompt"] = row.negative_prompt
    return _encode_png(picture, texts)


def _shown(images: object) -> str:
    kind = type(images).__name__
    return f"{kind} of {len(images)}" if isinstance(images, Sequence) else kind


def _encode_png(picture: Image.Image, texts: dict[str, str]) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)  # iTXt, not tEXt: UTF-8
    file = io.BytesIO()  # in memory, so that what breaks from here on is the folder's fault, not the row's
    picture.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def _arguments(row: Row) -> dict[str, Any]:
    """Return what the row asks for by the names that diffusers pipelines use."""
    arguments = {
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "width": row.width,
        "height": row.height,
        "num_inference_steps": row.steps,
        "guidance_scale": row.guidance_scale,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _seed_of(row: Row, seed: int) -> int:
    return seed + row.index if row.seed is None else row.seed


def _seed_problems(rows: Sequence[Row], seed: int) -> list[Problem]:
    seeds = [(row.line, _seed_of(row, seed)) for row in rows]
    fix = f"is not within 0 to {MAX_SEED}; choose another"
    return [(line, f"seed {value} {fix}") for line, value in seeds if not 0 <= value <= MAX_SEED]


def _name_problems(rows: Sequence[Row]) -> list[Problem]:
    # read_table has checked this; rows made by hand, or from two tables, come here unchecked.
    problems: list[Problem] = []
    taken: dict[str, Row] = {}
    for row in rows:
        first = taken.setdefault(collision_key(row.file_name), row)
        if first is not row:
            reason = f"file name {row.file_name!r} is taken by line {first.line}; change one"
            problems.append((row.line, reason))
    return problems


def _argument_problems(pipe: Pipe, rows: Sequence[Row]) -> list[Problem]:
    parameters = inspect.signature(pipe).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    name = type(pipe).__name__
    takes = f"it takes: {', '.join(parameters)}"
    problems: list[Problem] = []
    for argument in ("prompt", "generator"):
        if argument not in parameters:
            problems.append((None, f"{name} takes no {argument}, without which no row can be made; {takes}"))
    for row in rows:
        for argument in _arguments(row):
            if argument not in parameters and argument != "prompt":
                problems.append((row.line, f"asks for {argument}, which {name} does not take; {takes}"))
    return problems


def _prepare_folder(out: Path, rows: Sequence[Row], overwrite: bool) -> None:
    """Create the folder, and make sure that it can be written to and that no picture is in the way."""
    probe = out / ".ernie-accel-probe.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"")
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file of this name is in the way" if in_the_way else f"{error.strerror or error}"
        raise BatchOutputError(out, [(None, f"{reason}; choose a folder that can be written to")]) from error
    probe.unlink()
    problems: list[Problem] = []
    for row in rows:
        path = out / row.file_name
        if path.is_dir():
            problems.append((row.line, f"{row.file_name!r} is a folder; move it or choose another output"))
        elif not overwrite and (path.exists() or path.is_symlink()):
            problems.append((row.line, f"{row.file_name!r} exists; allow overwriting or choose another output"))
    if problems:
        raise BatchOutputError(out, problems)
