"""Write into the pages what ``ernie-accel plan`` prints: ``python docs/generate_plans.py``; a test holds them to it.

A Chinese page shows what the command of the English one prints with ``--lang zh``.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from ernie_accel.cli import main

PAGES = tuple(Path(__file__).parent / name for name in ("concepts.md", "memory.md", "memory.zh.md"))
#: A command and what it prints, up to the end of the block.
SHOWN = re.compile(r"^\$ ernie-accel (?P<command>plan .*)\n(?P<printed>(?s:.*?))(?=^```)", flags=re.MULTILINE)


def printed(command: str) -> str:
    """Return what a command prints that ends with exit code 0."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(command.split())
        except SystemExit as ended:
            if ended.code:
                raise
    return out.getvalue()


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = SHOWN.sub(lambda found: f"$ ernie-accel {found['command']}\n{printed(found['command'])}", text)
        page.write_text(new, encoding="utf-8")
