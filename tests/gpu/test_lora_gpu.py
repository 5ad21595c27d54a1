"""LoRAs on fused kernels on a GPU: floors, swaps under captured graphs, and the same bits without one."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

import ernie_accel
from ernie_accel import CaptureGraphs, Compile, FuseKernels, Quantize, RewriteBlocks
from ernie_accel.core.stand_in import standing_in
from ernie_accel.kernels import ops, reference
from ernie_accel.kernels.linear import Fp8Linear, Fp8Rows
from ernie_accel.kernels.low_rank import LowRankProduct, Place, Site
from ernie_accel.models.adapters import PRODUCTS, update_products
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.quantization.backend import QuantizationBackend
from tests.gpu.test_fast_gpu import latents, sqnr_db
from tests.gpu.test_quantize_gpu import PAIRS, run_or_refused


@pytest.fixture
def pipe() -> Any:
    pipe = ernie_accel.demo.load(dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter(pipe: Any, seed: int = 1, rank: int = 16) -> dict[str, torch.Tensor]:
    """Return a LoRA for all linear layers of the blocks of a stock pipe; a twentieth of each weight's norm."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, layer in pipe.transformer.named_modules():
        if isinstance(layer, nn.Linear) and path.startswith("layers."):
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            scale = 0.05 * layer.weight.float().norm().cpu() / (up @ down).norm()
            tensors |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up * scale}
    return tensors


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_every_call_keeps_the_floor(pipe: Any, precision: str, loaded: str) -> None:
    one, other = adapter(pipe), adapter(pipe, seed=2, rank=8)
    stock = ernie_accel.demo.load(dtype=torch.bfloat16).to("cuda")
    stock.set_progress_bar_config(disable=True)
    transforms = (RewriteBlocks(), FuseKernels(precision))
    if loaded == "after":
        ernie_accel.optimize(pipe, *transforms)
        plain = latents(pipe)
    for each in (pipe, stock):
        each.load_lora_weights(dict(one), adapter_name="a")
    if loaded == "before":
        ernie_accel.optimize(pipe, *transforms)
    floor = FuseKernels(precision).floor_db

    def same() -> None:
        assert sqnr_db(latents(pipe), latents(stock)) > floor

    same()
    for each in (pipe, stock):
        each.load_lora_weights(dict(other), adapter_name="b")
        each.set_adapters(["a", "b"], [0.5, 0.7])
    same()
    for each in (pipe, stock):
        each.set_adapters(["b"])
        each.fuse_lora()
    same()
    for each in (pipe, stock):
        each.unfuse_lora()
        each.disable_lora()
    same()
    pipe.unload_lora_weights()
    if loaded == "after" and precision == "fp8":
        assert sqnr_db(latents(pipe), plain) > 25  # a merge rounds the originals twice


@pytest.mark.parametrize(("backend", "scheme"), PAIRS, ids=[f"{b.name}-{s}" for b, s in PAIRS])
def test_merging_into_quantized_layers(pipe: Any, backend: QuantizationBackend, scheme: str) -> None:
    stock = ernie_accel.demo.load(dtype=torch.bfloat16).to("cuda")
    stock.set_progress_bar_config(disable=True)
    if not run_or_refused(backend, scheme):
        return
    expected = latents(stock)
    ernie_accel.optimize(pipe, Quantize(scheme, backend=backend.name))
    plain = latents(pipe)
    floor = sqnr_db(plain, expected) - 6
    weights = adapter(stock)
    for name, change in (
        ("load", lambda each: each.load_lora_weights(dict(weights), adapter_name="a")),
        ("fuse", lambda each: each.fuse_lora(lora_scale=0.8)),
        ("unfuse", lambda each: each.unfuse_lora()),
        ("unload", lambda each: each.unload_lora_weights()),
    ):
        for each in (pipe, stock):
            change(each)
        assert sqnr_db(latents(pipe), latents(stock)) > floor, name
    assert sqnr_db(latents(pipe), plain) > floor
    assert sqnr_db(latents(ernie_accel.restore(pipe)), expected) > 35  # what is not quantized was rounded twice


