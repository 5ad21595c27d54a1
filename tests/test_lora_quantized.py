"""LoRAs beside what `Quantize` made, by every backend, on stock and rewritten blocks; what fails changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import CastDtype, Compile, ErnieAccelError, Quantize, RewriteBlocks
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
#: Not those that need kernels, on which the quantized product cannot be made anew.
WITHOUT_MERGING = {name: call for name, call in CALLS.items() if name not in ("fuse", "unfuse")}


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
    for call in (None, *WITHOUT_MERGING.values()):
        for each in (pipe, stock):
            if call is not None:
                call(each, family)
        assert sqnr_db(latents(pipe), latents(stock)) > floor - 6
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), before)
    assert torch.equal(latents(ernie_accel.restore(pipe)), plain)


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
    "DoRA": {f"transformer.{TO_Q}.lora_magnitude_vector.weight": torch.ones(128)},
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
    with pytest.raises(ErnieAccelError, match=f"this is a {kind} .* loads LoRAs only; nothing was changed"):
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
