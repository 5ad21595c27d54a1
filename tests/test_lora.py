"""LoRAs on fused kernels: each of diffusers' calls does what it does on a stock pipe, before and after `optimize`."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import ernie_accel
from ernie_accel import Context, ErnieAccelError, FuseKernels, Quantize, RewriteBlocks
from ernie_accel.kernels import ops, reference
from ernie_accel.kernels.linear import Fp8Linear, Fp8Rows
from ernie_accel.kernels.low_rank import LowRankProduct, Place, Site, gated
from ernie_accel.models.adapters import adaptables, update_products
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.models.rewritten import rewritten_blocks
from tests.examples import differences, snapshot
from tests.pipelines import picture, tiny_ernie, tiny_lumina2, tiny_z_image
from tests.test_fuse_kernels import sqnr_db
from tests.test_graphs import Recorder

H200 = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})
FAMILIES: dict[str, Callable[[], Any]] = {"ernie": tiny_ernie, "z_image": tiny_z_image, "lumina2": tiny_lumina2}


def made(family: str) -> Any:
    pipe = FAMILIES[family]()
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.to(torch.bfloat16)
    return pipe


def fused(pipe: Any, precision: str = "fp8", **kwargs: Any) -> Any:
    return ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels(precision, **kwargs), context=H200)


def latents(pipe: Any) -> torch.Tensor:
    return picture(pipe, output_type="latent", steps=2)


def adapter(family: str, seed: int = 1, rank: int = 4, only: str = "") -> dict[str, torch.Tensor]:
    """Return a LoRA for all linear layers of the blocks, or for those with `only` in their path."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    transformer = FAMILIES[family]().transformer
    for path, layer in transformer.named_modules():
        in_block = path.split(".")[0] in ("layers", "noise_refiner", "context_refiner")
        if isinstance(layer, nn.Linear) and in_block and only in path:
            down = torch.randn(rank, layer.in_features, generator=generator) * 0.3
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.05
            tensors |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
    return tensors


def load(pipe: Any, family: str, name: str = "a", **kwargs: Any) -> None:
    pipe.load_lora_weights(adapter(family, **kwargs), adapter_name=name)


def load_second(pipe: Any, family: str) -> None:
    load(pipe, family, "b", seed=2, rank=6, only="to_")
    pipe.set_adapters(["a", "b"], [0.5, 0.7])


def unload_and_load(pipe: Any, family: str) -> None:
    pipe.unload_lora_weights()
    load(pipe, family, seed=3)


#: What a script does with LoRAs, one after the other.
CALLS: dict[str, Callable[[Any, str], None]] = {
    "scale": lambda pipe, family: pipe.set_adapters(["a"], [0.3]),
    "two at once": load_second,
    "switch": lambda pipe, family: pipe.set_adapters(["b"]),
    "disable": lambda pipe, family: pipe.disable_lora(),
    "enable": lambda pipe, family: pipe.enable_lora(),
    "delete": lambda pipe, family: (pipe.delete_adapters("b"), pipe.set_adapters(["a"])),  # type: ignore[func-returns-value]
    "fuse": lambda pipe, family: pipe.fuse_lora(lora_scale=0.8),
    "unfuse": lambda pipe, family: pipe.unfuse_lora(),
    "unload and load": unload_and_load,
}


