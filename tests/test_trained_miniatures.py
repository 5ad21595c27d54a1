"""The trained miniatures of Z-Image and Lumina 2: they draw what is asked for, optimized ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tools.embedded_model import miniatures
from tools.embedded_model.miniatures import MINIATURES

import ernie_accel
from ernie_accel import CastDtype, Context, FuseKernels, RewriteBlocks
from ernie_accel.demo.judge import adherence
from ernie_accel.kernels.linear import Fp8Linear

TRAINED = Path(miniatures.__file__).with_name("trained")
OTHERS = [name for name, each in MINIATURES.items() if not each.has_enhancer]
#: A card whose kernels run here as their twins in plain torch.
H200 = Context.named("h200")


@pytest.fixture(scope="module", params=OTHERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn(name: str, *transforms: Any, pictures: int = 12) -> float:
    """Return the share of objects that are right, in few steps."""
    pipe = miniatures.load(TRAINED / name, name)
    pipe.set_progress_bar_config(disable=True)
    if transforms:
        ernie_accel.optimize(pipe, *transforms, context=H200)
        assert sum(isinstance(part, Fp8Linear) for part in pipe.transformer.modules()) >= 12
    guidance = MINIATURES[name].guidance_scale
    return adherence(pipe, pictures, 4, guidance_scale=guidance, batch_size=pictures).object_fraction


def test_a_folder_takes_at_most_six_megabytes(name: str) -> None:
    assert sum(file.stat().st_size for file in (TRAINED / name).rglob("*") if file.is_file()) <= 6e6
    assert not list((TRAINED / name).rglob("vae*")), "it decodes with the package's VAE"


def test_most_objects_are_right_and_fp8_keeps_them(name: str) -> None:
    """The kernels' twins compute in fp8 what the card does; the docs' table has more pictures."""
    stock = drawn(name)
    assert stock > 0.75
    assert drawn(name, CastDtype("bf16"), RewriteBlocks(), FuseKernels("fp8")) >= stock - 0.05


def test_an_untrained_transformer_draws_nothing(name: str) -> None:
    """What the judge says of noise: the shares above are not the judge's kindness."""
    pipe = miniatures.load(TRAINED / name, name)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    pipe.transformer = MINIATURES[name].build_transformer().eval()
    guidance = MINIATURES[name].guidance_scale
    assert adherence(pipe, 4, 2, guidance_scale=guidance, batch_size=4).object_fraction < 0.1
