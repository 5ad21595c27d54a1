"""The benchmark of attention, at a size for the CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie_accel.kernels import reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("attention")


def test_it_times_and_judges_every_size(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py", "--tiny", "--out", str(tmp_path / "attention")])
    benchmark.main()
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {(row["sizes"], row["precision"]) for row in rows} == {
        (name, precision) for name in benchmark.TINY for precision in ("bf16", "fp8")
    }
    assert all(row["us"] > 0 and min(row["db"]) > 100 for row in rows)  # the twin is the same in float32
    assert (tmp_path / "attention.md").read_text().count("\n| ") == len(rows) + 2


def test_an_error_larger_than_rounding_is_seen(benchmark: Any) -> None:
    """Values that come out 6 % too small are 24 dB away."""
    operands = benchmark.drawn((1, 70, 2, 1, 96), 0.2, 0.5, torch.float32, "cpu")
    expected = reference.attention(*operands, None)
    assert benchmark.sqnr_db(expected, expected * 0.94) == pytest.approx(24.4, abs=0.1)
