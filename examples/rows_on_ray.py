"""Draw the rows of a Ray dataset: `ray.data` hands batches to actors, each with a pipe and a `Producer` of its own.

    python -m examples.rows_on_ray s3://shop/products.parquet /mnt/pictures --actors 8 --model baidu/ERNIE-Image-Turbo

For tables that live where Ray reads them, and jobs whose next step is on Ray too. All actors must see the folder.
Rows need `prompt` and `file_name`; `seed`, `width`, `height`, `steps`, `guidance_scale` and `negative_prompt` are used
where they are there. What comes out are the same rows with `path`, `picture_seed` and `error`. Run again, it draws only
what is missing. It has no ledger and no report: `ernie-accel batch --ray-actors` has both. It needs
``pip install 'ray[data]'``. Each actor waits for a GPU; where there is none, give ``--gpus 0``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa

from ernie_accel.batch import BatchInputError, BatchOutputError, Producer, Result, Row
from ernie_accel.batch.engines import Engine
from ernie_accel.batch.input.row import MAX_SEED

WHOLE = ("seed", "width", "height", "steps")
#: The columns that are added.
MADE = {"path": pa.string(), "picture_seed": pa.uint64(), "error": pa.string()}


class Draw:
    """An actor's work: `ray.data` makes one of these in each actor, and calls it with batches."""

    def __init__(self, load: Callable[[], Any], out: str) -> None:
        """Load the pipe.

        Args:
            load: Returns the pipe, or an engine; called in the actor.
            out: The folder for the pictures.
        """
        self._producer = Producer(load(), out, retries=1)
        self._out = Path(out)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch with what became of each row; a row that fails costs no other."""
        submitted = [self._submit(row) for row in batch.to_pylist()]
        made = [each if isinstance(each, dict) else _outcome(each) for each in submitted]
        batch = batch.drop_columns([name for name in MADE if name in batch.column_names])
        for name, kind in MADE.items():
            batch = batch.append_column(name, pa.array([each[name] for each in made], kind))
        return batch

    def _submit(self, values: Mapping[str, Any]) -> Future[Result] | dict[str, object]:
        settings = {name: values[name] for name in (*WHOLE, "guidance_scale", "negative_prompt") if name in values}
        given = {name: value for name, value in settings.items() if value is not None and value == value}  # no NaN
        # Nothing is no text: str(None) would be drawn, too.
        prompt, file_name = ("" if values.get(name) is None else str(values[name]) for name in ("prompt", "file_name"))
        # From the name, not the place in the table: blocks come in any order, and a row keeps its picture.
        seed = zlib.crc32(file_name.encode())
        try:
            given |= {name: int(given[name]) for name in WHOLE if name in given}
            seed = given.pop("seed", seed)
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seed {seed} is not within 0 to {MAX_SEED}")
            if not prompt.strip():
                raise ValueError("prompt is empty; write what to draw")
            row = Row(line=1, index=0, prompt=prompt, file_name=file_name, seed=seed, **given)
            if (self._out / row.path).is_file():
                return {"path": str(self._out / row.path), "picture_seed": seed, "error": ""}
            return self._producer.submit(row)
        except (ValueError, BatchInputError, BatchOutputError) as error:
            return {"path": "", "picture_seed": seed if 0 <= seed <= MAX_SEED else None, "error": str(error)}


def _outcome(future: Future[Result]) -> dict[str, object]:
    result = future.result()
    return {"path": str(result.path or ""), "picture_seed": result.seed, "error": result.error or ""}


def drawn(rows: Any, load: Callable[[], Any], out: str, *, actors: int, num_gpus: float = 1.0, batch: int = 64) -> Any:
    """Return a dataset of the rows and their pictures, which is made as it is read.

    Args:
        rows: A `ray.data.Dataset`.
        load: Returns the pipe, or an engine; called in each actor.
        out: The folder for the pictures, which every actor sees.
        actors: How many.
        num_gpus: Of each.
        batch: Rows handed to an actor at once; the producer makes batches of its own of those alike.
    """
    import ray.data

    return rows.map_batches(
        Draw,
        fn_constructor_args=(load, out),
        batch_size=batch,
        batch_format="pyarrow",  # numpy and pandas make floats of whole numbers where one is missing
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=num_gpus,
    )


def load_model(model: str, preset: str = "auto") -> Engine:
    """Return an engine with a model, optimized for the actor's machine."""
    import ernie_accel
    from ernie_accel.batch.engines import LocalEngine

    return LocalEngine(ernie_accel.load(model, preset=preset))


def main() -> None:
    """Draw the rows of a Parquet table, and write what became of them beside the pictures."""
    try:
        import ray.data
    except ModuleNotFoundError as error:  # pandas, too, which it imports
        sys.exit(f"error: {error.name} is not installed: pip install 'ray[data]'")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table")
    parser.add_argument("out")
    parser.add_argument("--model", required=True)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=1.0, help="of each actor")
    given = parser.parse_args()
    load = functools.partial(load_model, given.model)
    rows = drawn(ray.data.read_parquet(given.table), load, given.out, actors=given.actors, num_gpus=given.gpus)
    rows.write_parquet(f"{given.out}/drawn", mode="overwrite")  # a second run has every row, too


if __name__ == "__main__":
    main()