@pytest.mark.parametrize(
    ("family", "precision", "loaded"),
    [
        ("ernie", "fp8", "before"),
        pytest.param("ernie", "fp8", "after", marks=pytest.mark.slow),
        pytest.param("ernie", "bf16", "before", marks=pytest.mark.slow),
        pytest.param("z_image", "fp8", "after", marks=pytest.mark.slow),
        ("z_image", "bf16", "before"),
        pytest.param("lumina2", "fp8", "before", marks=pytest.mark.slow),
        ("lumina2", "bf16", "after"),
    ],
)
def test_every_call_does_what_it_does_on_a_stock_pipe(family: str, precision: str, loaded: str) -> None:
    pipe, stock = made(family), made(family)
    plain = latents(stock)
    load(stock, family)
    with_lora = latents(stock)
    if loaded == "before":
        load(pipe, family)
        fused(pipe, precision)
    else:
        fused(pipe, precision)
        load(pipe, family)
    assert sqnr_db(latents(pipe), with_lora) > max(FuseKernels(precision).floor_db, sqnr_db(plain, with_lora) + 6)
    for name, call in CALLS.items():
        for each in (pipe, stock):
            call(each, family)
        got, expected = latents(pipe), latents(stock)
        assert sqnr_db(got, expected) > FuseKernels(precision).floor_db, name
        assert sqnr_db(plain, expected) < sqnr_db(got, expected) - 6 or name == "disable", name
    ernie_accel.restore(pipe)
    if precision == "bf16":  # merged and taken out again in place
        assert sqnr_db(latents(pipe), latents(stock)) > 35
    else:
        assert torch.equal(latents(pipe), latents(stock))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_without_adapters_everything_is_as_before_bit_for_bit(precision: str) -> None:
    stock = made("ernie")
    plain = latents(stock)
    pipe = fused(made("ernie"), precision)
    before, modules = latents(pipe), dict(pipe.transformer.named_modules())
    load(pipe, "ernie")
    first = latents(pipe)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), before)
    pipe.enable_lora()
    assert torch.equal(latents(pipe), first)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), before)
    assert dict(pipe.transformer.named_modules()) == modules
    load(pipe, "ernie")
    assert torch.equal(latents(pipe), first)
    pipe.delete_adapters("a")
    assert torch.equal(latents(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(latents(ernie_accel.restore(pipe)), plain)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_loaded_before_or_after_is_the_same_and_restore_gives_back_a_stock_pipe_with_it(precision: str) -> None:
    stock = made("ernie")
    plain = latents(stock)
    load(stock, "ernie", rank=16)  # a multiple of 16: as shapes go, its own matrices could be fp8
    expected = latents(stock)
    before, after = made("ernie"), fused(made("ernie"), precision)
    load(before, "ernie", rank=16)
    fused(before, precision)
    (entry,) = ernie_accel.report(before).entries[1:]
    assert entry.applied is not None
    assert not [path for path in entry.applied.skipped if "lora" in path]
    load(after, "ernie", rank=16)
    assert torch.equal(latents(before), latents(after))
    for pipe in (before, after):
        ernie_accel.restore(pipe)
        assert torch.equal(latents(pipe), expected)
        assert pipe.get_active_adapters() == ["a"]
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe), plain)


def graphed(pipe: Any) -> Recorder:
    recorder = Recorder()
    GraphedForward(pipe.transformer, rewritten_blocks(pipe), 1 << 20, 2, recorder).install(ernie_accel.Undo())
    return recorder


@pytest.mark.parametrize("family", ["ernie", "z_image"])
def test_graphs_go_on_with_other_adapters_of_the_same_ranks_and_are_made_anew_for_others(family: str) -> None:
    pipe, eager = fused(made(family)), fused(made(family))
    recorder = graphed(pipe)
    for each in (pipe, eager):
        load(each, family, only="to_")  # a LoRA of what modulates is PEFT's own
        load(each, family, "b", seed=2, only="to_")
        load(each, family, "wide", seed=3, rank=20, only="to_")

    def draws(adapters: list[str], weights: list[float]) -> int:
        for each in (pipe, eager):
            each.set_adapters(adapters, weights)
        assert torch.equal(latents(pipe), latents(eager))
        return recorder.captures

    assert draws(["a"], [1.0]) == 1
    assert draws(["b"], [1.0]) == 1
    assert draws(["b"], [0.4]) == 1
    assert draws(["wide"], [1.0]) == 2
    for each in (pipe, eager):
        each.disable_lora()
    assert torch.equal(latents(pipe), latents(eager))
    assert recorder.captures == 3


def test_a_swap_is_written_into_the_same_memory() -> None:
    pipe = fused(made("ernie"))
    load(pipe, "ernie")
    load(pipe, "ernie", "b", seed=2)

    def places() -> list[int]:
        latents(pipe)
        products = [part for part in pipe.transformer.modules() if isinstance(part, LowRankProduct)]
        return [each.data_ptr() for part in products for each in (part.down, part.up, part.wide) if each is not None]

    pipe.set_adapters(["a"])
    first = places()
    assert len(first) == 2 * 4 * 2  # two products of the attention and two of the MLP, in each of two blocks
    pipe.set_adapters(["b"], [0.5])
    assert places() == first


