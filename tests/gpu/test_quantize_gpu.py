"""Quantization on a CUDA device: full-size layers against bfloat16, streaming within its bound, bits that survive.

The tables of what was measured are printed, and written to the folder that ERNIE_ACCEL_RESULTS (or OUT) names.
"""

from __future__ import annotations

import gc
import json
import os
import re
import statistics
from pathlib import Path

import pytest
import torch

import ernie_accel
from ernie_accel import CastDtype, Compile, Context, FuseKernels, Quantize, RewriteBlocks
from ernie_accel.core.components import module_bytes, pipe_bytes
from ernie_accel.quantization.backend import SCHEMES, LinearSpec
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import sqnr_db
from tests.pipelines import randomize, tiny_ernie
from tests.test_quantize_quality import Demo
from tests.test_saving import assert_same_bits, bits

JUDGED = 128  # pictures
ROWS = 4224  # 1024x1024 pixels are 4096 image tokens, and 128 of text
EMPTY = 7  # the row of zeros among them, as padding is
SHAPES = [(4096, 4096), (12288, 4096), (4096, 12288)]  # [N, K] of q, k, v and out; gate and up; down
PAIRS = [(backend, scheme) for backend in BACKENDS.values() for scheme in backend.schemes]
every_pair = pytest.mark.parametrize(("backend", "scheme"), PAIRS, ids=[f"{b.name}-{s}" for b, s in PAIRS])
#: The only reasons there are to refuse on CUDA: other hardware, or what an H200 showed to be of no use.
REFUSALS = r"needs CUDA compute capability >= \d+\.\d; this device has \d+\.\d|500 times|builds with nvcc"


@pytest.fixture(scope="module")
def tables(request):
    """Collect rows by table; at the end print them and write them beside the results of the benchmarks."""
    found = {"layers": [], "pictures": []}
    yield found
    lines = []
    for title, rows in found.items():
        if rows:
            lines += [f"# {title}", " | ".join(rows[0]), *(" | ".join(map(str, row.values())) for row in rows), ""]
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    reporter.write_line("")
    for line in lines:
        reporter.write_line(line)
    folder = os.environ.get("ERNIE_ACCEL_RESULTS") or os.environ.get("OUT")
    if folder:
        facts = {"device": str(Context.detect(device="cuda")), "versions": dict(Context.detect().versions)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "test_quantize_gpu.json").write_text(json.dumps(facts | found, indent=1), encoding="utf-8")
        Path(folder, "test_quantize_gpu.md").write_text("\n".join(lines), encoding="utf-8")


def run_or_refused(backend, scheme):
    """Return whether the pair runs here; one that does not must say why."""
    reasons = backend.unsupported(scheme, Context.detect(device="cuda"))
    assert all(re.search(REFUSALS, reason) for reason in reasons), reasons
    return not reasons


def median_ms(layer, x):
    """Return the median time of 20 calls, after 5, in ms."""
    times = []
    for _ in range(25):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        layer(x)
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times[5:])


@every_pair
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=[f"{n}x{k}" for n, k in SHAPES])
def test_a_full_size_layer_against_its_bfloat16_output(backend, scheme, rows, columns, tables):
    if not run_or_refused(backend, scheme):
        return
    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(std=0.02)
    x = torch.randn(1, ROWS, columns, device="cuda", dtype=torch.bfloat16)
    x[0, EMPTY] = 0
    quantized = backend.quantize(scheme, layer)
    weight_db = sqnr_db(layer.weight, backend.dequantize(quantized))
    with torch.no_grad():
        expected, found = layer(x), quantized(x)
        row = {
            "scheme": scheme,
            "backend": backend.name,
            "layer": f"{rows}x{columns}",
            "weight_db": round(weight_db, 1),
            "output_db": round(sqnr_db(expected[0], found[0]), 1),
            "eager_ms": round(median_ms(quantized, x), 3),
            "bfloat16_ms": round(median_ms(layer, x), 3),
            "megabytes": round(module_bytes(quantized) / 1e6, 1),
            "bfloat16_megabytes": round(module_bytes(layer) / 1e6, 1),
        }
    tables["layers"].append(row)
    assert weight_db > SCHEMES[scheme].weight_db
    assert row["output_db"] > SCHEMES[scheme].weight_db - 4  # activations round, too
    assert found.isfinite().all()
    assert not found[0, EMPTY].any()
    assert module_bytes(quantized) == backend.stored_bytes(scheme, LinearSpec(rows, columns, torch.bfloat16))


