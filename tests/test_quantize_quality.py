"""What quantizing costs a trained model: latents above the declared floor, and prompts held as before.

All pairs of scheme and backend are judged on more pictures in tests/gpu/test_quantize_gpu.py.
"""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import Quantize
from ernie_accel.demo.judge import adherence
from ernie_accel.transforms.quantize.backend import SCHEMES
from ernie_accel.transforms.quantize.layers import sqnr_db
from tests.test_quantize_backends import every_pair

PICTURES = 16


@pytest.fixture(scope="module")
def demo():
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, latents(pipe)


@pytest.fixture(scope="module")
def stock_fraction(demo):
    return adherence(demo[0], n=PICTURES, steps=4).object_fraction


def latents(pipe):
    generator = torch.Generator().manual_seed(0)
    size = {"height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 1.0, "use_pe": False}
    prompt = "a large red circle in the center on a grey background"
    return pipe(prompt, generator=generator, output_type="latent", **size).images.float()


def quantized(pipe, measure, *args, **kwargs):
    """Return what `measure` finds on the quantized pipe; the pipe is restored."""
    ernie_accel.optimize(pipe, Quantize(*args, **kwargs))
    try:
        return measure(pipe)
    finally:
        ernie_accel.restore(pipe)


@every_pair
def test_latents_stay_above_the_declared_floor(backend, scheme, demo):
    pipe, stock = demo
    found = quantized(pipe, latents, scheme, backend=backend.name)
    assert sqnr_db(stock, found) > SCHEMES[scheme].floor_db + 1


def test_blocks_only_beats_all_linears(demo):
    """By little here: trained, the rest is less fragile than in a random model (see test_quantize_traps.py)."""
    pipe, stock = demo
    blocks = sqnr_db(stock, quantized(pipe, latents, "fp4"))
    everything = sqnr_db(stock, quantized(pipe, latents, "fp4", exclude=()))
    assert blocks > everything + 0.5


@pytest.mark.parametrize(("scheme", "keeps"), [("int8-weight-only", 0.99), ("nf4", 0.95)])
def test_the_judge_finds_as_much_as_before(scheme, keeps, demo, stock_fraction):
    found = quantized(demo[0], lambda pipe: adherence(pipe, n=PICTURES, steps=4), scheme)
    assert stock_fraction > 0.8
    assert found.object_fraction >= keeps * stock_fraction
