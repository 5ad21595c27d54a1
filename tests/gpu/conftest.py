"""These tests need a CUDA device and fail without one: a GPU run that skips everything proves nothing.

Only the kernels may also run in Triton's interpreter, which ``test_kernels_interpreted.py`` asks for.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if items and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("tests/gpu needs a CUDA device, and torch sees none")
