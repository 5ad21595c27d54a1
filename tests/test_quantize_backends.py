"""What every backend promises of every scheme it runs on a CPU, checked on all of them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch._dynamo.testing

from ernie_accel import Context
from ernie_accel.core.components import module_bytes
from ernie_accel.quantization.backend import SCHEMES, LinearSpec
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import sqnr_db

HERE = Context.detect(device="cpu")
RUNS_HERE = [
    (backend, scheme)
    for backend in BACKENDS.values()
    for scheme in backend.schemes
    if not [r for r in backend.unsupported(scheme, HERE) if "not installed" not in r]
]
ids = [f"{backend.name}-{scheme}" for backend, scheme in RUNS_HERE]
every_pair = pytest.mark.parametrize(("backend", "scheme"), RUNS_HERE, ids=ids)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def linear(dtype=torch.bfloat16, rows=256, columns=512, bias=True, std=0.02):
    made = torch.nn.Linear(columns, rows, bias=bias)
    generator = torch.Generator().manual_seed(0)
    made.weight.data = torch.randn(rows, columns, generator=generator) * std
    return made.to(dtype).eval().requires_grad_(False)


def spec_of(layer):
    bias = 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()
    return LinearSpec(*layer.weight.shape, layer.weight.dtype, bias)


def test_every_scheme_has_a_backend_and_every_pair_a_verdict_on_the_cpu():
    assert {scheme for backend in BACKENDS.values() for scheme in backend.schemes} == set(SCHEMES)
    here = {scheme for _, scheme in RUNS_HERE}
    assert set(SCHEMES) - here == {"fp8", "nvfp4", "mxfp8"}


@every_dtype
@every_pair
def test_the_weight_stays_above_the_declared_floor(backend, scheme, dtype):
    layer = linear(dtype)
    found = sqnr_db(layer.weight, backend.dequantize(backend.quantize(scheme, layer)))
    assert found > SCHEMES[scheme].weight_db + 1  # a floor is a promise: keep a margin


@every_dtype
@every_pair
def test_it_multiplies_by_the_weight_it_says_it_holds(backend, scheme, dtype):
    layer = linear(dtype)
    quantized = backend.quantize(scheme, layer)
    x = torch.randn(3, 7, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.nn.functional.linear(x.float(), backend.dequantize(quantized).float(), layer.bias.float())
    y = quantized(x)
    assert y.shape == (3, 7, 256)
    assert y.dtype == dtype
    assert sqnr_db(expected, y) > (35 if scheme == "int8" else 40)  # int8 rounds the activations, too


@every_dtype
@every_pair
def test_it_takes_as_many_bytes_as_it_said(backend, scheme, dtype):
    for layer in (linear(dtype), linear(dtype, bias=False), linear(dtype, rows=128, columns=128)):
        assert module_bytes(backend.quantize(scheme, layer)) == backend.stored_bytes(scheme, spec_of(layer))


@every_dtype
@every_pair
def test_a_row_of_zeros_stays_one(backend, scheme, dtype):
    """Pruned rows and padding: a scale taken from the largest magnitude is 0 there, and 0 / 0 is NaN."""
    layer = linear(dtype, bias=False)
    layer.weight.data[3] = 0
    quantized = backend.quantize(scheme, layer)
    assert not backend.dequantize(quantized)[3].any()
    x = torch.randn(4, 512).to(dtype)
    x[1] = 0
    y = quantized(x)
    assert y.isfinite().all()
    assert not y[1].any() and not y[:, 3].any()


@every_pair
def test_it_leaves_the_original_alone(backend, scheme):
    layer = linear()
    weight, bias, where = layer.weight.clone(), layer.bias.clone(), layer.weight.data_ptr()
    quantized = backend.quantize(scheme, layer)
    quantized(torch.randn(2, 512).to(torch.bfloat16))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)
    assert layer.weight.data_ptr() == where
    assert quantized.bias is not layer.bias


@every_pair
def test_its_tensors_are_all_of_it(backend, scheme):
    layer, other = linear(), linear(std=0.5)
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    quantized, blank = backend.quantize(scheme, layer), backend.blank(scheme, other)
    for name, tensor in backend.tensors(blank).items():
        tensor.copy_(backend.tensors(quantized)[name])
    blank.bias.data.copy_(quantized.bias.data)
    assert torch.equal(quantized(x), blank(x))
    assert torch.equal(backend.dequantize(quantized), backend.dequantize(blank))


@every_pair
def test_its_bits_do_not_change_by_being_used_or_moved(backend, scheme):
    quantized = backend.quantize(scheme, linear())
    before = {name: tensor.clone() for name, tensor in backend.tensors(quantized).items()}
    quantized(torch.randn(2, 512).to(torch.bfloat16))
    quantized.to("cpu")
    after = backend.tensors(quantized)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


@every_pair
def test_it_knows_its_own_layers_and_no_others(backend, scheme):
    layer = linear()
    assert [b.name for b in BACKENDS.values() if b.holds(layer)] == []
    assert [b.name for b in BACKENDS.values() if b.holds(backend.quantize(scheme, layer))] == [backend.name]


@every_pair
def test_it_is_freed_as_soon_as_nobody_holds_it(backend, scheme):
    """A cycle would keep gigabytes on the device until Python collects garbage."""
    backend.quantize(scheme, linear())  # imports, whose handled errors may hold on to this very frame
    gc.collect()
    quantized = backend.quantize(scheme, linear())
    gone = weakref.ref(quantized)
    gc.disable()
    try:
        del quantized
        # A diffusers hook refers to its module, and the module to the hook: a cycle that is not ours.
        assert (gone() is None) == (backend.name != "layerwise")
    finally:
        gc.enable()


@every_pair
def test_odd_shapes_are_refused_with_their_reason_or_work(backend, scheme):
    for rows, columns in ((24, 40), (30, 64), (64, 72), (64, 16), (7, 96), (1, 33)):
        layer = linear(rows=rows, columns=columns)
        problem = backend.layer_problem(scheme, spec_of(layer))
        if problem is None:
            assert backend.quantize(scheme, layer)(torch.randn(2, columns).to(torch.bfloat16)).shape == (2, rows)
        else:
            assert "multiple of" in problem


@every_dtype
@every_pair
def test_it_is_one_graph_unless_it_says_why_not(backend, scheme, dtype):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    quantized = backend.quantize(scheme, linear(dtype))
    run = torch.compile(quantized, fullgraph=True, dynamic=True, backend=graphs)
    if backend.breaks_graph(scheme, dtype) is None:
        with torch.no_grad():
            for length in (2, 5, 9):
                run(torch.randn(1, length, 512).to(dtype))
        assert graphs.frame_count == 1
    else:
        with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.InternalTorchDynamoError)):
            run(torch.randn(1, 2, 512).to(dtype))
    torch._dynamo.reset()


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


#: Torch 2.13 cannot load a float8 tensor out of a pickle.
COPIES = [
    (copied, *pair)
    for pair in RUNS_HERE
    for copied in (copy.deepcopy, through_pickle)
    if pair[0].name != "layerwise" and not (copied is through_pickle and pair[1].startswith("fp8"))
]


@pytest.mark.parametrize(("copied", "backend", "scheme"), COPIES)
def test_a_copy_computes_the_same_and_is_independent(copied, backend, scheme):
    quantized = backend.quantize(scheme, linear())
    twin, x = copied(quantized), torch.randn(2, 512).bfloat16()
    assert type(twin) is type(quantized)
    assert torch.equal(twin(x), quantized(x))
    for tensor in backend.tensors(twin).values():
        tensor.view(torch.uint8).zero_()
    assert any(tensor.view(torch.uint8).any() for tensor in backend.tensors(quantized).values())
