"""The LoRA benchmark says what ran, and a step runs the same whatever the rank."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def lora(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("benchmarks.lora")


def test_ranks_differ_in_columns_and_not_in_operators(
    lora: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lora"
    command = f"lora.py --tiny --layers all --ranks 16 64 --steps 1 --rounds 2 --out {out}"
    monkeypatch.setattr("sys.argv", command.split())
    lora.main()
    rows = json.loads(out.with_suffix(".json").read_text("utf-8"))["rows"]
    assert [(row["round"], row["rank"]) for row in rows] == [(1, 16), (1, 64), (2, 64), (2, 16)]
    seen = [row["seen"] for row in rows]
    assert all(each["operators"] == seen[0]["operators"] for each in seen)
    assert seen[0]["operators"]["ernie_accel.low_rank_into.default"] == 9
    assert all(each["added_in_place"] == 3 for each in seen)  # of the first block, in bfloat16
    assert [each["spare_columns"].keys() - {"0"} for each in seen[:2]] == [{"128"}, {"128", "256"}]
    assert all(len(each["steps_ms"]) == 1 and not each["captured_anew"] for each in seen)
    assert out.with_suffix(".md").read_text("utf-8") in capsys.readouterr().out