@pytest.mark.parametrize("blocks", ["stock", "rewritten", "quantized"])
def test_swaps_on_compiled_blocks(pipe: Any, blocks: str) -> None:
    """Compiled by inductor, with CUDA's own kernels."""
    from torch._dynamo.utils import counters

    stock = ernie_accel.demo.load(dtype=torch.bfloat16).to("cuda")
    stock.set_progress_bar_config(disable=True)
    before = {"stock": (), "rewritten": (RewriteBlocks(),), "quantized": (Quantize("fp8", backend="torchao"),)}[blocks]
    ernie_accel.optimize(pipe, *before, Compile())
    floor = min(sqnr_db(latents(pipe), latents(stock)), 40) - 6
    one, other = adapter(stock), adapter(stock, seed=2)
    for each in (pipe, stock):
        each.load_lora_weights(dict(one), adapter_name="a")
        each.load_lora_weights(dict(other), adapter_name="b")
        each.set_adapters(["a"])
    assert sqnr_db(latents(pipe), latents(stock)) > floor
    graphs = counters["stats"]["unique_graphs"]
    for names, scales in ((["b"], [1.0]), (["a"], [0.4]), (["b"], [-0.3])):
        for each in (pipe, stock):
            each.set_adapters(names, scales)
        assert sqnr_db(latents(pipe), latents(stock)) > floor
    assert counters["stats"]["unique_graphs"] == graphs


def test_the_same_bits_without_one_and_one_capture_for_the_same_ranks(pipe: Any) -> None:
    one, other = adapter(pipe), adapter(pipe, seed=2)
    transforms = (RewriteBlocks(), FuseKernels("fp8"))
    ernie_accel.optimize(pipe, *transforms)
    plain = latents(pipe)
    expected = []
    for weights in (one, other):
        pipe.load_lora_weights(dict(weights), adapter_name="a")
        expected.append(latents(pipe))
        pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), plain)
    ernie_accel.optimize(pipe, *transforms, CaptureGraphs())
    assert torch.equal(latents(pipe), plain)
    pipe.load_lora_weights(dict(one), adapter_name="a")
    pipe.load_lora_weights(dict(other), adapter_name="b")
    made: list[int] = []
    for name, want in (("a", expected[0]), ("b", expected[1]), ("a", expected[0])):
        start = time.perf_counter()
        pipe.set_adapters([name])
        update_products(pipe.transformer)
        torch.cuda.synchronize()
        assert time.perf_counter() - start < 0.05
        assert torch.equal(latents(pipe), want)
        now = graphs(pipe)
        assert now
        assert made in ([], now)
        made = now
    pipe.disable_lora()
    assert torch.equal(latents(pipe), plain)


def graphs(pipe: Any) -> list[int]:
    """Return the identities of the graphs that are kept."""
    forward = standing_in(pipe.transformer, GraphedForward)
    assert forward is not None
    return [id(entry.made) for entry in forward._graphs._entries.values() if entry.made is not None]


def wide() -> Any:
    """Return a pipe whose transformer has two blocks as wide as ERNIE-Image's: a few channels sway a ratio."""
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=4096, num_attention_heads=32, num_layers=2, ffn_hidden_size=12288, in_channels=128,
        out_channels=128, text_in_dim=256, rope_axes_dim=(32, 48, 48),
    )  # fmt: skip
    for weight in transformer.parameters():  # diffusers leaves some as the memory was
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5) if weight.ndim > 1 else nn.init.ones_(weight)
    others = ernie_accel.demo.load(dtype=torch.bfloat16).components
    pipe = ErnieImagePipeline(**{**others, "transformer": transformer.to(torch.bfloat16)}).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predictions(pipe: Any, count: int = 64) -> torch.Tensor:
    """Return what the transformer predicts in one step: over all steps the pictures of a LoRA go ways of their own."""
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(3)
    noise = torch.randn(count, config.in_channels, 8, 8, generator=generator).to(pipe.device, torch.bfloat16)
    text = torch.randn(count, 9, config.text_in_dim, generator=generator).to(pipe.device, torch.bfloat16)
    lengths, times = torch.full((count,), 9, device=pipe.device), torch.linspace(950, 250, count)
    with torch.no_grad():
        out = pipe.transformer(noise, times.to(pipe.device, torch.bfloat16), text, lengths, return_dict=False)[0]
    return out.float()  # type: ignore[no-any-return]


