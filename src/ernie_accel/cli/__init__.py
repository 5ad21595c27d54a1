"""The command line: app.py has the commands, batch.py and evaluate.py the two with many options."""

from __future__ import annotations

from ernie_accel.cli.app import app, main

__all__ = ["app", "main"]
