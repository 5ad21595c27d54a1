"""The one table of hardware: each row says where it comes from, and others can add rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import ernie_accel
from ernie_accel import Context, Hardware, Rates
from ernie_accel.core import hardware
from ernie_accel.core.hardware import GIB, HARDWARE, hardware_called

ROOT = Path(__file__).parents[1]
RTX5080 = Hardware(
    "rtx5080",
    "NVIDIA GeForce RTX 5080",
    "cuda",
    (12, 0),
    16 * GIB,
    source="published by NVIDIA",
    preset="turbo-fp8",
    why="multiplies in fp8",
)


@pytest.fixture
def table():
    """Let a test add rows that no other test sees."""
    rows = dict(hardware._ROWS)
    yield HARDWARE
    hardware._ROWS.clear()
    hardware._ROWS.update(rows)


@pytest.mark.parametrize("row", HARDWARE.values(), ids=lambda row: row.key)
def test_every_row_says_where_it_comes_from(row):
    assert row.source
    for rates in row.rates:
        assert rates.source and rates.known()
    published = row.published()
    if published is not None:
        assert published.evidence == "published"
    for word in ("published:", "measured"):
        if row.why.startswith(word):
            assert row.evidence == word.rstrip(":")
    if "nothing is published" in row.why or "nobody has published" in row.why:
        assert row.evidence == "none"


def test_what_is_measured_is_in_the_file_it_names_and_below_the_peaks():
    measured = [(row, rates) for row in HARDWARE.values() for rates in row.rates if rates.evidence == "measured"]
    assert measured
    for row, rates in measured:
        result = json.loads((ROOT / rates.source).read_text())
        assert result["device"] == row.name
        ceilings = result["ceilings"] | {"bandwidth_tb_s": result["ceilings"]["copy_tb_s"]}
        for name, value in rates.known().items():
            assert value == round(ceilings[name], 1)
            assert value < row.published().known()[name]


def test_no_other_module_keeps_names_of_devices_with_their_facts():
    """A second table would drift from the first: no other code pairs a card's name with a capability or bytes."""
    fact = re.compile(r"(rtx|h100|h200|b200|a100|910b|l40s)[^\n]*(\(\d+, \d\)|GIB)", re.IGNORECASE)
    paths = [*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    found = [path.name for path in paths if fact.search(path.read_text(encoding="utf-8"))]
    assert found == ["hardware.py"]


def test_a_row_of_ones_own_is_found_everywhere(table, ernie):
    assert ernie_accel.register_hardware(RTX5080) == RTX5080
    assert ernie_accel.register_hardware(RTX5080) == RTX5080  # again: nothing changes
    context = Context.named("GeForce RTX 5080")
    assert (context.device_name, context.capability, context.memory_bytes) == (RTX5080.name, (12, 0), 16 * GIB)
    plan = ernie_accel.plan(ernie, preset="rtx5080", context=context)
    assert plan.preset.summary == "turbo-fp8 for this card: multiplies in fp8."
    found = ernie_accel.recommend(replace(context, versions={"triton": "3"}))
    assert found.preset.name == "turbo-fp8"
    assert found.why == ("NVIDIA GeForce RTX 5080: multiplies in fp8",)


def test_a_row_that_does_not_fit_is_refused_and_changes_nothing(table):
    before = dict(table)
    with pytest.raises(TypeError, match="expected a Hardware, got 'rtx5080'"):
        ernie_accel.register_hardware("rtx5080")
    with pytest.raises(ernie_accel.UnknownNameError, match=r"Unknown preset 'turbo-fp9'.*Did you mean 'turbo-fp8'"):
        ernie_accel.register_hardware(replace(RTX5080, preset="turbo-fp9"))
    with pytest.raises(ValueError, match=r"'rtx4090' .* is in the table already, and differs"):
        ernie_accel.register_hardware(replace(RTX5080, key="rtx4090"))
    with pytest.raises(ValueError, match="is in the table already, and differs"):
        ernie_accel.register_hardware(replace(RTX5080, name="GeForce RTX 4090"))
    with pytest.raises(ValueError, match="is the name of a preset"):
        ernie_accel.register_hardware(replace(RTX5080, key="exact"))
    assert table == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "RTX 5080"}, "use 'rtx5080'"),
        ({"key": ""}, "key=''"),
        ({"name": " "}, "as its driver writes it"),
        ({"capability": None}, "a CUDA device has a capability"),
        ({"device": "npu"}, "no other device does"),
        ({"memory_bytes": 0}, "memory_bytes must be above 0"),
        ({"source": ""}, "say where the capability and the memory come from"),
        ({"evidence": "guessed"}, "evidence is one of measured, published, none"),
        ({"why": ""}, "say why it should run preset 'turbo-fp8'"),
    ],
)
def test_a_row_says_what_is_wrong_with_it(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(RTX5080, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evidence": "guessed", "source": "me"}, "'measured' or 'published'"),
        ({"evidence": "measured", "source": ""}, "by a named source"),
        ({"evidence": "measured", "source": "me", "fp8_tflops": -1.0}, "fp8_tflops must be above 0, got -1.0"),
        ({"evidence": "measured", "source": "me", "fp8_tflops": float("nan")}, "fp8_tflops must be above 0, got nan"),
    ],
)
def test_rates_say_what_is_wrong_with_them(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Rates(**arguments)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA GeForce RTX 3060", "rtx3060"),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA T4G", None),
        ("NVIDIA A10", None),
    ],
)
def test_devices_are_known_by_the_names_that_drivers_give(name, key):
    found = hardware_called(name)
    assert (found.key if found else None) == key
