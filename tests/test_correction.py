"""The low-rank correction of quantized layers: on every backend, and through the life of a pipe."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import ernie_accel
from ernie_accel import FuseKernels, Quantize, RewriteBlocks
from ernie_accel.core.components import module_bytes, pipe_bytes
from ernie_accel.demo.judge import unseen_prompts
from ernie_accel.quantization.backend import LinearSpec
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.correction import (
    correct,
    correction_bytes,
    correction_of,
    dequantized,
    is_corrected,
    largest_rank,
    low_rank,
    quantize_corrected,
)
from ernie_accel.quantization.layers import quantized_as, sqnr_db
from ernie_accel.testing import differences, snapshot
from tests.pipelines import picture, tiny_ernie
from tests.test_quantize_backends import RUNS_HERE, linear, spec_of

CORRECTED = [(backend, scheme) for backend, scheme in RUNS_HERE if backend.takes_correction]
every_corrected = pytest.mark.parametrize(
    ("backend", "scheme"), CORRECTED, ids=[f"{backend.name}-{scheme}" for backend, scheme in CORRECTED]
)
NF4 = BACKENDS["bitsandbytes"]


def trained(dtype=torch.bfloat16):
    """Return a layer whose singular values fall off, as those of trained weights do."""
    layer, generator = linear(dtype), torch.Generator().manual_seed(5)
    up, down = (torch.randn(n, 8, generator=generator) * 0.02 for n in (256, 512))
    layer.weight.data += (up @ down.T * 40).to(dtype)
    return layer


# ---- one layer ------------------------------------------------------------------------------------------------------


@every_corrected
def test_it_brings_the_weight_and_the_product_nearer_in_the_bytes_that_were_planned(backend, scheme):
    layer = trained()
    plain, corrected = backend.quantize(scheme, layer), quantize_corrected(backend, scheme, layer, 16)
    before = sqnr_db(layer.weight, backend.dequantize(plain))
    assert sqnr_db(layer.weight, dequantized(backend, corrected)) > before + 3
    x = torch.randn(3, 7, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    assert sqnr_db(exact, corrected(x)) > sqnr_db(exact, plain(x)) + 2
    assert corrected(x).dtype == torch.bfloat16
    spec = spec_of(layer)
    assert module_bytes(corrected) == backend.stored_bytes(scheme, spec) + correction_bytes(spec, 16)
    assert {name: tuple(tensor.shape) for name, tensor in correction_of(corrected).items()} == {
        "correction.down": (16, 512),
        "correction.up": (256, 16),
    }


@every_corrected
def test_everybody_knows_the_layer_still_and_nobody_mistakes_it_for_a_plain_one(backend, scheme):
    layer = trained()
    plain, corrected = backend.quantize(scheme, layer), quantize_corrected(backend, scheme, layer, 4)
    assert [b.name for b in BACKENDS.values() if b.holds(corrected)] == [backend.name]
    assert isinstance(corrected, type(plain)) and type(corrected) is not type(plain)
    assert is_corrected(corrected) and not is_corrected(plain)
    assert correction_of(plain) == {}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize(("backend", "scheme"), [("bitsandbytes", "nf4"), ("torchao", "int8"), ("quanto", "int4")])
def test_a_copy_computes_the_same_and_shares_nothing(backend, scheme, how):
    if BACKENDS[backend].unsupported(scheme, ernie_accel.Context.detect(device="cpu")):
        pytest.skip(f"{backend} cannot run {scheme} here")
    corrected = quantize_corrected(BACKENDS[backend], scheme, trained(), 4)
    x = torch.randn(2, 512).bfloat16()
    expected, twin = corrected(x), how(corrected)
    assert type(twin) is type(corrected)
    corrected.correction.up.data.zero_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(corrected(x), expected)


@pytest.mark.parametrize(("backend", "scheme"), [("bitsandbytes", "nf4"), ("torchao", "int8-weight-only")])
def test_it_compiles_into_one_graph(backend, scheme):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    corrected = quantize_corrected(BACKENDS[backend], scheme, trained(), 4)
    run, x = torch.compile(corrected, fullgraph=True, backend=graphs), torch.randn(2, 512).bfloat16()
    with torch.no_grad():
        assert torch.equal(run(x), corrected(x))
    assert graphs.frame_count == 1
    torch._dynamo.reset()


def test_a_layer_whose_forward_was_replaced_is_refused():
    layer = BACKENDS["layerwise"].quantize("fp8-weight-only", linear())
    with pytest.raises(TypeError, match="whose forward was replaced"):
        correct(layer, torch.zeros(1, 512), torch.zeros(256, 1))


# ---- the product of low rank ----------------------------------------------------------------------------------------


def test_it_is_nearly_the_best_of_its_rank_the_same_each_time_and_draws_from_no_shared_generator():
    matrix = trained(torch.float32).weight.data
    state = torch.get_rng_state()
    down, up = low_rank(matrix, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, (down, up), low_rank(matrix.clone(), 16)))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :16] * values[:16]) @ right[:16]
    assert (matrix - up @ down).norm() < 1.01 * (matrix - best).norm()


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (8, 8)])
def test_at_full_rank_it_is_the_matrix_and_zeros_stay_zeros(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    down, up = low_rank(matrix, 8)
    torch.testing.assert_close(up @ down, matrix, rtol=0, atol=1e-5)
    down, up = low_rank(torch.zeros(shape), 3)
    assert not (up @ down).any()


def test_a_weight_that_is_not_finite_is_refused():
    layer = linear()
    layer.weight.data[3, 5] = torch.inf
    with pytest.raises(ValueError, match="values that are not finite"):
        quantize_corrected(NF4, "nf4", layer, 4)


def test_the_largest_rank_is_the_last_that_saves_bytes():
    spec = LinearSpec(256, 512, torch.bfloat16, 512)
    stored = NF4.stored_bytes("nf4", spec)
    rank, unquantized = largest_rank(spec, stored), 2 * spec.numel + 512
    assert stored + correction_bytes(spec, rank) < unquantized <= stored + correction_bytes(spec, rank + 1)
    assert largest_rank(spec, unquantized) == 0


# ---- a pipe ---------------------------------------------------------------------------------------------------------


combinations = pytest.mark.parametrize(
    ("scheme", "backend", "rewritten"),
    [("nf4", "bitsandbytes", ()), ("int8-weight-only", "torchao", (RewriteBlocks(),))],
    ids=["nf4", "int8-weight-only, rewritten"],
)


@combinations
def test_plan_receipt_and_restore_agree(scheme, backend, rewritten):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    original, before = picture(pipe, steps=1), snapshot(pipe)
    request = (*rewritten, Quantize(scheme, backend=backend, correction_rank=8))
    step = ernie_accel.plan(pipe, *request).steps[-1]
    ernie_accel.optimize(pipe, *request)
    applied = ernie_accel.report(pipe).entries[-1].applied
    assert applied.changed == step.preview.changes == tuple(detail.name for detail in applied.details)
    assert pipe_bytes(pipe) == step.planned.nbytes
    assert applied.bytes_before - applied.bytes_after == sum(d.bytes_before - d.bytes_after for d in applied.details)
    assert all(detail.correction_rank == 8 for detail in applied.details)
    assert all(detail.sqnr_db > detail.uncorrected_db + 0.2 for detail in applied.details)
    assert f"{scheme} by {backend} with a correction of rank 8" in step.preview.note
    assert "dB without the correction" in applied.note
    ernie_accel.restore(pipe)
    assert differences(before, snapshot(pipe)) == []
    assert torch.equal(picture(pipe, steps=1), original)


@combinations
def test_a_saved_pipe_is_loaded_bit_for_bit_and_is_not_taken_for_one_of_another_rank(
    scheme, backend, rewritten, tmp_path
):
    request = (*rewritten, Quantize(scheme, backend=backend, correction_rank=8))
    pipe = ernie_accel.optimize(tiny_ernie(dtype=torch.bfloat16), *request)
    drawn = picture(pipe, steps=1)
    ernie_accel.save(pipe, tmp_path / "saved")
    again = ernie_accel.load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again, steps=1), drawn)
    assert ernie_accel.report(again).entries[-1].step.transform == request[-1]
    stored = {quantized_as(layer) for layer in again.transformer.modules()} - {None}
    assert stored == {f"{scheme} by {backend} with a correction of rank 8"}
    (step,) = ernie_accel.plan(again, replace(request[-1], correction_rank=4)).steps
    assert "is quantized already" in step.reasons[0] and "correction of rank 8" in step.reasons[0]


def test_a_new_rank_takes_the_place_of_the_old_one(ernie):
    ernie_accel.optimize(ernie, Quantize("nf4", correction_rank=4))
    ernie_accel.optimize(ernie, Quantize("nf4", correction_rank=8))
    (entry,) = ernie_accel.report(ernie).entries
    assert {detail.correction_rank for detail in entry.applied.details} == {8}
    ernie_accel.optimize(ernie, Quantize("nf4"))
    (entry,) = ernie_accel.report(ernie).entries
    assert {(d.correction_rank, d.uncorrected_db) for d in entry.applied.details} == {(0, None)}


def test_it_follows_exclusions_components_and_dropped_originals():
    pipe = tiny_ernie(dtype=torch.bfloat16)
    kept = (r"layers\.0\.",)
    both = ("transformer", "text_encoder")
    request = Quantize("nf4", components=both, exclude=kept, keep_originals=False, correction_rank=4)
    ernie_accel.optimize(pipe, request)
    corrected = {name for name, layer in pipe.transformer.named_modules() if is_corrected(layer)}
    assert corrected and not any(name.startswith("layers.0.") for name in corrected)
    assert any(map(is_corrected, pipe.text_encoder.modules()))
    assert picture(pipe, steps=1).isfinite().all()
    with pytest.raises(ernie_accel.RestoreError, match="keep_originals=False"):
        ernie_accel.restore(pipe)


@pytest.mark.parametrize(
    ("scheme", "backend"), [("int8", "torchao"), ("int8-weight-only", "quanto"), ("gguf-q4_0", "gguf")]
)
def test_a_lora_comes_on_top_and_goes_again(scheme, backend):
    from peft import LoraConfig

    pipe = tiny_ernie(dtype=torch.bfloat16)
    original = picture(tiny_ernie(dtype=torch.bfloat16), steps=1)
    ernie_accel.optimize(pipe, Quantize(scheme, backend=backend, correction_rank=8))
    corrected = picture(pipe, steps=1)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "linear_fc2"], init_lora_weights=False))
    assert not torch.equal(picture(pipe, steps=1), corrected)
    pipe.transformer.disable_adapters()
    assert torch.equal(picture(pipe, steps=1), corrected)
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe, steps=1), corrected)
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe, steps=1), original)


def test_a_correction_that_was_changed_since_is_not_lost_by_restore(ernie):
    ernie_accel.optimize(ernie, Quantize("nf4", correction_rank=4))
    layer = next(layer for layer in ernie.transformer.modules() if is_corrected(layer))
    layer.correction.up.data += 1
    with pytest.raises(ernie_accel.RestoreError, match="was changed since"):
        ernie_accel.restore(ernie)


def test_it_is_not_cast_layer_by_layer(ernie):
    ernie_accel.optimize(ernie, Quantize("int8-weight-only", correction_rank=4))
    with pytest.raises(ernie_accel.ErnieAccelError, match="layers have a correction, which cannot be cast"):
        ernie.transformer.enable_layerwise_casting()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"a rank of at least 1, got {rank}: leave it out for no correction"):
        Quantize("nf4", correction_rank=rank)


def test_a_rank_that_saves_nothing_is_refused_with_the_largest_that_does():
    pipe = tiny_ernie(dtype=torch.bfloat16)
    (reason,) = ernie_accel.plan(pipe, Quantize("nf4", correction_rank=300)).steps[0].reasons
    assert "correction_rank=300: transformer.layers." in reason and "(128 x 128) in nf4 by bitsandbytes" in reason
    largest = int(reason.split("choose at most ")[1].split(",")[0])
    assert ernie_accel.plan(pipe, Quantize("nf4", correction_rank=largest)).ok
    assert not ernie_accel.plan(pipe, Quantize("nf4", correction_rank=largest + 1)).ok


def test_a_backend_that_cannot_carry_one_says_who_can(ernie):
    (step,) = ernie_accel.plan(ernie, Quantize("fp8-weight-only", backend="layerwise", correction_rank=4)).steps
    assert "a layer of layerwise cannot carry one; leave it out, or use torchao" in step.reasons[0]


def test_fused_kernels_take_the_same_slot_and_no_rank(ernie):
    with pytest.raises(ernie_accel.ConflictError):
        ernie_accel.plan(ernie, Quantize("nf4", correction_rank=4), FuseKernels("fp8"))
    with pytest.raises(TypeError):
        FuseKernels("fp8", correction_rank=4)


# ---- what it is worth -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_pipe():
    """The embedded model, inputs of its transformer at a few steps of two pictures, and its outputs for them."""
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    captions = [text for text, scene in unseen_prompts(16) if scene.height == scene.width == 128][:2]
    inputs = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
    size = {"height": 128, "width": 128, "num_inference_steps": 3, "guidance_scale": 1.0}
    pipe(captions, generator=noise, use_pe=False, output_type="latent", **size)
    handle.remove()
    return pipe, inputs, outputs(pipe, inputs)


@torch.no_grad()
def outputs(pipe, inputs):
    return torch.cat([pipe.transformer(*args, **kwargs)[0] for args, kwargs in inputs])


@pytest.mark.parametrize(
    ("scheme", "backend", "gain_db"),
    [
        ("nf4", "bitsandbytes", 3),
        ("int8-weight-only", "torchao", 1),
        pytest.param("gguf-q4_0", "gguf", 3, marks=pytest.mark.slow),
        pytest.param("int8", "torchao", 1, marks=pytest.mark.slow),
    ],
)
def test_rank_32_gains_what_is_promised_on_the_trained_miniature(scheme, backend, gain_db, trained_pipe):
    """Of the transformer's output, not of single weights; benchmarks/correction.py measures all."""
    pipe, inputs, exact = trained_pipe
    found = {}
    for rank in (None, 32):
        ernie_accel.optimize(pipe, Quantize(scheme, backend=backend, correction_rank=rank))
        found[rank] = sqnr_db(exact, outputs(pipe, inputs))
        ernie_accel.restore(pipe)
    assert found[32] > found[None] + gain_db + 0.5


def test_the_benchmark_times_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    benchmark = importlib.import_module("correction")
    given = ["--model", "--tiny", "--schemes", "gguf-q4_0", "--out", str(tmp_path / "correction")]
    monkeypatch.setattr(sys, "argv", ["correction.py", *given])
    benchmark.main()
    result = json.loads((tmp_path / "correction.json").read_text(encoding="utf-8"))
    (model,) = result["models"]
    assert "gguf-q4_0 by gguf" in model["model"] and {"quantize s", "corrected s"} < model.keys()
    assert all(result[name] for name in ("command", "date", "device", "python", "versions"))