@pytest.mark.parametrize(("scheme", "need"), [("fp8", (8, 9)), ("nvfp4", (10, 0)), ("mxfp8", (10, 0))])
def test_a_scheme_for_other_hardware_is_refused_with_the_reason_and_nothing_is_touched(scheme, need):
    context, pipe = Context.detect(device="cuda"), small_ernie()
    if context.capability >= need:
        assert ernie_accel.plan(pipe, Quantize(scheme)).ok
        return
    before = {name: tensor.clone() for name, tensor in bits(pipe).items()}
    have, least = (".".join(map(str, capability)) for capability in (context.capability, need))
    reason = f"{scheme} needs CUDA compute capability >= {least}; this device has {have}"
    with pytest.raises(ernie_accel.UnsupportedError, match=re.escape(reason)):
        ernie_accel.optimize(pipe, Quantize(scheme))
    assert_same_bits(before, bits(pipe))


def wide_ernie(layers=4):
    """Return the tiny pipeline around a transformer of full width, on the CPU in bfloat16."""
    from diffusers import ErnieImageTransformer2DModel

    pipe = tiny_ernie(dtype=torch.bfloat16)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=4096,
        num_attention_heads=32,
        num_layers=layers,
        ffn_hidden_size=12288,
        in_channels=16,
        out_channels=16,
        patch_size=1,
        text_in_dim=64,
        rope_axes_dim=(32, 48, 48),
    ).to(torch.bfloat16)
    pipe.transformer = transformer.eval().requires_grad_(False)
    return pipe


def test_streaming_stays_within_the_quantized_size_one_layer_and_a_tenth():
    pipe = wide_ernie()
    largest = max(m.weight.numel() * 2 for m in pipe.transformer.modules() if isinstance(m, torch.nn.Linear))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    ernie_accel.optimize(pipe, Quantize("fp8", device="cuda"))
    peak = torch.cuda.max_memory_allocated() - start
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cuda"}
    assert peak <= 1.1 * pipe_bytes(pipe) + largest
    ernie_accel.restore(pipe)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}
    assert torch.cuda.memory_allocated() - start < 0.02 * peak


def small_ernie():
    pipe = tiny_ernie(dtype=torch.bfloat16)
    randomize(pipe.transformer)
    return pipe.to("cuda", torch.bfloat16)


def picture(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0} | kwargs
    return pipe("a red circle on blue", generator=generator, output_type="pt", **arguments).images.float().cpu()


@every_pair
def test_bits_survive_moving_saving_and_restoring(backend, scheme, tmp_path):
    if not run_or_refused(backend, scheme):
        return
    pipe = small_ernie()
    before = {name: tensor.clone() for name, tensor in bits(pipe).items()}
    ernie_accel.optimize(pipe, Quantize(scheme, backend=backend.name))
    expected = picture(pipe)
    pipe.to("cpu")
    pipe.to("cuda")
    assert torch.equal(picture(pipe), expected), "a pipe that moved after its first picture draws another one"
    again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"), device="cuda")
    assert_same_bits(bits(pipe), bits(again))
    assert torch.equal(picture(again), expected)
    ernie_accel.restore(pipe)
    assert_same_bits(before, bits(pipe))
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cuda"}


@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4", "nf4"])
def test_compiled_in_one_graph(scheme):
    torch._dynamo.reset()
    pipe = small_ernie()
    ernie_accel.optimize(pipe, Quantize(scheme))
    eager = picture(pipe)
    ernie_accel.optimize(pipe, Quantize(scheme), Compile())
    torch._dynamo.utils.counters.clear()
    assert sqnr_db(eager, picture(pipe)) > 15
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_cast_and_fp8_from_the_cpu_in_one_wish():
    pipe = tiny_ernie()
    plan = ernie_accel.plan(pipe, CastDtype("bf16"), Quantize("auto", device="cuda"))
    assert plan.ok, plan
    ernie_accel.optimize(pipe, CastDtype("bf16"), Quantize("auto", device="cuda"))
    assert picture(pipe).isfinite().all()


def test_blocks_on_fused_fp8_kernels_are_saved_and_loaded_bit_equal(tmp_path):
    pipe = ernie_accel.demo.load(torch.bfloat16, prompt_enhancer=False).to("cuda")
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels("fp8"))
    again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"), device="cuda")
    assert_same_bits(bits(pipe), bits(again))
    size = {"height": 128, "width": 128, "use_pe": False}
    assert torch.equal(picture(pipe, **size), picture(again, **size))


@pytest.fixture(scope="module")
def demo():
    return Demo(JUDGED, torch.bfloat16, "cuda")


@every_pair
def test_the_judge_keeps_its_verdict_and_latents_their_floor(backend, scheme, demo, tables):
    if not run_or_refused(backend, scheme):
        return
    ernie_accel.optimize(demo.pipe, Quantize(scheme, backend=backend.name))
    try:
        found = demo.measure()
    finally:
        ernie_accel.restore(demo.pipe)
    tables["pictures"].append(
        {"scheme": scheme, "backend": backend.name} | {name: round(value, 4) for name, value in found.items()}
    )
    demo.check(scheme, found)
