"""A job that is killed 200 times at random moments ends exactly as one that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the job's driver forks; Windows cannot")
def test_a_job_killed_at_random_moments_loses_nothing_and_makes_nothing_twice(tmp_path):
    command = [sys.executable, "-m", "tests.kill_job", str(tmp_path), str(KILLS)]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{KILLS} kills over ")