def test_a_hot_swap_counts() -> None:
    pipe, stock = fused(made("ernie")), made("ernie")
    for each in (pipe, stock):
        load(each, "ernie")
        latents(each)
        each.load_lora_weights(adapter("ernie", seed=2), adapter_name="a", hotswap=True)
    expected = fused(made("ernie"))
    load(expected, "ernie", seed=2)
    assert torch.equal(latents(pipe), latents(expected))
    assert sqnr_db(latents(pipe), latents(stock)) > 25


def through_pickle(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize(
    ("precision", "copied"), [("fp8", copy.deepcopy), ("fp8", through_pickle), ("bf16", through_pickle)]
)
def test_copies_have_adapters_of_their_own(precision: str, copied: Any) -> None:
    pipe = fused(made("ernie"), precision)
    load(pipe, "ernie")
    update_products(pipe.transformer)
    other = copied(pipe)
    expected = latents(pipe)
    assert torch.equal(latents(other), expected)
    other.set_adapters(["a"], [0.2])
    assert not torch.equal(latents(other), expected)
    assert torch.equal(latents(pipe), expected)


TO_Q = "layers.1.self_attention.to_q"
REFUSED = {
    "DoRA": ({f"transformer.{TO_Q}.lora_magnitude_vector.weight": torch.ones(128)}, rf"{TO_Q} gets a DoRA"),
    "bias": ({f"transformer.{TO_Q}.lora_B.bias": torch.ones(128)}, rf"{TO_Q} gets a LoRA with a bias"),
    "width": ({f"transformer.{TO_Q}.lora_A.weight": torch.ones(4, 96)}, rf"{TO_Q} has 128 inputs, and its LoRA 96"),
    "another model": (
        {f"transformer.blocks.{i}.attn.to_q.lora_{half}.weight": torch.ones(4, 4) for i in range(3) for half in "AB"},
        r"6 of its 22 tensors match no layer of ErnieImageTransformer2DModel: blocks\.0\.attn\.to_q\.lora_A\.weight",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_kernels_cannot_add_is_refused_by_name_and_nothing_is_changed(what: str) -> None:
    tensors, message = REFUSED[what]
    pipe = fused(made("ernie"))
    before = snapshot(pipe)
    weights = adapter("ernie", only="to_") | tensors
    with pytest.raises(ErnieAccelError, match=message):
        pipe.load_lora_weights(weights, adapter_name="a")
    assert differences(before, snapshot(pipe)) == []
    load(pipe, "ernie")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "it is a DoRA"),
        ({"lora_bias": True}, "has a bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_a_configuration_that_the_kernels_cannot_add_is_refused(settings: dict[str, Any], message: str) -> None:
    pipe = fused(made("ernie"))
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match=message):
        pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"], **settings))
    assert differences(before, snapshot(pipe)) == []


def test_an_adapter_that_is_there_and_cannot_go_on_kernels_is_in_the_plan() -> None:
    pipe = made("ernie")
    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"], use_dora=True))
    plan = ernie_accel.plan(pipe, RewriteBlocks(), FuseKernels("fp8"), context=H200)
    (problem,) = plan.problems[FuseKernels("fp8")]
    assert problem.startswith(
        "an adapter is loaded that the kernels cannot take: layers.0.self_attention.to_q: it has a "
    )


def test_without_originals_nothing_is_merged_and_unmerged_it_works() -> None:
    pipe, other = fused(made("ernie"), keep_originals=False), fused(made("ernie"))
    for each in (pipe, other):
        load(each, "ernie")
    expected = latents(pipe)
    assert torch.equal(expected, latents(other))
    with pytest.raises(ErnieAccelError, match=r"fuse_lora: cannot merge .* nothing was changed .*keep_originals=True"):
        pipe.fuse_lora()
    assert torch.equal(latents(pipe), expected)


@pytest.mark.parametrize("name", ["unfuse_lora", "disable_lora"])
def test_without_originals_a_lora_that_was_merged_before_stays_merged(name: str) -> None:
    pipe = made("ernie")
    load(pipe, "ernie")
    pipe.fuse_lora()
    kept = copy.deepcopy(pipe)
    fused(pipe, keep_originals=False)
    expected, before = latents(pipe), snapshot(pipe)
    for owner in (pipe, pipe.transformer):
        with pytest.raises(ErnieAccelError, match=rf"{name}: a LoRA is merged into layers\..*the original is gone"):
            getattr(owner, name)()
        assert differences(before, snapshot(pipe)) == []
        assert torch.equal(latents(pipe), expected)
    getattr(fused(kept), name)()  # the originals are there
    assert not torch.equal(latents(kept), expected)


@pytest.mark.parametrize("with_lora", [False, True])
def test_weights_that_are_no_float8_are_refused_by_kernels_before_any_is_loaded(with_lora: bool) -> None:
    pipe, plain = fused(made("ernie")), made("ernie").transformer.state_dict()
    if with_lora:
        load(pipe, "ernie")
    expected, before = latents(pipe), snapshot(pipe)
    for assign in (False, True):
        with pytest.raises(ErnieAccelError, match=r"load_state_dict: layers\.\d.* is quantized \(fp8 by fused"):
            pipe.transformer.load_state_dict({name: x * 2 for name, x in plain.items()}, strict=False, assign=assign)
        assert differences(before, snapshot(pipe)) == []
    pipe.transformer.load_state_dict({name: value.clone() for name, value in pipe.transformer.state_dict().items()})
    assert torch.equal(latents(pipe), expected)
    if not with_lora:
        ernie_accel.restore(pipe).transformer.load_state_dict(plain)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_a_state_dict_has_the_names_of_a_stock_model_but_for_float8_weights(precision: str) -> None:
    pipe, stock = fused(made("ernie"), precision), made("ernie")
    for each in (pipe, stock):
        load(each, "ernie")
    own, expected = pipe.transformer.state_dict(), stock.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.items() if name in expected)
    others = {name for name in own if name not in expected}
    assert all("product.weight" in name for name in others)
    assert (not others) == (precision == "bf16")
    if precision == "bf16":
        assert own.keys() == expected.keys()
        stock.transformer.load_state_dict(doubled := {name: tensor * 1.5 for name, tensor in expected.items()})
        pipe.transformer.load_state_dict(doubled)
        assert sqnr_db(latents(pipe), latents(stock)) > 25


def test_a_merged_lora_stays_in_the_weights_when_it_is_unloaded_and_restored(caplog: pytest.LogCaptureFixture) -> None:
    pipe, stock = fused(made("ernie")), made("ernie")
    caplog.set_level("INFO", "ernie_accel")
    for each in (pipe, stock):
        load(each, "ernie")
        each.fuse_lora()
        each.unload_lora_weights()
    assert [r.getMessage() for r in caplog.records if "fuse_lora: 5 float8 weights were made anew" in r.getMessage()]
    assert sqnr_db(latents(pipe), latents(stock)) > 25
    assert torch.equal(latents(ernie_accel.restore(pipe)), latents(stock))


def product_of_two(columns: int, strength: float = 1.0) -> tuple[LowRankProduct, torch.Tensor]:
    """Return a product [48, columns] with adapters of ranks 3 and 5 on its two layers, and what they add to it."""
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    owner, weight = nn.Module(), torch.randn(48, columns)
    places = (Place(owner, "a", 0, 16), Place(owner, "b", 16, 32))
    product, deltas = LowRankProduct(Fp8Linear(weight.bfloat16()), places), torch.zeros(48, columns)
    for place, rank in zip(places, (3, 5), strict=True):
        site = Site(product, place, columns, whole=False)
        assert site.weight.shape == (place.features, columns)
        layer = Linear(
            site, "x", LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False), r=rank, lora_alpha=2 * rank
        )
        setattr(owner, place.name, layer)
        layer.lora_B["x"].weight.data *= strength
        delta = layer.lora_B["x"].weight.float() @ layer.lora_A["x"].weight.float()
        deltas[place.start : place.start + place.features] = 2 * delta.detach()
    return product, deltas


