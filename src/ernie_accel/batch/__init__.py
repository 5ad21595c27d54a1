"""Make one picture per row of a table: ``for result in produce(pipe, read_table("prompts.csv"), "out")``.

Importing this package loads neither torch nor diffusers: a table is checked before anything heavy starts.
Read `line` first: it is where the parts come together.
"""

from __future__ import annotations

# Imported eagerly on purpose: the function `produce` shares its module's name, and a lazy attribute would
# turn into that module as soon as anybody imports it. All of these are light.
from ernie_accel.batch.errors import BatchChangedError, BatchInputError, BatchOutputError
from ernie_accel.batch.given import read_rows
from ernie_accel.batch.line import Result
from ernie_accel.batch.metrics import MetricsServer
from ernie_accel.batch.produce import aproduce, produce
from ernie_accel.batch.producer import Producer
from ernie_accel.batch.row import Row
from ernie_accel.batch.sift import Sift
from ernie_accel.batch.table import read_table

__all__ = [
    "BatchChangedError",
    "BatchInputError",
    "BatchOutputError",
    "MetricsServer",
    "Producer",
    "Result",
    "Row",
    "Sift",
    "aproduce",
    "produce",
    "read_rows",
    "read_table",
]
