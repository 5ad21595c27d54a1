"""The lifecycle matrix: what a script does to an optimized pipe is right, or refused before anything changes.

subjects.py   the rows: transforms and presets, and the tiny pipelines they are applied to
actions.py    the columns: what scripts do to a pipe
cells.py      one cell: do it to an optimized pipe and to a stock one, and compare
page.py       all cells, written to docs/lifecycle.md: ``python -m tests.lifecycle``
"""

from __future__ import annotations

import logging

import diffusers

for _library in ("transformers", "peft", "torchao"):  # they repeat their advice in every cell
    logging.getLogger(_library).setLevel(logging.ERROR)
diffusers.utils.logging.set_verbosity_error()
