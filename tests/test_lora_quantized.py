"""LoRAs beside what `Quantize` made, by every backend, on stock and rewritten blocks; what fails changes nothing."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import CastDtype, Compile, ErnieAccelError, Quantize, RewriteBlocks
from ernie_accel.core.captured import mark_as_coming_and_going, plain_tensors
from ernie_accel.core.transform import LayerReceipt
from ernie_accel.quantization.layers import RECEIPT
from ernie_accel.quantization.merging import held_by
from ernie_accel.quantization.shown_plain import shown_as_plain
from ernie_accel.quantization.torchao import TorchAO
from tests.examples import differences, snapshot
from tests.test_fuse_kernels import sqnr_db
from tests.test_lora import CALLS, FORMATS, TO_Q, adapter, fused, latents, load, made

LAYERS = {
    "torchao": Quantize("int8-weight-only", backend="torchao"),
    "quanto": Quantize("int8-weight-only", backend="quanto"),
    "layerwise": Quantize("fp8-weight-only", backend="layerwise"),
    "gguf": Quantize("gguf-q8_0"),
    "bitsandbytes": Quantize("int8", backend="bitsandbytes"),
    "4 bits": Quantize("nf4"),
    "corrected": Quantize("nf4", correction_rank=4),
}


def quantized(name: str, family: str = "ernie", *, rewritten: bool = False) -> Any:
    return ernie_accel.optimize(made(family), *((RewriteBlocks(),) if rewritten else ()), LAYERS[name])


@pytest.mark.parametrize("family", ["ernie", pytest.param("z_image", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rewritten", [False, True], ids=["stock blocks", "rewritten"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_call_does_what_it_does_on_a_stock_pipe(name: str, rewritten: bool, family: str) -> None:
    pipe, stock = quantized(name, family, rewritten=rewritten), made(family)
    plain, before = latents(stock), latents(pipe)
    floor = sqnr_db(before, plain)
    for each in (pipe, stock):
        load(each, family)
    for call in (None, *CALLS.values()):
        for each in (pipe, stock):
            if call is not None:
                call(each, family)
        assert sqnr_db(latents(pipe), latents(stock)) > floor - 6
    for each in (pipe, stock):
        each.unload_lora_weights()
    # Fusing and unfusing has rounded what is not quantized twice, and all layers of the stock pipe.
    assert sqnr_db(latents(pipe), latents(stock)) > floor - 6
    assert sqnr_db(latents(ernie_accel.restore(pipe)), latents(stock)) > 35


@pytest.mark.parametrize("rewritten", [False, True], ids=["stock blocks", "rewritten"])
@pytest.mark.parametrize("name", LAYERS)
def test_without_a_lora_everything_is_as_before_bit_for_bit(name: str, rewritten: bool) -> None:
    pipe = quantized(name, rewritten=rewritten)
    plain, before = latents(made("ernie")), latents(pipe)
    load(pipe, "ernie")
    assert not torch.equal(latents(pipe), before)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), before)
    assert torch.equal(latents(ernie_accel.restore(pipe)), plain)


#: Every scheme that the CPU can multiply by; it has no product in fp8.
SCHEMES = {
    **LAYERS,
    "torchao fp8": Quantize("fp8-weight-only", backend="torchao"),
    "torchao int8": Quantize("int8", backend="torchao"),
    "quanto fp8": Quantize("fp8-weight-only", backend="quanto"),
    "bitsandbytes fp4": Quantize("fp4"),
    "gguf-q5_0": Quantize("gguf-q5_0"),
    "gguf-q4_0": Quantize("gguf-q4_0"),
    "int8 corrected": Quantize("int8-weight-only", backend="torchao", correction_rank=4),
}


def contents(pipe: Any) -> list[torch.Tensor]:
    """Return copies of what the quantized layers hold, in their order."""
    found = [layer for layer in pipe.transformer.modules() if RECEIPT.of(layer) is not None]
    return [tensor.clone() for layer in found for held in held_by(layer) for tensor in plain_tensors(held)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("rewritten", [False, True], ids=["stock blocks", "rewritten"])
@pytest.mark.parametrize("name", SCHEMES)
def test_fused_is_as_close_as_the_scheme_and_unfused_is_what_it_was(
    name: str, rewritten: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite = (RewriteBlocks(),) if rewritten else ()
    pipe, stock = ernie_accel.optimize(made("ernie"), *rewrite, SCHEMES[name]), made("ernie")
    floor, before = sqnr_db(latents(pipe), latents(stock)), contents(pipe)
    quantized_first = ernie_accel.report(pipe).entries[-1].applied
    assert quantized_first is not None
    receipts = [each for each in quantized_first.details if isinstance(each, LayerReceipt)]
    caplog.set_level("INFO", "ernie_accel")
    for each in (pipe, stock):
        load(each, "ernie")
        load(each, "ernie", "b", seed=2, rank=6, only="to_")
        each.set_adapters(["a", "b"], [1.0, 0.5])
        each.fuse_lora(lora_scale=0.8, safe_fusing=True, adapter_names=["a"])
        each.fuse_lora(adapter_names=["a", "b"])  # one of them is there
    (first, second) = [r.getMessage() for r in caplog.records if "weights were made anew" in r.getMessage()]
    logged = re.fullmatch(
        r"fuse_lora: (\d+) quantized weights were made anew, with an SQNR of (.*) dB, (.*) at least, against .*", first
    )
    assert logged is not None
    assert int(logged[1]) == len(receipts)
    assert abs(float(logged[3]) - min(each.sqnr_db for each in receipts)) < 1.5
    assert "against the merged ones" in second
    assert not same(contents(pipe), before)
    assert sqnr_db(latents(pipe), latents(stock)) > floor - 6
    for each in (pipe, stock):
        each.unfuse_lora()
        each.set_adapters(["b"])
    assert same(contents(pipe), before)
    assert sqnr_db(latents(pipe), latents(stock)) > floor - 6


@pytest.mark.parametrize("name", SCHEMES)
def test_a_lora_for_quantized_layers_alone_leaves_no_trace_when_it_is_unfused(name: str) -> None:
    pipe = ernie_accel.optimize(made("ernie"), SCHEMES[name])
    before = latents(pipe)
    load(pipe, "ernie", only="layers.1.")
    beside = latents(pipe)
    pipe.fuse_lora()
    assert not torch.equal(latents(pipe), before)
    pipe.disable_lora()  # PEFT takes it out at the next call
    assert torch.equal(latents(pipe), before)
    pipe.enable_lora()
    assert torch.equal(latents(pipe), beside)
    pipe.fuse_lora()
    pipe.transformer.unfuse_lora()
    assert torch.equal(latents(pipe), beside)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize("rewritten", [False, True], ids=["stock blocks", "rewritten"])
@pytest.mark.parametrize("name", ["torchao", "layerwise", "corrected"])
def test_a_merged_lora_stays_when_it_is_unloaded_merged_beside_another_saved_and_restored(
    name: str, rewritten: bool, tmp_path: Any
) -> None:
    pipe, stock = quantized(name, rewritten=rewritten), made("ernie")
    floor = sqnr_db(latents(pipe), latents(stock))
    for each in (pipe, stock):
        load(each, "ernie")
        each.fuse_lora()
        each.unload_lora_weights()
    merged = contents(pipe)
    assert sqnr_db(latents(pipe), latents(stock)) > floor - 6
    for each in (pipe, stock):
        load(each, "ernie", seed=4)  # another of the same name
        each.fuse_lora()
        each.unfuse_lora()
    assert same(contents(pipe), merged)
    for each in (pipe, stock):
        each.delete_adapters("a")
        each.unload_lora_weights()
    if not rewritten:
        again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"), device="cpu")
        assert torch.equal(latents(again), latents(pipe))
    assert sqnr_db(latents(pipe), latents(stock)) > floor - 6
    assert sqnr_db(latents(ernie_accel.restore(pipe)), latents(stock)) > 35


@pytest.mark.parametrize("rewritten", [False, True], ids=["stock blocks", "rewritten"])
@pytest.mark.parametrize("name", LAYERS)
def test_restore_leaves_a_fused_lora_fused(name: str, rewritten: bool) -> None:
    pipe, stock = quantized(name, rewritten=rewritten), made("ernie")
    for each in (pipe, stock):
        load(each, "ernie")
        each.fuse_lora()
    ernie_accel.restore(pipe)
    assert torch.equal(latents(pipe), latents(stock))
    for each in (pipe, stock):
        each.unfuse_lora()
    assert torch.equal(latents(pipe), latents(stock))


def without_originals(rewritten: bool) -> Any:
    transform = Quantize("int8-weight-only", keep_originals=False)
    return ernie_accel.optimize(made("ernie"), *((RewriteBlocks(),) if rewritten else ()), transform)


def broken(pipe: Any) -> Any:
    load(pipe, "ernie")
    for path, part in pipe.transformer.named_modules():
        if path.endswith("layers.1.mlp.linear_fc2.lora_A.a"):
            part.weight.data[0, 0] = float("inf")
    return pipe


def with_dora(pipe: Any) -> Any:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(target_modules=["linear_fc2"], use_dora=True), "a")
    return pipe


def with_bias(pipe: Any) -> Any:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(target_modules=["linear_fc2"], lora_bias=True), "a")
    return pipe


def merged_before() -> Any:
    pipe = made("ernie")
    load(pipe, "ernie", "b", seed=2)
    load(pipe, "ernie")
    pipe.fuse_lora(adapter_names=["b"])
    return ernie_accel.optimize(pipe, LAYERS["torchao"])


def elsewhere(pipe: Any) -> Any:
    load(pipe, "ernie")
    layer = next(part for part in pipe.transformer.modules() if RECEIPT.of(part) is not None)
    for tensor in held_by(layer):
        mark_as_coming_and_going(tensor, True)
    return pipe


UNMERGEABLE = {
    "elsewhere": (lambda: elsewhere(quantized("4 bits")), "its weight is kept elsewhere between calls"),
    "originals gone": (lambda: loaded(without_originals(False)), "what it was quantized from is gone"),
    "originals gone, rewritten": (lambda: loaded(without_originals(True)), "what it was quantized from is gone"),
    "a copy": (lambda: copy.deepcopy(loaded(quantized("gguf"))), "what it was quantized from is gone"),
    "merged before": (merged_before, "a LoRA was merged into it before it was quantized"),
    "not finite": (lambda: broken(quantized("4 bits")), "'a' has values that are not finite"),
    "DoRA": (lambda: with_dora(quantized("torchao")), "'a' is a variant of LoRA, such as DoRA"),
    "bias": (lambda: with_bias(quantized("gguf")), "'a' has a bias"),
}


def loaded(pipe: Any) -> Any:
    load(pipe, "ernie")
    return pipe


@pytest.mark.parametrize("what", UNMERGEABLE)
def test_what_cannot_be_merged_is_refused_before_anything_changes(what: str) -> None:
    make, message = UNMERGEABLE[what]
    pipe = make()
    before, drawn = snapshot(pipe), contents(pipe)
    for call in (pipe.fuse_lora, pipe.transformer.fuse_lora):
        with pytest.raises(ErnieAccelError, match=f"quantized weights; nothing was changed .*{message}"):
            call()
        assert differences(before, snapshot(pipe)) == []
        assert same(contents(pipe), drawn)


def adapted_state(pipe: Any) -> list[tuple[list[str], dict[str, float]]]:
    """Return what PEFT's layers have merged, and their scales."""
    layers = [part for part in pipe.transformer.modules() if "base_layer" in part._modules]
    return [(list(layer.merged_adapters), dict(layer.scaling)) for layer in layers]


