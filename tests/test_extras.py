"""The suite's environment holds every extra that works on a CPU: a backend that is missing fails here, by name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from ernie_accel.core.context import OPTIONAL_PACKAGES

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
ALL = re.search(r"^all = \[\"ernie-accel\[(.+)\]\"\]", PYPROJECT, re.MULTILINE)[1].split(",")


@pytest.mark.parametrize("package", [name for name, extra in OPTIONAL_PACKAGES.items() if extra in ALL])
def test_a_requested_backend_can_be_imported(package):
    assert importlib.import_module(package) is not None


def test_every_extra_is_in_all_but_those_that_need_a_device_or_draw_nothing():
    extras = set(
        re.findall(r"^([\w-]+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
    )
    assert extras - set(ALL) == {"all", "npu", "cudnn", "onnx"}


def test_torch_npu_is_in_no_other_extra():
    """Without Ascend drivers its wheel breaks ``import torch`` itself."""
    assert re.findall(r"^(.+) = .*torch-npu", PYPROJECT, re.MULTILINE) == ["npu"]
