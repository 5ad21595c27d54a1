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
from ernie_accel.core.hardware import GIB, HARDWARE, hardware_called, hardware_named
from ernie_accel.recipes.presets import find_preset

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
    hardware._ROWS.pop(RTX5080.key, None)  # the example of the docs adds it too, if that ran in this process
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
        ernie_accel.register_hardware(replace(RTX5080, name="GeForce RTX 4090", memory_bytes=24 * GIB))
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
        ({"usable_bytes": 17 * GIB}, "usable_bytes is a part of memory_bytes=17179869184, got 18253611008"),
        ({"usable_bytes": 0}, "usable_bytes is a part of memory_bytes=17179869184, got 0"),
        ({"pcie": (2, 16)}, "pcie is a generation (3, 4, 5) and 1, 2, 4, 8 or 16 lanes, as in (4, 16); got (2, 16)"),
        ({"pcie": (4, 12)}, "got (4, 12)"),
        ({"host_gb_s": 0.0}, "host_gb_s must be above 0, got 0.0"),
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
    ("name", "memory_gib", "key"),
    [
        ("NVIDIA GeForce RTX 3060", 11.8, "rtx3060"),
        ("NVIDIA GeForce RTX 3060 Ti", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", 23.6, "rtx4090d"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.6, "rtx4060ti"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "rtx4060ti16gb"),
        ("NVIDIA GeForce RTX 4060 Ti", None, "rtx4060ti"),
        ("NVIDIA GeForce RTX 4070 Ti", None, None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None, "rtx4070tisuper"),
        ("NVIDIA GeForce RTX 4080 SUPER", None, None),
        ("NVIDIA A100-SXM4-80GB", None, "a100"),
        ("NVIDIA A100-SXM4-40GB", None, "a10040gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a10040gb"),
        ("NVIDIA A100 80GB PCIe", 79.1, "a100pcie"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", None, "h100pcie"),
        ("NVIDIA H100 NVL", None, "h100nvl"),
        ("NVIDIA H200", None, "h200"),
        ("NVIDIA H200 NVL", None, None),
        ("Tesla T4", 14.6, "t4"),
        ("NVIDIA T4G", None, None),
        ("Tesla V100-SXM2-16GB", None, "v100"),
        ("NVIDIA A10", None, None),
        ("NVIDIA A10G", None, "a10g"),
        ("NVIDIA L4", None, "l4"),
        ("NVIDIA L40S", None, "l40s"),
        ("NVIDIA L40", None, None),
        ("Ascend910B3", 60.97, "ascend910b"),
        ("Ascend910B2C", 60.97, "ascend910b"),
        ("Ascend910B4-1", None, "ascend910b"),
        ("Ascend910B4", 29.5, None),  # half the memory, and slower
        ("Ascend910_9382", 61.3, None),
        ("Ascend310P3", 43.2, None),
    ],
)
def test_devices_are_known_by_the_names_that_drivers_give(name, memory_gib, key):
    found = hardware_called(name, None if memory_gib is None else int(memory_gib * GIB))
    assert (found.key if found else None) == key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("RTX 4060 Ti", "rtx4060ti"),
        ("RTX 4060 Ti 8GB", "rtx4060ti"),
        ("NVIDIA GeForce RTX 4060 Ti 16 GB", "rtx4060ti16gb"),
        ("A100", "a100"),
        ("A100 80GB", "a100"),
        ("A100-40GB", "a10040gb"),
        ("T4", "t4"),
        ("Tesla T4", "t4"),
        ("NVIDIA T4", "t4"),
        ("l4", "l4"),
        ("RTX4090D", "rtx4090d"),
        ("910b", "ascend910b"),
        ("Ascend 910B", "ascend910b"),
        ("Huawei Ascend910B", "ascend910b"),
        ("Ascend910B3", "ascend910b"),
        ("ascend 910b2", "ascend910b"),
        ("910B4-1", "ascend910b"),
    ],
)
def test_devices_are_found_by_what_people_write(name, key):
    assert hardware_named(name).key == key


@pytest.mark.parametrize("name", ["RTX 4090 16GB", "A100 41GB", "RTX 4060 Ti 32GB", "Ascend910B4"])
def test_a_memory_that_a_card_does_not_have_is_an_unknown_device(name):
    with pytest.raises(ernie_accel.UnknownNameError, match="Unknown device"):
        hardware_named(name)


@pytest.mark.parametrize("row", [row for row in HARDWARE.values() if row.device == "cuda"], ids=lambda row: row.key)
def test_published_peaks_are_those_of_dense_products_with_float32_sums(row):
    """A slip into the column of sparse products or of float16 sums would show as another ratio between two rates."""
    rates = row.published().known()
    if "bf16_tflops" in rates:
        assert rates["fp16_tflops"] == rates["bf16_tflops"]
    if "fp8_tflops" in rates:
        assert rates["fp8_tflops"] / rates["bf16_tflops"] == pytest.approx(2, rel=0.015)
        assert row.capability >= (8, 9)
    if "int8_tops" in rates:
        int8 = rates["int8_tops"] / rates["fp16_tflops"]
        assert int8 == pytest.approx(4 if "GeForce" in row.name else 2, rel=0.015)


@pytest.mark.parametrize(
    ("key", "gib", "tb_s", "pcie", "gb_s"),
    [
        ("rtx5090", 32, 1.792, (5, 16), 55),
        ("rtx4090", 24, 1.008, (4, 16), 25),
        ("rtx4060", 8, 0.272, (4, 8), 12.5),
        ("rtx4060ti16gb", 16, 0.288, (4, 8), 12.5),
        ("t4", 16, 0.32, (3, 16), 12),
        ("h200", 141, 4.8, (5, 16), 55),
    ],
)
def test_rows_know_the_link_to_the_host(key, gib, tb_s, pcie, gb_s):
    row = HARDWARE[key]
    assert (row.memory_bytes, row.published().bandwidth_tb_s) == (gib * GIB, tb_s)
    assert (row.pcie, row.host_gb_s) == (pcie, gb_s)


@pytest.mark.parametrize("row", [row for row in HARDWARE.values() if row.usable_bytes], ids=lambda row: row.key)
def test_what_torch_reports_is_a_little_less_than_the_vendor_says(row):
    assert 0.9 < row.usable_bytes / row.memory_bytes < 1


def test_a_link_of_ones_own_has_the_rate_that_is_given():
    assert replace(RTX5080, pcie=(5, 8)).host_gb_s == 27.5
    assert replace(RTX5080, pcie=(5, 8), host_gb_s=20.0).host_gb_s == 20.0
    assert replace(RTX5080, host_gb_s=400.0).host_gb_s == 400.0  # a link of another kind
    assert RTX5080.host_gb_s is None


@pytest.mark.parametrize("row", [row for row in HARDWARE.values() if row.device != "cpu"], ids=lambda row: row.key)
def test_every_device_names_a_preset_that_it_can_run(row, ernie):
    preset = find_preset(row.key)
    assert f"`{row.key}`" in (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    context = replace(
        Context.named(row.key), versions=dict.fromkeys(("triton", "torchao", "cudnn", "torch_npu"), "1.0")
    )
    assert ernie_accel.plan(ernie, preset=preset, context=context).problems == {}
