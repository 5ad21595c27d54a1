"""The trained miniatures of Z-Image and Lumina 2: they draw what is asked for, optimized ones too."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tools.embedded_model import miniatures
from tools.embedded_model.miniatures import MINIATURES

import ernie_accel
from ernie_accel import CastDtype, Context, FuseKernels, RewriteBlocks
from ernie_accel.demo.judge import adherence, unseen_prompts
from ernie_accel.kernels import reference
from ernie_accel.kernels.linear import Fp8Linear

TRAINED = Path(miniatures.__file__).with_name("trained")
OTHERS = [name for name, each in MINIATURES.items() if not each.has_enhancer]
#: A card whose kernels run here as their twins in plain torch.
H200 = replace(Context.named("h200"), versions={**Context.named("h200").versions, "cudnn": "1.32"})


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


@torch.no_grad()
def test_mixed_queries_and_keys_bring_attention_in_fp8_nearer_to_the_prediction_in_float32(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 3 steps of 4 prompts, Z-Image's -26.7 dB become -27.7 and Lumina 2's -28.3 become -29.5.

    The pages' figures are over 9 steps of 16 prompts (``tools/embedded_model/parts.py``). Pictures show no difference.
    """
    pipe = miniatures.load(TRAINED / name, name)
    pipe.set_progress_bar_config(disable=True)
    calls: list[Any] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    texts = [text for text, _ in unseen_prompts(4, seed=3)]
    arguments = {"guidance_scale": MINIATURES[name].guidance_scale, "output_type": "latent", "num_inference_steps": 3}
    pipe(texts, height=128, width=128, generator=torch.Generator().manual_seed(0), **arguments)
    want = predicted(pipe.transformer, calls, torch.float32)
    ernie_accel.optimize(pipe, CastDtype("bf16"), RewriteBlocks(), FuseKernels("fp8"), context=H200)

    def error_db() -> float:
        return 20 * math.log10((predicted(pipe.transformer, calls, torch.bfloat16) - want).norm() / want.norm())

    mixed = error_db()
    monkeypatch.setattr(reference, "mixed", lambda x: x)
    apart = error_db()
    print(f"{mixed:.2f} dB, without mixing {apart:.2f}")
    assert mixed < apart - 0.8


def predicted(transformer: Any, calls: list[Any], dtype: torch.dtype) -> torch.Tensor:
    def cast(x: Any) -> Any:
        if isinstance(x, list):
            return [cast(each) for each in x]
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    found = []
    for args, kwargs in calls[:3]:
        out = transformer(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})[0]
        found.append((torch.stack(out) if isinstance(out, list) else out).float())
    return torch.stack(found)


def test_an_untrained_transformer_draws_nothing(name: str) -> None:
    """What the judge says of noise: the shares above are not the judge's kindness."""
    pipe = miniatures.load(TRAINED / name, name)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    pipe.transformer = MINIATURES[name].build_transformer().eval()
    guidance = MINIATURES[name].guidance_scale
    assert adherence(pipe, 4, 2, guidance_scale=guidance, batch_size=4).object_fraction < 0.1