def test_what_fails_again_while_it_is_taken_back_leaves_every_layer_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = quantized("torchao")
    load(pipe, "ernie", only="layers.1.")
    beside, drawn, calls = latents(pipe), contents(pipe), []
    quantize = TorchAO.quantize

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) >= 3:
            raise RuntimeError("out of luck")
        return quantize(*args)

    with monkeypatch.context() as patch:
        patch.setattr(TorchAO, "quantize", fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            pipe.fuse_lora()
    merged = [bool(names) for names, _ in adapted_state(pipe)]
    assert 0 < merged.count(True) < len(merged)
    assert sqnr_db(latents(pipe), beside) > 20
    pipe.unfuse_lora()
    assert same(contents(pipe), drawn)
    assert torch.equal(latents(pipe), beside)


def test_while_an_adapter_is_added_another_thread_draws_what_it_drew() -> None:
    pipe = quantized("4 bits")
    before = latents(pipe)
    with shown_as_plain(pipe.transformer) as shown:
        assert shown
        assert torch.equal(latents(pipe), before)


def test_what_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = quantized("torchao", rewritten=True)
    load(pipe, "ernie", only="layers.1.")
    adapters, drawn = adapted_state(pipe), contents(pipe)
    quantize, calls, made_anew = TorchAO.quantize, [], []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return quantize(*args)

    with monkeypatch.context() as patch:
        patch.setattr(TorchAO, "quantize", fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            pipe.fuse_lora(lora_scale=0.5)
    assert same(contents(pipe), drawn)
    assert adapted_state(pipe) == adapters
    with monkeypatch.context() as patch:
        patch.setattr(TorchAO, "quantize", lambda *args: made_anew.append(args) or quantize(*args))
        pipe.fuse_lora(lora_scale=0.5)
    modules = pipe.transformer.named_modules()
    products = [part for path, part in modules if path.startswith("layers.1.") and RECEIPT.of(part) is not None]
    assert len(made_anew) == len(products)  # once, and not for each layer that is a part of it
    assert not same(contents(pipe), drawn)


def test_quantizing_anew_keeps_a_fused_lora() -> None:
    pipe, stock = quantized("torchao"), made("ernie")
    for each in (pipe, stock):
        load(each, "ernie")
        each.fuse_lora()
        each.unload_lora_weights()
    ernie_accel.optimize(pipe, LAYERS["gguf"])
    assert torch.equal(latents(pipe), latents(ernie_accel.optimize(stock, LAYERS["gguf"])))


@pytest.mark.parametrize("name", LAYERS)
def test_a_lora_that_is_there_when_the_quantization_goes_stays(name: str) -> None:
    pipe, stock = quantized(name, rewritten=True), made("ernie")
    for each in (pipe, stock):
        load(each, "ernie")
    assert torch.equal(latents(ernie_accel.restore(pipe)), latents(stock))


def test_a_saved_pipe_takes_a_lora(tmp_path: Any) -> None:
    pipe = quantized("4 bits", rewritten=True)
    again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"), device="cpu")
    for each in (pipe, again):
        load(each, "ernie")
    assert torch.equal(latents(pipe), latents(again))


def named(family: str, form: str) -> dict[str, torch.Tensor]:
    """Return the LoRA of `adapter` by the names that others give."""
    weights = {}
    for key, tensor in adapter(family).items():
        path, half = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".lora_", 1)
        weights[FORMATS[form](path, half)] = tensor
    return weights


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("ernie", "kohya"),
        ("ernie", "ComfyUI, down and up"),
        ("z_image", "PEFT"),
        ("lumina2", "PEFT"),
        ("lumina2", "kohya"),
        ("lumina2", "ComfyUI"),
    ],
)
@pytest.mark.parametrize("way", ["quantized", "rewritten", "saved"])
def test_every_trainers_names_are_read(family: str, form: str, way: str, tmp_path: Any) -> None:
    def prepared() -> Any:
        if way == "rewritten":
            return ernie_accel.optimize(made(family), RewriteBlocks())
        pipe = quantized("torchao", family)
        return pipe if way == "quantized" else ernie_accel.load(ernie_accel.save(pipe, tmp_path), device="cpu")

    expected = prepared()
    load(expected, family)
    pipe = prepared()
    pipe.load_lora_weights(named(family, form), adapter_name="a")
    assert torch.equal(latents(pipe), latents(expected))
    if way != "saved":
        ernie_accel.restore(pipe)
        assert "lora_state_dict" not in vars(pipe)


