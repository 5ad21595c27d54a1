"""The benchmark runs on a CPU, too: a tiny model, one process a rung, a table and files at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_ladder_measures_and_saves(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ladder.py"), "--size", "tiny", "--only", "stock,rewrite"]
    done = subprocess.run(
        [*command, "--save", str(tmp_path / "ladder")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "ladder.json").read_text())
    rows = {row["rung"]: row for row in result["rungs"]}
    assert set(rows) == {"stock", "rewrite"}
    assert rows["rewrite"]["sqnr_db"] > 30
    assert rows["rewrite"]["ms_64"] > 0
    assert "| rewrite |" in (tmp_path / "ladder.md").read_text()
