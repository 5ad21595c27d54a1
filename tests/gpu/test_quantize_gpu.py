"""Quantization on a CUDA device: full-size layers against bfloat16, streaming within its bound, bits that survive."""

from __future__ import annotations

import gc

import pytest
import torch

import ernie_accel
from ernie_accel import CastDtype, Compile, Context, Quantize
from ernie_accel.core.components import module_bytes, pipe_bytes
from ernie_accel.demo.judge import adherence
from ernie_accel.transforms.quantize.backend import SCHEMES, LinearSpec
from ernie_accel.transforms.quantize.choose import BACKENDS
from ernie_accel.transforms.quantize.layers import sqnr_db
from tests.pipelines import randomize, tiny_ernie
from tests.test_saving import assert_same_bits, bits

JUDGED = 128  # pictures
FOUR_BITS = ("int4", "nf4", "fp4", "nvfp4", "gguf-q4_0")
ROWS = 4224  # 1024x1024 pixels are 4096 image tokens, and 128 of text
PAIRS = [(backend, scheme) for backend in BACKENDS.values() for scheme in backend.schemes]
every_pair = pytest.mark.parametrize(("backend", "scheme"), PAIRS, ids=[f"{b.name}-{s}" for b, s in PAIRS])


def run_or_refused(backend, scheme):
    """Return whether the pair runs here; one that does not must say why."""
    reasons = backend.unsupported(scheme, Context.detect(device="cuda"))
    assert not any("not installed" in reason for reason in reasons), reasons
    return not reasons


@every_pair
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (12288, 4096), (4096, 12288)])
def test_a_full_size_layer_against_its_bfloat16_output(backend, scheme, rows, columns):
    if not run_or_refused(backend, scheme):
        return
    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(std=0.02)
    x = torch.randn(1, ROWS, columns, device="cuda", dtype=torch.bfloat16)
    quantized = backend.quantize(scheme, layer)
    weight_db = sqnr_db(layer.weight, backend.dequantize(quantized))
    assert weight_db > SCHEMES[scheme].weight_db
    with torch.no_grad():
        assert sqnr_db(layer(x), quantized(x)) > SCHEMES[scheme].weight_db - 4  # activations round, too
    spec = LinearSpec(rows, columns, torch.bfloat16)
    assert module_bytes(quantized) == backend.stored_bytes(scheme, spec)


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


def picture(pipe):
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
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


@pytest.fixture(scope="module")
def demo():
    pipe = ernie_accel.demo.load(torch.bfloat16, prompt_enhancer=False).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe, adherence(pipe, n=JUDGED), scene_latents(pipe)


def scene_latents(pipe):
    prompt = ["a large red circle in the center on a grey background", "a small blue square in the top left"]
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    size = {"height": 128, "width": 128, "num_inference_steps": 8, "guidance_scale": 1.0, "use_pe": False}
    return pipe(prompt, generator=generator, output_type="latent", **size).images.float()


@every_pair
def test_the_judge_keeps_its_verdict_and_latents_their_floor(backend, scheme, demo):
    if not run_or_refused(backend, scheme):
        return
    pipe, stock, latents = demo
    ernie_accel.optimize(pipe, Quantize(scheme, backend=backend.name))
    try:
        found, db = adherence(pipe, n=JUDGED), sqnr_db(latents, scene_latents(pipe))
    finally:
        ernie_accel.restore(pipe)
    held = f"{found.object_fraction:.4f} of {stock.object_fraction:.4f}"
    print(f"quality {backend.name} {scheme}: latents {db:.1f} dB, objects right {held}")
    assert found.object_fraction >= (0.95 if scheme in FOUR_BITS else 0.99) * stock.object_fraction
    assert db > SCHEMES[scheme].floor_db
