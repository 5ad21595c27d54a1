"""A LoRA of which a part matches no layer is refused with that part counted, whatever has optimized the pipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ernie_accel
from ernie_accel import ErnieAccelError, Quantize, RewriteBlocks
from tests.examples import differences, snapshot
from tests.pipelines import tiny_flux, tiny_sd, tiny_wan
from tests.test_lora import fused, made

INT8 = Quantize("int8-weight-only", backend="torchao", exclude=())


def quantized_unet() -> Any:
    pipe = tiny_sd()
    pipe.unet.to(torch.bfloat16)
    return ernie_accel.optimize(pipe, Quantize("int8-weight-only", backend="torchao", components=("unet",)))


def as_saved(folder: Path) -> Any:
    return ernie_accel.load(ernie_accel.save(ernie_accel.optimize(made("ernie"), INT8), folder / "saved"))


#: What has optimized a pipe; the name of its denoiser.
OPTIMIZED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rewritten": (lambda folder: ernie_accel.optimize(made("ernie"), RewriteBlocks()), "transformer"),
    "quantized": (lambda folder: ernie_accel.optimize(made("ernie"), INT8), "transformer"),
    "both": (lambda folder: ernie_accel.optimize(made("ernie"), RewriteBlocks(), INT8), "transformer"),
    "quantized, then rewritten": (
        lambda folder: ernie_accel.optimize(ernie_accel.optimize(made("ernie"), INT8), RewriteBlocks()),
        "transformer",
    ),
    "kernels": (lambda folder: fused(made("ernie")), "transformer"),
    "saved": (as_saved, "transformer"),
    "z_image": (lambda folder: ernie_accel.optimize(made("z_image"), RewriteBlocks()), "transformer"),
    "lumina2": (lambda folder: ernie_accel.optimize(made("lumina2"), RewriteBlocks()), "transformer"),
    "flux": (lambda folder: ernie_accel.optimize(tiny_flux(), INT8), "transformer"),
    "wan": (lambda folder: ernie_accel.optimize(tiny_wan(), INT8), "transformer"),
    "unet": (lambda folder: quantized_unet(), "unet"),
}
STOCK: dict[str, Callable[[], Any]] = {
    "z_image": lambda: made("z_image"),
    "lumina2": lambda: made("lumina2"),
    "flux": tiny_flux,
    "wan": tiny_wan,
    "unet": tiny_sd,
}


def adapter(how: str, component: str) -> dict[str, torch.Tensor]:
    """Return a LoRA of rank 2 for every linear layer of a stock model."""
    stock = STOCK[how]() if how in STOCK else made("ernie")
    tensors = {}
    for path, layer in getattr(stock, component).named_modules():
        if isinstance(layer, nn.Linear):
            for half, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                tensors[f"{component}.{path}.lora_{half}.weight"] = torch.full(shape, 0.01)
    return tensors


@pytest.mark.parametrize("how", OPTIMIZED)
def test_a_part_that_matches_nothing_is_counted_and_nothing_is_changed(how: str, tmp_path: Path) -> None:
    make, component = OPTIMIZED[how]
    pipe = make(tmp_path)
    weights = adapter(how, component)
    strange = {f"{component}.layers.9.strange.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    before = snapshot(pipe)
    refusal = (
        rf"load_lora_adapter: .*\n.* 2 of its {len(weights) + 2} tensors match no layer of \w+: layers\.9\.strange"
    )
    with pytest.raises(ErnieAccelError, match=refusal):
        pipe.load_lora_weights({**weights, **strange}, adapter_name="a")
    assert differences(before, snapshot(pipe)) == []
    pipe.load_lora_weights(weights, adapter_name="a")
    loaded = [part for part in getattr(pipe, component).modules() if "a" in getattr(part, "lora_A", ())]
    assert len(loaded) == len(weights) // 2
    pipe.unload_lora_weights()
    if how != "saved":  # which has no originals
        ernie_accel.restore(pipe)


def test_older_names_of_diffusers_match(tmp_path: Path) -> None:
    pipe = quantized_unet()
    new = {name: tensor for name, tensor in adapter("unet", "unet").items() if ".attn1.to_q." in name}
    old = {}
    for name, tensor in new.items():
        for half, way in (("lora_A", "down"), ("lora_B", "up")):
            name = name.replace(f".attn1.to_q.{half}.", f".attn1.processor.to_q_lora.{way}.")
        old[name] = tensor
    assert old.keys().isdisjoint(new)
    pipe.unet.load_lora_adapter(old, prefix="unet", adapter_name="a")
    loaded = [part for part in pipe.unet.modules() if "a" in getattr(part, "lora_A", ())]
    assert len(loaded) == len(new) // 2 > 0
    strange = {f"unet.x.processor.to_q_lora.{way}.weight": torch.ones(2, 2) for way in ("down", "up")}
    with pytest.raises(ErnieAccelError, match=f"2 of its {len(old) + 2} tensors match no layer of UNet2DCondition"):
        pipe.unet.load_lora_adapter({**old, **strange}, prefix="unet", adapter_name="b")


def test_a_lora_of_the_text_encoder_alone_is_no_concern_of_a_quantized_denoiser() -> None:
    """A pipe gives the denoiser all tensors, and those of its text encoder to that."""
    pipe = quantized_unet()
    names = {f"text_encoder.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    pipe.load_lora_into_unet(dict(names), None, pipe.unet, adapter_name="a", _pipeline=pipe)
    assert not hasattr(pipe.unet, "peft_config")
    with pytest.raises(ErnieAccelError, match=r"none of its 2 tensors begins with 'unet\.'"):
        pipe.unet.load_lora_adapter(dict(names), prefix="unet")


@pytest.mark.parametrize("how", ["rewritten", "quantized", "both", "kernels"])
def test_tensors_for_components_that_the_pipe_loads_none_for_are_counted_once_in_the_log(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = OPTIMIZED[how][0](tmp_path)
    weights = adapter(how, "transformer")
    pipe.load_lora_weights(dict(weights), adapter_name="a")
    assert "left out" not in caplog.text
    others = {f"text_encoder.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    pipe.load_lora_weights({**weights, **others}, adapter_name="b")
    expected = f"loads LoRAs of transformer only: 2 of {len(weights) + 2} tensors are left out, such as text_encoder.x"
    assert caplog.text.count(expected) == 1
