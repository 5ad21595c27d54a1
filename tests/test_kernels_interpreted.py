"""Run the kernel tests in Triton's interpreter, in a process of its own: importing triton switches it on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton  # noqa: F401  no importorskip: what is missing fails


@pytest.mark.parametrize("name", ["test_kernels.py", "test_group_norm.py", "test_decode.py"])
def test_kernels_equal_their_twins_in_the_interpreter(name: str) -> None:
    tests = Path(__file__).with_name("gpu") / name
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tests), "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
