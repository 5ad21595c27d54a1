"""The benchmark of a ControlNet, at a size for the CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_it_times_every_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark: Any = importlib.import_module("controlnet")
    monkeypatch.setattr(sys, "argv", ["controlnet.py", "--tiny", "--out", str(tmp_path / "controlnet")])
    benchmark.main()
    rows = json.loads((tmp_path / "controlnet.json").read_text())["rows"]
    assert [row["rung"] for row in rows] == list(benchmark.TINY_RUNGS)
    assert all(row[name] > 0 for row in rows for name in ("ms_64", "ms_128"))
    assert all(row["rung"] in (tmp_path / "controlnet.md").read_text() for row in rows)
