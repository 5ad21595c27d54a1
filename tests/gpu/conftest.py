"""These tests need a CUDA device and fail without one: a GPU run that skips everything proves nothing."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if items and not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a CUDA device, and torch sees none")
