"""Make one picture per row of a table: ``for result in produce(pipe, read_table("prompts.csv"), "out")``.

Importing this package loads neither torch nor diffusers: a table is checked before anything heavy starts.
Read `line.line` first: it is where the parts come together. The rooms, from the ground up:

engines  render: in this process, in a child process, on image servers, on Ray
input    from tables, job files and Python objects to checked rows
watch    show how a job is going
output   the folder, the ledger, the pictures and the report
line     move rows from the input through an engine into the output
"""

from __future__ import annotations

# Imported eagerly: all of these are light.
from ernie_accel.batch.errors import (
    BatchChangedError,
    BatchInputError,
    BatchOutputError,
    QueueFullError,
    WaitedTooLongError,
)
from ernie_accel.batch.input.given import read_rows
from ernie_accel.batch.input.row import Row
from ernie_accel.batch.input.sift import Sift
from ernie_accel.batch.input.table import read_table
from ernie_accel.batch.line.line import Result
from ernie_accel.batch.line.produce import aproduce, produce
from ernie_accel.batch.line.producer import Producer, Progress
from ernie_accel.batch.watch.metrics import MetricsServer

__all__ = [
    "BatchChangedError",
    "BatchInputError",
    "BatchOutputError",
    "MetricsServer",
    "Producer",
    "Progress",
    "QueueFullError",
    "Result",
    "Row",
    "Sift",
    "WaitedTooLongError",
    "aproduce",
    "produce",
    "read_rows",
    "read_table",
]
