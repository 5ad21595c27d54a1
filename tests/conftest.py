"""Fixtures: fresh tiny pipelines, and the transforms that every contract test runs over."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import pytest

from tests.pipelines import tiny_ernie, tiny_flux


@pytest.fixture
def ernie() -> Any:
    return tiny_ernie()


@pytest.fixture
def flux() -> Any:
    return tiny_flux()
