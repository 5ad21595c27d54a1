"""The benchmark of attention, at a size for the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmarks import attention


def test_it_times_and_judges_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py", "--tiny", "--out", str(tmp_path / "attention")])
    attention.main()
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {(row["sizes"], row["precision"]) for row in rows} == {
        (name, precision) for name in attention.TINY for precision in ("bf16", "fp8")
    }
    assert all(row["us"] > 0 and min(row["db"]) > 100 for row in rows)  # the twin is the same in float32
    assert (tmp_path / "attention.md").read_text().count("\n| ") == len(rows) + 2


def test_an_error_larger_than_rounding_is_seen() -> None:
    """Values that come out 6 % too small are 24 dB away."""
    q, k, v = attention.drawn((1, 70, 2, 1, 96), 0.2, 0.5, attention.torch.float32, "cpu")
    expected = attention.exact(q, k, v, 60)
    assert attention.sqnr_db(expected, expected * 0.94) == pytest.approx(24.4, abs=0.1)
