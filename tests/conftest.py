"""Fixtures: fresh tiny pipelines, and the transforms that every contract test runs over."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import sys
from types import SimpleNamespace
from typing import Any

os.environ["ERNIE_ACCEL_LANG"] = "en"  # whatever the locale of whoever runs the tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
os.environ.setdefault("RAY_worker_niceness", "0")  # by default actors wait for all others: loading takes 100 s, not 6
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # children would compile all that they import, for 10 s each
os.environ.setdefault("ERNIE_ACCEL_COMPILE_AHEAD", "0")  # nothing for a GPU that only a test claims to be there

import pytest
import torch
from torch.utils import cpp_extension

import ernie_accel
from ernie_accel.core.outputs import images_of
from tests.pipelines import tiny_ernie, tiny_flux

#: Looked for as often as Python does by default, garbage takes a tenth of all time: these packages import a lot.
gc.set_threshold(20_000, 20, 50)
atexit.register(gc.unfreeze)  # what `collected` leaves out counts at the end again, when libraries look for leaks


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Begin a file without garbage of others, and leave what they imported out of every later search for garbage.

    Going through all of that takes a third of a second, and more whenever something calls ``gc.collect``.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """Fail a test that leaves a setting of the whole process changed: the next ones would compute with it."""
    before = _settings()
    yield
    assert _settings() == before


def _settings() -> dict[str, object]:
    return {
        "attention backend": _attention_backend(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def _attention_backend() -> str:
    """Return diffusers' default, which before its import is what the environment says."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        return os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")
    backend: str = dispatch._AttentionBackendRegistry._active_backend.value
    return backend


def quanto_stand_in() -> SimpleNamespace:
    """Return what stands in for quanto's C++ extension."""

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])

    return SimpleNamespace(unpack=unpack)


@pytest.fixture(scope="session", autouse=True)
def quanto_in_python():
    """Unpack quanto's int4 in Python: a new environment compiles quanto's C++ at the first use, for half a minute.

    ``test_quantize_traps.py`` compares the two.
    """
    load = cpp_extension.load

    def load_others(name: str, *arguments: Any, **options: Any) -> Any:
        return quanto_stand_in() if name == "quanto_cpp" else load(name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_extension, "load", load_others)
        yield


@pytest.fixture
def traced_only(monkeypatch):
    """Let what `Compile` traces run as it is, for time's sake, with everything else as `Compile` has it."""
    compiled = torch.nn.Module.compile

    def compile_module(self, *, mode=None, backend=None, **kwargs):
        compiled(self, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ernie() -> Any:
    return tiny_ernie()


@pytest.fixture
def flux() -> Any:
    return tiny_flux()


@pytest.fixture(scope="session")
def trained():
    """Return (steps, *transforms) -> the latents of two scenes by the embedded model, and how often all blocks ran.

    Guidance is 4. Each is drawn once in a session.
    """
    pipe = ernie_accel.demo.load(dtype=torch.float32, prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    ran = []
    pipe.transformer.layers[-1].register_forward_pre_hook(lambda *_: ran.append(1))
    scenes = [
        "a large red circle in the center on a grey background",
        "a small blue square on the left on a white background",
    ]

    @functools.cache
    def latents(steps, *transforms):
        ernie_accel.optimize(pipe, *transforms) if transforms else ernie_accel.restore(pipe)
        ran.clear()
        size = {"height": 64, "width": 64, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        images = images_of(pipe(scenes, num_inference_steps=steps, guidance_scale=4.0, **size))
        return images.float(), len(ran)

    latents.pipe = pipe
    return latents
