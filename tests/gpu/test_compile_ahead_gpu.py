"""What is compiled ahead is what launches look for: Triton finds every kernel in its cache, and compiles none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tools.kernel_lists.recording import Recorder, set_of

import ernie_accel
from ernie_accel.kernels import ahead
from tests.gpu.test_fast_gpu import latents


def draw(precision: str) -> None:
    pipe = ernie_accel.demo.load(dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    ernie_accel.optimize(pipe, preset=f"turbo-{precision}", memory=None)
    latents(pipe)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_every_launch_finds_its_kernel(precision: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    with Recorder() as recorder:
        draw(precision)
    launched = set_of(recorder.found)
    assert len(launched) > 4

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert ahead.compile_all(launched, torch.cuda.get_device_capability()) == len(launched)
    hits: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit))
    with Recorder() as again:
        draw(precision)
    assert set_of(again.found) == launched
    assert len(hits) >= len(launched) and all(hits)
