"""Run the kernel tests in Triton's interpreter, in a process of its own: importing triton switches it on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton  # noqa: F401  no importorskip: what is missing fails

GPU = Path(__file__).with_name("gpu")
FILES = ("test_kernels.py", "test_group_norm.py", "test_decode.py")
#: The interpreter takes milliseconds for each tile: larger ones of the sizes, of which others are in the default tests.
LONG = (
    "test_decode.py::test_a_step_of_the_kernels_equals_the_plain_forward",
    *(f"test_decode.py::test_linear[{fp8}-sizes0-{width}-1]" for fp8 in (False, True) for width in (80, 1040)),
    *(
        f"test_group_norm.py::test_{case}]"
        for size in ("(2, 48, 5, 13, 6)", "(1, 64, 9, 13, 4)")
        for case in (
            *(f"add_group_norm_affine[({size}, (512, 128))-{x}-{y}" for x in (False, True) for y in (False, True)),
            *(f"group_norm_affine[({size}, (512, 128))-{x}" for x in (False, True)),
        )
    ),
)


def run_interpreted(*arguments: str) -> str:
    """Run tests of GPU by the interpreter, and return what pytest prints; none may fail."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"],
        cwd=GPU,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    printed = run_interpreted(*FILES, *(f"--deselect={GPU.parent.name}/gpu/{name}" for name in LONG))
    assert "passed" in printed
    assert f"{len(LONG)} deselected" in printed, "LONG names tests that are not there"


@pytest.mark.slow
def test_kernels_equal_their_twins_at_more_sizes_in_the_interpreter() -> None:
    assert f"{len(LONG)} passed" in run_interpreted(*LONG)
