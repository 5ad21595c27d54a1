"""Run the kernel tests in Triton's interpreter, in a process of its own: importing triton switches it on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import triton  # noqa: F401  no importorskip: what is missing fails


def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    gpu = Path(__file__).with_name("gpu")
    names = ("test_kernels.py", "test_group_norm.py", "test_decode.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *(str(gpu / name) for name in names), "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
