"""Make one picture per row of a table: ``for result in produce(pipe, read_table("prompts.csv"), "out")``.

Importing this package loads neither torch nor diffusers: a table is checked before anything heavy starts.
"""

from __future__ import annotations

# Imported eagerly on purpose: the function `produce` shares its module's name, and a lazy attribute would
# turn into that module as soon as anybody imports it. All of these are light.
from ernie_accel.batch.errors import BatchInputError, BatchOutputError
from ernie_accel.batch.produce import Result, produce
from ernie_accel.batch.table import Row, read_table

__all__ = ["BatchInputError", "BatchOutputError", "Result", "Row", "produce", "read_table"]
