"""Offloading on a CUDA device: the same bits from less memory, and restore moves everything back."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import MoveTo, Offload
from tests.pipelines import picture, tiny_ernie


def on_cuda(pipe):
    return {
        name: {parameter.device.type for parameter in module.parameters()}
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
    }


@pytest.mark.parametrize("mode", ["model", "sequential", "group", "stages"])
def test_the_same_bits_and_all_back_after_restore(mode):
    pipe = tiny_ernie(layers=4).to("cuda")
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).cuda()
    before, places = picture(pipe, latents=latents.clone()), on_cuda(pipe)
    weights = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    ernie_accel.optimize(pipe, Offload(mode))
    (entry,) = ernie_accel.report(pipe).entries
    assert entry.status == "applied"
    for _ in range(2):
        assert torch.equal(picture(pipe, latents=latents.clone()), before)
    resting = on_cuda(pipe)
    assert "cuda" not in resting["text_encoder"]
    assert ("cuda" in resting["transformer"]) == (mode == "stages")
    ernie_accel.restore(pipe)
    assert on_cuda(pipe) == places
    assert all(torch.equal(p, weights[name]) for name, p in pipe.transformer.named_parameters())
    assert torch.equal(picture(pipe, latents=latents.clone()), before)


@pytest.mark.parametrize("mode", ["model", "sequential", "group", "stages"])
def test_a_pipe_on_the_host_is_offloaded_from_the_accelerator_that_is_here(mode):
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).cuda()
    before = picture(tiny_ernie(layers=4).to("cuda"), latents=latents.clone())
    pipe = tiny_ernie(layers=4)
    ernie_accel.optimize(pipe, Offload(mode))
    assert torch.equal(picture(pipe, latents=latents.clone()), before)
    assert "cuda" not in on_cuda(pipe)["text_encoder"]
    ernie_accel.restore(pipe)
    assert {"cpu"} == set.union(*on_cuda(pipe).values())


@pytest.mark.parametrize("mode", ["model", "stages"])
def test_a_preset_is_applied_beside_offloading_a_pipe_on_the_host(mode):
    pipe = tiny_ernie(layers=4, dtype=torch.bfloat16)
    ernie_accel.optimize(pipe, Offload(mode), preset="turbo-bf16", on_unsupported="skip")
    picture(pipe)
    assert "cuda" not in on_cuda(pipe)["text_encoder"]


def test_a_pipe_is_moved_and_moved_back():
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, MoveTo("cuda"))
    assert {"cuda"} == set.union(*on_cuda(pipe).values())
    ernie_accel.restore(pipe)
    assert {"cpu"} == set.union(*on_cuda(pipe).values())
