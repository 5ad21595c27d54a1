"""`FuseVae` on a GPU: the decoder of full size draws what float32 draws, no further from it than stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2

import ernie_accel
from ernie_accel.core.transform import ROUNDING_REL
from ernie_accel.models.vae_decoder import FusedDecoder


@pytest.fixture(scope="module")
def decoder() -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        decoder = AutoencoderKLFlux2().decoder
    return decoder.eval().requires_grad_(False)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 24, 40)], ids=str)
@torch.no_grad()
def test_a_decoder_of_full_size_is_no_further_from_float32_than_stock(
    decoder: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batch, *size = shape
    latents = torch.randn(batch, decoder.conv_in.in_channels, *size, device="cuda").bfloat16()
    stock = decoder.bfloat16()(latents)
    expected = decoder.float()(latents.float())
    decoder.to(torch.bfloat16, memory_format=torch.channels_last)
    fused = FusedDecoder(decoder)(latents)
    decoder.to(memory_format=torch.contiguous_format)
    assert error(fused, expected) <= 1.05 * error(stock, expected)


@torch.no_grad()
def test_the_embedded_models_decoder_runs_on_the_kernels_and_goes_back() -> None:
    pipe = ernie_accel.demo.load(dtype=torch.bfloat16, prompt_enhancer=False).to("cuda")
    latents = torch.randn(2, pipe.vae.config.latent_channels, 16, 16, device="cuda", dtype=torch.bfloat16)
    expected = pipe.vae.decode(latents).sample
    ernie_accel.optimize(pipe, ernie_accel.FuseVae())
    assert isinstance(pipe.vae.decoder.forward, FusedDecoder)
    got = [pipe.vae.decode(latents).sample for _ in range(2)]
    assert torch.equal(*got)
    assert error(got[0], expected.float()) < ROUNDING_REL["bfloat16"]
    ernie_accel.restore(pipe)
    assert torch.equal(pipe.vae.decode(latents).sample, expected)
