"""Formats whose products no CPU runs, emulated by their own arithmetic: what the floors of "nvfp4" and "mxfp8" rest on.

The rounding is torchao's, value for value; the products are float32's. "fp8" is here as the check of the method: its
real products were measured on an H200 too (docs/quantization.md). See test_quantize_quality.py for the floors.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from ernie_accel.core.components import module_bytes
from ernie_accel.quantization.backend import SCHEMES, LinearSpec
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import linear_sites, sqnr_db
from ernie_accel.quantization.torchao import LEAST_MAGNITUDE
from tests.test_quantize_backends import linear

E4M3 = torch.float8_e4m3fn
E4M3_MAX, E2M1_MAX = 448.0, 6.0
E4M3_LEAST = 2.0**-6  # the least that torchao takes for a scale: e4m3's smallest normal number
E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8_rows(x):
    """Round x [M, K] to e4m3 with a scale per row, which torchao computes in the dtype of what it scales, bfloat16."""
    scale = (x.abs().amax(1, keepdim=True).clamp(min=LEAST_MAGNITUDE) / E4M3_MAX).bfloat16().float()
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float() * scale


def mxfp8(x):
    """Round x [M, K] to e4m3 with a scale per 32 values, the power of two (e8m0) next above (OCP MX 1.0, "rceil")."""
    blocks = x.reshape(len(x), -1, 32)
    least = blocks.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.exp2(torch.ceil(torch.log2(least.clamp(min=2.0**-127))))
    return ((blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float() * scale).reshape(x.shape)


def nvfp4(x):
    """Round x [M, K] to e2m1 with an e4m3 scale per 16 values and a float32 scale for all."""
    whole = x.abs().amax() / (E4M3_MAX * E2M1_MAX)  # torchao: in every forward anew, for the activations too
    blocks = x.reshape(len(x), -1, 16)
    scale = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / whole
    scale = scale.clamp(E4M3_LEAST, E4M3_MAX).to(E4M3).float()
    return (to_e2m1(blocks * ((1 / whole) / scale)) * (whole * scale)).reshape(x.shape)


def to_e2m1(x):
    """Round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, halves to the even mantissa."""
    middles = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
    # Between values i and i + 1 a tie goes to the one with an even index: its mantissa bit is 0.
    up = torch.bucketize(x.abs(), middles, right=True)
    down = torch.bucketize(x.abs(), middles, right=False)
    return E2M1_VALUES[torch.where(up % 2 == 0, up, down)].copysign(x)


EMULATED = {"fp8": fp8_rows, "mxfp8": mxfp8, "nvfp4": nvfp4}
every_emulated = pytest.mark.parametrize("scheme", EMULATED)


class EmulatedLinear(torch.nn.Module):
    """Multiply rounded activations by a rounded weight, in the activations' dtype."""

    def __init__(self, layer, rounded):
        super().__init__()
        self.rounded, self.bias = rounded, layer.bias
        self.weight = torch.nn.Parameter(rounded(layer.weight.float()).to(layer.weight.dtype), requires_grad=False)

    def forward(self, x):
        rows = self.rounded(x.reshape(-1, x.shape[-1]).float()).to(x.dtype).view_as(x)
        return torch.nn.functional.linear(rows, self.weight, self.bias)


@contextlib.contextmanager
def emulated(pipe, scheme):
    """Let the layers that `Quantize` would replace compute in `scheme`."""
    sites = [site for site in linear_sites(pipe, ("transformer",), None) if site.left_out is None]
    assert sites
    for site in sites:
        site.parent._modules[site.child] = EmulatedLinear(site.linear, EMULATED[scheme])
    try:
        yield pipe
    finally:
        for site in sites:
            site.parent._modules[site.child] = site.layer


def torchao_quantized(scheme, layer, monkeypatch):
    """Return the layer as torchao stores it on the card it needs, made here: only its products need the card."""
    from torchao.float8 import inference
    from torchao.prototype.mx_formats import inference_workflow

    monkeypatch.setattr(inference, "is_MI300", lambda: True)
    monkeypatch.setattr(inference_workflow, "is_sm_at_least_100", lambda: True)
    return BACKENDS["torchao"].quantize(scheme, layer)


@every_emulated
def test_the_rounding_is_that_of_torchao(scheme, monkeypatch):
    layer = linear()
    stored = BACKENDS["torchao"].dequantize(torchao_quantized(scheme, layer, monkeypatch))
    assert torch.equal(EMULATED[scheme](layer.weight.float()).to(torch.bfloat16), stored)


@every_emulated
def test_the_weight_stays_above_the_declared_floor(scheme):
    layer = linear()
    assert sqnr_db(layer.weight, EMULATED[scheme](layer.weight.float())) > SCHEMES[scheme].weight_db + 1


@every_emulated
@pytest.mark.parametrize(("rows", "columns"), [(256, 512), (128, 128), (48, 96)])
def test_the_layer_takes_as_many_bytes_as_it_said(scheme, rows, columns, monkeypatch):
    layer = linear(rows=rows, columns=columns, bias=False)
    quantized = torchao_quantized(scheme, layer, monkeypatch)
    spec = LinearSpec(rows, columns, torch.bfloat16)
    assert module_bytes(quantized) == BACKENDS["torchao"].stored_bytes(scheme, spec)


@every_emulated
def test_its_tensors_are_all_of_it(scheme, monkeypatch):
    """Save and load copy them into a blank layer."""
    quantized, blank = (torchao_quantized(scheme, linear(std=std), monkeypatch) for std in (0.02, 0.5))
    for name, tensor in BACKENDS["torchao"].tensors(blank).items():
        tensor.copy_(BACKENDS["torchao"].tensors(quantized)[name])
    assert torch.equal(*(BACKENDS["torchao"].dequantize(layer) for layer in (quantized, blank)))


@every_emulated
def test_a_row_of_zeros_stays_one(scheme, monkeypatch):
    layer = linear()
    layer.weight.data[3] = 0
    found = BACKENDS["torchao"].dequantize(torchao_quantized(scheme, layer, monkeypatch))
    assert found.isfinite().all() and not found[3].any()


def test_activations_of_zeros_stay_zeros_in_fp8(monkeypatch):
    """The scale of padding is 0 unless bounded from below, and 0 / 0 is NaN."""
    from torchao.quantization.quantize_.common.quantize_tensor_kwargs import _choose_quant_func_and_quantize_tensor

    kwargs = torchao_quantized("fp8", linear(), monkeypatch).weight.act_quant_kwargs
    x = torch.randn(4, 512).to(torch.bfloat16)
    x[1] = 0
    found = _choose_quant_func_and_quantize_tensor(x, kwargs).dequantize()
    assert found.isfinite().all() and not found[1].any()
    assert sqnr_db(x, found) > 28


def test_nvfp4_asks_for_no_kernel_that_no_extra_brings(monkeypatch):
    """torchao's default is a Triton kernel of the MSLK package; without it the first forward fails."""
    weight = torchao_quantized("nvfp4", linear(), monkeypatch).weight
    assert not weight.use_triton_kernel and not weight.act_quant_kwargs.use_triton_kernel
