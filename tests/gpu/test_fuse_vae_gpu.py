"""`FuseVae` on a GPU: decoder and encoder of full size are no further from float32 than stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2

import ernie_accel
from ernie_accel.core.transform import ROUNDING_REL
from ernie_accel.models.autoencoder import FusedDecoder, FusedEncoder


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = AutoencoderKLFlux2()
    return vae.eval().requires_grad_(False)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("half", "fused_class", "shape"),
    [
        ("decoder", FusedDecoder, (1, 64, 64)),
        ("decoder", FusedDecoder, (3, 24, 40)),
        ("encoder", FusedEncoder, (1, 512, 512)),
        ("encoder", FusedEncoder, (3, 192, 328)),
    ],
)
@torch.no_grad()
def test_at_full_size_it_is_no_further_from_float32_than_stock(
    vae: Any, half: str, fused_class: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    module, (batch, *size) = getattr(vae, half), shape
    inputs = torch.randn(batch, module.conv_in.in_channels, *size, device="cuda").bfloat16()
    stock = module.bfloat16()(inputs)
    expected = module.float()(inputs.float())
    module.to(torch.bfloat16, memory_format=torch.channels_last)
    fused = fused_class(module)(inputs)
    module.to(memory_format=torch.contiguous_format)
    assert error(fused, expected) <= 1.05 * error(stock, expected)


@torch.no_grad()
def test_the_embedded_models_vae_runs_on_the_kernels_and_goes_back() -> None:
    pipe = ernie_accel.demo.load(dtype=torch.bfloat16, prompt_enhancer=False).to("cuda")
    latents = torch.randn(2, pipe.vae.config.latent_channels, 16, 16, device="cuda", dtype=torch.bfloat16)
    expected = pipe.vae.decode(latents).sample
    moments = pipe.vae.encode(expected).latent_dist.mean
    ernie_accel.optimize(pipe, ernie_accel.FuseVae())
    assert isinstance(pipe.vae.decoder.forward, FusedDecoder)
    got = [pipe.vae.decode(latents).sample for _ in range(2)]
    assert torch.equal(*got)
    assert error(got[0], expected.float()) < ROUNDING_REL["bfloat16"]
    assert error(pipe.vae.encode(expected).latent_dist.mean, moments.float()) < ROUNDING_REL["bfloat16"]
    ernie_accel.restore(pipe)
    assert torch.equal(pipe.vae.decode(latents).sample, expected)
