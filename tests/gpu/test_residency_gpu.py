"""Weights fetched over the bus on a CUDA device: the bits of a pipe that holds them all there."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import FuseKernels, Quantize, Residency, RewriteBlocks
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.transforms.weights.residency import least_weights
from tests.pipelines import picture, tiny_ernie

FP8 = FuseKernels("fp8", keep_originals=False)
ENCODER = Quantize("fp8-weight-only", components=("text_encoder",), keep_originals=False)


def pipe_on(device):
    return tiny_ernie(layers=6).to(device, torch.bfloat16)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_pipe_on_the_host_draws_the_same_bits_with_any_share_of_its_weights_on_the_device(share):
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    resident = pipe_on("cuda")
    ernie_accel.optimize(resident, RewriteBlocks(), FP8, ENCODER)
    expected = picture(resident, latents=latents.clone())

    pipe = pipe_on("cpu")
    least, most = least_weights(resident, PlannedPipe.of(resident)), pipe_bytes(resident)
    held = Residency(int(least + share * (most - least)), device="cuda")
    ernie_accel.optimize(pipe, RewriteBlocks(), FP8, ENCODER, held)
    for _ in range(3):
        assert torch.equal(picture(pipe, latents=latents.clone()), expected)


def test_layers_quantized_on_their_way_from_the_host_are_as_good_as_resident_ones():
    ratios = []
    for device in ("cpu", "cuda"):
        pipe = pipe_on(device)
        ernie_accel.optimize(pipe, ENCODER)
        (entry,) = ernie_accel.report(pipe).entries
        ratios.append({each.name: each.sqnr_db for each in entry.applied.details})
    assert ratios[0] == ratios[1]
    assert len(ratios[0]) > 0