def test_names_of_a_checkpoints_authors_are_left_to_diffusers() -> None:
    """Z-Image's fuses queries, keys and values; diffusers splits them."""
    weights = {}
    for key, tensor in adapter("z_image", only="layers.0.attention.to_q").items():
        half = key.removesuffix(".weight")[-1]
        name = f"lora_unet_layers_0_attention_qkv.lora_{'down' if half == 'A' else 'up'}.weight"
        weights[name] = tensor if half == "A" else torch.cat([tensor] * 3)
    pipe = ernie_accel.optimize(made("z_image"), RewriteBlocks())
    pipe.load_lora_weights(weights, adapter_name="a")
    loaded = [path for path, part in pipe.transformer.named_modules() if "a" in getattr(part, "lora_A", ())]
    assert loaded == [f"layers.0.attention.to_{each}" for each in "qkv"]


def whole(extra: dict[str, torch.Tensor], *, without: str = "") -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in {**adapter("ernie"), **extra}.items() if name != without}


WRONG = {
    "half": (whole({}, without=f"transformer.{TO_Q}.lora_B.weight"), rf"{TO_Q} has lora_A, and no lora_B"),
    "inputs": (whole({f"transformer.{TO_Q}.lora_A.weight": torch.ones(4, 131)}), "has 128 inputs, and its LoRA 131"),
    "outputs": (whole({f"transformer.{TO_Q}.lora_B.weight": torch.ones(99, 4)}), "has 128 outputs, and its LoRA 99"),
    "ranks": (
        whole({f"transformer.{TO_Q}.lora_A.weight": torch.ones(3, 128)}),
        rf"halves of {TO_Q} have ranks 3 and 4",
    ),
}
OPTIMIZED = {
    "rewritten": lambda: ernie_accel.optimize(made("ernie"), RewriteBlocks()),
    "quantized": lambda: quantized("torchao"),
    "both": lambda: quantized("4 bits", rewritten=True),
    "kernels": lambda: fused(made("ernie")),
}