def test_fidelity_is_that_of_fp8_without_one(pipe: Any) -> None:
    """Over many predictions: on the miniature fp8 gives 17 to 36 dB for one, and another LoRA moves it by 3."""
    seeds, expected = range(1, 9), {None: predictions(pipe)}
    loras = {seed: adapter(pipe, seed) for seed in seeds}
    for seed, weights in loras.items():
        pipe.load_lora_weights(dict(weights), adapter_name="a")
        expected[seed] = predictions(pipe)
        pipe.unload_lora_weights()
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels("fp8"))

    def mean_db(seed: int | None) -> float:
        pairs = list(zip(predictions(pipe), expected[seed], strict=True))
        return sum(sqnr_db(got, want) for got, want in pairs) / len(pairs)

    plain_db, with_lora_db = mean_db(None), []
    for seed, weights in loras.items():
        pipe.load_lora_weights(dict(weights), adapter_name="a")
        with_lora_db.append(mean_db(seed))
        pipe.unload_lora_weights()
    assert sum(with_lora_db) / len(with_lora_db) > plain_db - 0.5


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize(("features", "columns"), [(12288, 4096), (4096, 12288)])
def test_a_product_at_full_size_is_as_exact_with_a_lora_as_without(features: int, columns: int, rank: int) -> None:
    """The product with spare columns against the exact one, of which the LoRA is a tenth, as one of 10 % is."""
    torch.manual_seed(0)
    weight = torch.randn(features, columns, device="cuda") * 0.02
    down, up = torch.randn(rank, columns, device="cuda"), torch.randn(features, rank, device="cuda")
    up *= 0.1 * 0.02 / rank**0.5
    owner = nn.Module()
    product = LowRankProduct(Fp8Linear(weight.bfloat16()), (Place(owner, "a", 0, features),))
    owner.a = Site(product, product.places[0], columns, whole=False)
    layer: Any = Linear(owner.a, "x", LoraConfig(r=rank, lora_alpha=rank), r=rank, lora_alpha=rank)
    layer.lora_A["x"].weight.data, layer.lora_B["x"].weight.data = down, up
    x = torch.randn(1, 4224, columns, device="cuda", dtype=torch.bfloat16)
    exact = x.float()[0] @ weight.bfloat16().float().t()
    with torch.no_grad():
        plain_db = sqnr_db(product.product(x)[0], exact)
        owner.a = layer
        with_lora_db = sqnr_db(product(x)[0], exact + x.float()[0] @ down.t() @ up.t())
        assert product.spare == 128
        rows = ops.quantize_rows(x)
        copied_db = sqnr_db(product(Fp8Rows(*rows))[0], exact + x.float()[0] @ down.t() @ up.t())
    assert min(with_lora_db, copied_db) > plain_db - 0.2


@pytest.mark.parametrize("attention", ["bf16", "fp8"])
def test_fidelity_at_full_width_is_that_of_fp8_without_one(attention: str) -> None:
    pipe = wide()
    stock = predictions(pipe, 4)
    weights = adapter(pipe)
    pipe.load_lora_weights(dict(weights), adapter_name="a")
    with_lora = predictions(pipe, 4)
    pipe.unload_lora_weights()
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels("fp8", attention=attention))
    plain = predictions(pipe, 4)
    plain_db = sqnr_db(plain, stock)
    pipe.load_lora_weights(dict(weights), adapter_name="a")
    assert sqnr_db(predictions(pipe, 4), plain) < plain_db  # what the LoRA adds is more than what fp8 loses
    assert sqnr_db(predictions(pipe, 4), with_lora) > plain_db - 0.5


def test_a_swap_is_a_copy_of_the_same_bits_and_takes_no_time_at_full_width() -> None:
    pipe = wide()
    weights = {name: adapter(pipe, seed, rank=64) for seed, name in enumerate("ab")}
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels("fp8"))
    for name, tensors in weights.items():
        pipe.load_lora_weights(dict(tensors), adapter_name=name)

    def swap(name: str) -> tuple[list[torch.Tensor], float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        pipe.set_adapters([name])
        update_products(pipe.transformer)
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        held = [each for part in products for each in (part.wide, part.down, part.factor) if each is not None]
        return [each.contiguous().view(torch.uint8).clone() for each in held], taken

    products = PRODUCTS.required(pipe.transformer)
    anew = {name: swap(name)[0] for name in "ab"}
    assert len(anew["a"]) > 3
    for name in "ab":
        kept, taken = swap(name)
        assert all(map(torch.equal, kept, anew[name]))
        assert taken < 0.05
    for part in products:  # one at a time: the bits do not depend on what is computed together
        part.forget()
        part.update()
    assert all(map(torch.equal, swap("b")[0], anew["b"]))


@pytest.mark.parametrize("ranks", [16, 48, 192, 384])
def test_the_low_rank_kernel_at_full_size(ranks: int) -> None:
    torch.manual_seed(0)
    for width in (4096, 12288):
        values, scale = ops.quantize_rows(torch.randn(1, 4224, width, device="cuda", dtype=torch.bfloat16))
        down = torch.randn(ranks, width, device="cuda", dtype=torch.bfloat16)
        got, expected = ops.low_rank_fp8(values, scale, down), reference.low_rank_fp8(values, scale, down)
        assert sqnr_db(got.float(), expected.float()) > 45