@pytest.mark.parametrize("columns", [32, 4096])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0, 3000.0])
def test_the_product_is_that_of_its_definition(columns: int, strength: float) -> None:
    product, deltas = product_of_two(columns, strength)
    x = torch.randn(2, 5, columns).bfloat16()
    x[0, 0, 0] *= 100  # one value of a row is most of it
    alone, stored = product.product, product.weight.clone()
    weight = stored.float() * alone.weight_scale[0, :, None]
    rows = Fp8Rows(*reference.quantize_rows(x))
    spare_rows = Fp8Rows(*reference.quantize_rows(x, 64))
    with torch.no_grad():
        for given in (x, rows, spare_rows, Fp8Rows(*reference.quantize_rows(x, 128))):
            values = rows.values.float() * rows.scale.view(2, 5, 1)
            got, plain, added = product(given).float(), values @ weight.t(), values @ deltas.t()
            assert sqnr_db(got, plain + added) > (23 if strength > 1 else 40)
            noise = 2.0**-8 * plain.norm()  # it is rounded to bfloat16
            assert (got - plain - added).norm() < 0.07 * added.norm() + noise
    is_wide = strength <= (30 if columns == 4096 else 1)
    assert product.spare == (128 if is_wide else 0)
    assert product.down is not None
    assert product.down.shape == (16, columns)
    assert (product.weight.data_ptr() == product.wide.data_ptr()) if product.wide is not None else not is_wide
    assert torch.equal(product.weight.view(torch.uint8), stored.view(torch.uint8))
    assert product.alone() is alone
    assert alone.weight.is_contiguous()
    assert torch.equal(alone.weight.view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("strength", [0.0, 1.0, 3000.0])
@pytest.mark.parametrize("room", [0, 64, 128])
def test_a_gated_product_is_the_product_gated(
    strength: float, room: int, silu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without adapters, with them in spare columns, and with adapters too large for these."""
    monkeypatch.setattr(ops, "gates_in_product", lambda x: True)
    product, _ = product_of_two(32, strength)
    if strength == 0.0:
        for place in product.places:
            vars(place.adapted)["_disable_adapters"] = True
    rows = Fp8Rows(*reference.quantize_rows(torch.randn(2, 5, 32).bfloat16(), room))
    gate = ops.silu_mul_fp8 if silu else ops.gelu_mul_fp8
    with torch.no_grad():
        values, scale = gate(product(rows), 64)
        for given in (product, product.product) if strength == 0.0 and room == 0 else (product,):
            got = gated(given, rows, 64, silu=silu)
            if strength == 3000.0:  # they are added to the product
                assert got is None
                continue
            assert got is not None
            assert got.values.shape == (2, 5, 24 + 64)
            assert torch.equal(got.values[..., :24].view(torch.uint8), values[..., :24].view(torch.uint8))
            assert torch.equal(got.scale, scale)
    assert (product.spare > 0) == (strength == 1.0)


def test_on_other_cards_a_product_is_called_and_gated_by_another_kernel() -> None:
    """So that plans of memory count the product, which is there."""
    product, _ = product_of_two(32)
    rows = Fp8Rows(*reference.quantize_rows(torch.randn(1, 2, 32).bfloat16()))
    assert gated(product, rows, 0, silu=True) is None
    assert gated(product.product, rows, 0, silu=True) is None


@pytest.mark.parametrize("where", ["product", "within", "forward", "compiled", "everywhere"])
def test_a_product_that_somebody_watches_is_not_gated_within(
    where: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(ops, "gates_in_product", lambda x: True)
    product, _ = product_of_two(32)
    watched, calls = product.product if where == "within" else product, list[object]()
    given = watched.forward

    def counted(*args: object) -> object:
        calls.append(args)
        return given(*args)

    if where == "forward":
        watched.forward = counted  # type: ignore[method-assign,assignment]
    elif where == "compiled":
        watched._compiled_call_impl = counted  # type: ignore[assignment]
    elif where == "everywhere":
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: calls.append(out) if module is product else None
        )
        request.addfinalizer(hook.remove)
    else:
        watched.register_forward_hook(lambda module, args, out: calls.append(out))
    rows = Fp8Rows(*reference.quantize_rows(torch.randn(1, 2, 32).bfloat16()))
    with torch.no_grad():
        assert gated(product, rows, 0, silu=True) is None
        product(rows)
    assert len(calls) == 1


def test_no_row_is_clamped_that_is_all_in_the_direction_of_an_adapter() -> None:
    product, deltas = product_of_two(4096)
    product.update()
    x = torch.cat([product.places[0].adapted.lora_A["x"].weight, torch.ones(1, 4096)]).detach().bfloat16()
    rows = Fp8Rows(*reference.quantize_rows(x[None], 64))
    expected = x.float() @ (product.weight.float() * product.product.weight_scale[0, :, None] + deltas).t()
    with torch.no_grad():
        assert sqnr_db(product(rows).float()[0], expected) > 25


def test_weights_that_others_hold_or_hook_are_left_as_they_are() -> None:
    product, _ = product_of_two(32)
    together = torch.cat([product.weight.view(torch.uint8).flatten(), torch.zeros(64, dtype=torch.uint8)])
    product.product.weight = together[: 48 * 32].view(48, 32).view(torch.float8_e4m3fn)
    with torch.no_grad():
        product(torch.randn(1, 2, 32).bfloat16())
    assert product.spare == 0
    assert product.weight.untyped_storage().data_ptr() == together.data_ptr()
    other, _ = product_of_two(32)
    calls: list[object] = []
    with torch.no_grad():
        first = other(torch.ones(1, 2, 32).bfloat16())
        assert other.spare == 128
        other.product.register_forward_pre_hook(lambda module, args: calls.append(module))
        assert sqnr_db(other(torch.ones(1, 2, 32).bfloat16()).float(), first.float()) > 30
    assert calls == [other.product]
    assert other.spare == 0


def comfy(path: str, half: str) -> str:
    return f"diffusion_model.{path}.lora_{'down' if half == 'A' else 'up'}.weight"


def kohya(path: str, half: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}.lora_{'down' if half == 'A' else 'up'}.weight"


FORMATS: dict[str, Callable[[str, str], str]] = {
    "diffusers": lambda path, half: f"transformer.{path}.lora_{half}.weight",
    "PEFT": lambda path, half: f"base_model.model.{path}.lora_{half}.weight",
    "ComfyUI": lambda path, half: f"diffusion_model.{path}.lora_{half}.weight",
    "ComfyUI, down and up": comfy,
    "kohya": kohya,
}


@pytest.mark.parametrize(
    ("named", "on_kernels"),
    [("kohya", True), ("ComfyUI, down and up", False)]
    + [pytest.param(name, on, marks=pytest.mark.slow) for name in FORMATS for on in (True, False)],
)
def test_a_lora_is_the_same_by_every_trainers_names(named: str, on_kernels: bool) -> None:
    def prepared() -> Any:
        return fused(made("ernie")) if on_kernels else ernie_accel.optimize(made("ernie"), RewriteBlocks())

    expected, pipe = prepared(), prepared()
    weights = adapter("ernie")
    load(expected, "ernie")
    has_alpha = named in ("kohya", "ComfyUI, down and up")
    renamed = {}
    for key, tensor in weights.items():
        path, half = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".lora_", 1)
        renamed[FORMATS[named](path, half)] = tensor * 2 if has_alpha and half == "B" else tensor
        if has_alpha:
            renamed[FORMATS[named](path, "A").replace("lora_down.weight", "alpha")] = torch.tensor(2.0)  # of rank 4
    pipe.load_lora_weights(renamed, adapter_name="a")
    assert torch.equal(latents(pipe), latents(expected))
    assert type(ernie_accel.restore(pipe)).lora_state_dict == pipe.lora_state_dict


def test_a_lora_of_which_diffusers_would_load_nothing_is_refused() -> None:
    pipe = fused(made("ernie"))
    with pytest.raises(
        ErnieAccelError, match=r"none of its 2 tensors begins with 'transformer\.': it has unet\.x\.lora_A"
    ):
        pipe.load_lora_weights({f"unet.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"})


def test_a_dora_of_comfyui_is_refused_before_half_of_it_is_loaded() -> None:
    pipe = ernie_accel.optimize(made("ernie"), RewriteBlocks())
    weights = adapter("ernie") | {f"diffusion_model.{TO_Q}.dora_scale": torch.ones(128)}
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match=r"this is a DoRA \(1 tensors such as diffusion_model"):
        pipe.load_lora_weights(weights, adapter_name="a")
    assert differences(before, snapshot(pipe)) == []


def test_rewritten_blocks_refuse_a_lora_of_another_model_before_they_are_split() -> None:
    pipe = ernie_accel.optimize(made("ernie"), RewriteBlocks())
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match=r"8 of its 8 tensors match no layer of ErnieImageTransformer2DModel"):
        pipe.load_lora_weights(adapter("lumina2", only="attn.to_q"), adapter_name="a")
    assert differences(before, snapshot(pipe)) == []


def test_a_lora_loaded_after_quantizing_counts_beside_fused_layers_and_stays_when_the_quantization_goes() -> None:
    stock, pipe = made("ernie"), made("ernie")
    plain = latents(stock)
    ernie_accel.optimize(pipe, RewriteBlocks(), Quantize("int8-weight-only"))
    quantized = latents(pipe)
    for each in (pipe, stock):
        load(each, "ernie")
    expected = latents(stock)
    assert sqnr_db(latents(pipe), expected) > max(25, sqnr_db(plain, expected) + 6)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), quantized)
    pipe.enable_lora()
    assert torch.equal(latents(ernie_accel.restore(pipe)), expected)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize(
    ("family", "argument"), [("z_image", "joint_attention_kwargs"), ("lumina2", "attention_kwargs")]
)
def test_the_scale_of_a_call_counts_for_that_call(family: str, argument: str) -> None:
    pipe, stock = fused(made(family)), made(family)
    for each in (pipe, stock):
        load(each, family)
    recorder = graphed(pipe)
    whole = latents(pipe)
    if argument not in inspect.signature(type(pipe).__call__).parameters:
        argument = "cross_attention_kwargs"
    call = {argument: {"scale": 0.3}}
    got, expected = (picture(each, output_type="latent", steps=2, **call) for each in (pipe, stock))
    assert sqnr_db(got, expected) > max(10, sqnr_db(latents(stock), expected) + 6)
    assert torch.equal(latents(pipe), whole)
    assert recorder.captures >= 1


def test_compiled_blocks_are_one_graph_with_a_lora_and_see_swaps() -> None:
    torch._dynamo.reset()
    pipe, eager = fused(made("ernie")), fused(made("ernie"))
    for each in (pipe, eager):
        load(each, "ernie")
        load(each, "ernie", "b", seed=2)
        each.set_adapters(["a"])
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(latents(pipe), latents(eager))
    with torch.compiler.set_stance("fail_on_recompile"):
        for each in (pipe, eager):
            each.set_adapters(["b"], [0.5])
        assert torch.equal(latents(pipe), latents(eager))
    torch._dynamo.reset()


def test_a_lora_counts_under_autocast_and_where_weights_are_moved_and_with_cached_steps() -> None:
    pipe = ernie_accel.optimize(tiny_ernie(), RewriteBlocks(), Quantize("int8-weight-only"))
    load(pipe, "ernie")
    expected = latents(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert sqnr_db(latents(pipe), expected) > 25
    moved = fused(made("ernie"))
    load(moved, "ernie")
    expected = latents(moved)
    moved.enable_model_cpu_offload(device="cpu")
    assert torch.equal(latents(moved), expected)
    moved.set_adapters(["a"], [0.1])
    assert not torch.equal(latents(moved), expected)


def shared_products(pipe: Any) -> list[bool]:
    """Return of each part of the rewritten blocks whether its layers are one product."""
    return [part.fused is not None for part in adaptables(pipe.transformer)]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_were_split_for_a_lora_are_one_product_again_without_it(
    family: str, quantized: bool, tmp_path: Path
) -> None:
    pipe = made(family)
    ernie_accel.optimize(pipe, RewriteBlocks(), *([Quantize("int8-weight-only")] if quantized else []))
    before, fused = latents(pipe), shared_products(pipe)
    load(pipe, family, "a")
    assert shared_products(pipe) != fused
    pipe.unload_lora_weights()
    assert shared_products(pipe) == fused
    assert torch.equal(latents(pipe), before)
    ernie_accel.save(pipe, tmp_path / "saved")
    assert torch.equal(latents(ernie_accel.load(tmp_path / "saved")), before)


def test_layers_that_a_script_has_hooked_stay_as_they_are() -> None:
    pipe = made("ernie")
    ernie_accel.optimize(pipe, RewriteBlocks())
    load(pipe, "ernie", "a")
    calls: list[int] = []
    layer = pipe.transformer.layers[0].self_attention.to_q.base_layer
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.unload_lora_weights()
    latents(pipe)
    assert calls
    assert shared_products(pipe).count(False) == 1


def test_layers_that_were_not_fused_are_not_fused_by_a_lora() -> None:
    pipe = made("ernie")
    ernie_accel.optimize(pipe, RewriteBlocks(fuse=False))
    load(pipe, "ernie", "a")
    pipe.unload_lora_weights()
    assert not any(shared_products(pipe))