@pytest.mark.parametrize("how", OPTIMIZED)
@pytest.mark.parametrize("what", WRONG)
def test_a_lora_that_fits_no_layer_or_half_of_it_is_refused_before_anything_changes(what: str, how: str) -> None:
    weights, message = WRONG[what]
    pipe = OPTIMIZED[how]()
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match=rf"nothing was changed\.\n.*{message}"):
        pipe.load_lora_weights(dict(weights), adapter_name="a")
    assert differences(before, snapshot(pipe)) == []
    load(pipe, "ernie")


VARIANTS = {
    "DoRA": {
        name.replace("lora_B", "lora_magnitude_vector"): torch.ones(len(tensor))
        for name, tensor in adapter("ernie").items()
        if "lora_B" in name
    },
    "LoKr": {f"transformer.{TO_Q}.lokr_w1": torch.ones(4, 4), f"transformer.{TO_Q}.lokr_w2": torch.ones(32, 32)},
}


@pytest.mark.parametrize("what", VARIANTS)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "torchao"])
def test_what_reads_weights_is_refused_by_layers_that_have_none_for_it(name: str, what: str) -> None:
    pipe = quantized(name)
    weights = VARIANTS[what] if what == "LoKr" else {**adapter("ernie"), **VARIANTS[what]}
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match=f"it is a {what} .* take plain LoRAs only"):
        pipe.transformer.load_lora_adapter(dict(weights), adapter_name="a")
    assert differences(before, snapshot(pipe)) == []


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("name", ["layerwise", "4 bits"])
def test_a_configuration_that_reads_weights_is_refused_by_layers_that_have_none(
    name: str, settings: dict[str, Any]
) -> None:
    from peft import LoraConfig

    pipe = quantized(name)
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match="add_adapter: cannot load this adapter; nothing was changed"):
        pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"], **settings))
    assert differences(before, snapshot(pipe)) == []


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
def test_what_is_no_lora_is_refused_by_name(kind: str) -> None:
    names = {"LoKr": ("lokr_w1", "lokr_w2"), "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}[kind]
    weights = {f"lora_unet_{TO_Q.replace('.', '_')}.{name}": torch.ones(4, 4) for name in names}
    pipe = quantized("torchao")
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match=f"this is a {kind} .* does not load by these names; nothing was changed"):
        pipe.load_lora_weights(weights)
    assert differences(before, snapshot(pipe)) == []


@pytest.mark.parametrize("beside", [False, True], ids=["the first", "beside another"])
@pytest.mark.parametrize("how", OPTIMIZED)
def test_what_peft_fails_at_half_way_changes_nothing(how: str, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    pipe = OPTIMIZED[how]()
    if beside:
        load(pipe, "ernie", "first", seed=5)
    expected = latents(pipe)
    before = snapshot(pipe)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(peft, "set_peft_model_state_dict", fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            load(pipe, "ernie")
    if how == "rewritten":  # its layers were split and fused again
        assert [name for name, _ in pipe.transformer.named_modules() if "lora" in name and not beside] == []
    else:
        assert differences(before, snapshot(pipe)) == []
    assert torch.equal(latents(pipe), expected)
    load(pipe, "ernie")
    assert not torch.equal(latents(pipe), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_quantizing_twice_is_quantizing_once(name: str) -> None:
    """Its methods are put over one another: none of them may look as if a script had replaced it."""
    pipe = quantized(name)
    before = snapshot(pipe)
    ernie_accel.optimize(pipe, LAYERS[name])
    assert differences(before, snapshot(pipe)) == []


def test_a_dora_that_compiled_blocks_cannot_trace_is_refused_before_and_after() -> None:
    weights = dict(adapter("ernie"))
    for name, up in adapter("ernie").items():
        if ".lora_B." in name:
            weights[name.replace("lora_B", "lora_magnitude_vector")] = torch.ones(len(up))
    pipe = ernie_accel.optimize(made("ernie"), Compile())
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match=r"to_q gets a DoRA, .* nothing was changed"):
        pipe.load_lora_weights(dict(weights), adapter_name="a")
    assert differences(before, snapshot(pipe)) == []
    ernie_accel.restore(pipe).load_lora_weights(dict(weights), adapter_name="a")
    (reason,) = ernie_accel.plan(pipe, Compile()).steps[0].reasons
    assert "has a DoRA, which torch.compile cannot trace in a full graph" in reason
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not ernie_accel.plan(pipe, Compile()).steps[0].reasons


def test_unfusing_what_is_not_fused_is_a_no_op_as_on_a_stock_pipe() -> None:
    for pipe in (quantized("torchao", rewritten=True), fused(made("ernie"), keep_originals=False)):
        load(pipe, "ernie")
        expected = latents(pipe)
        pipe.unfuse_lora()
        assert torch.equal(latents(pipe), expected)


def test_loras_come_after_a_cast_and_a_quantization_in_the_presets_that_do_not_rewrite() -> None:
    preset = ernie_accel.presets["turbo-q4"]
    transforms = [each for each in preset.transforms if isinstance(each, (CastDtype, Quantize))]
    pipe = ernie_accel.optimize(made("ernie"), *transforms)
    before = latents(pipe)
    pipe.load_lora_weights(named("ernie", "kohya"), adapter_name="a")
    assert not torch.equal(latents(pipe), before)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), before)
