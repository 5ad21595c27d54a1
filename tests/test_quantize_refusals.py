"""What stock tools would do to quantized layers and get wrong is refused before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

import ernie_accel
from ernie_accel import ErnieAccelError, Quantize
from tests.examples import differences, snapshot
from tests.pipelines import picture, tiny_ernie

QUANTIZED = (
    Quantize("int8-weight-only", backend="torchao"),
    Quantize("int8-weight-only", backend="quanto"),
    Quantize("fp8-weight-only", backend="layerwise"),
    Quantize("gguf-q8_0"),
    Quantize("int8", backend="bitsandbytes"),
    Quantize("nf4"),
)
each_backend = pytest.mark.parametrize("transform", QUANTIZED, ids=repr)


def half():
    return tiny_ernie(dtype=torch.bfloat16)


def lora():
    torch.manual_seed(0)
    return LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)


@each_backend
def test_save_pretrained_is_refused_and_names_what_saves(transform, tmp_path):
    pipe = ernie_accel.optimize(half(), transform)
    copies = [copy.deepcopy(pipe)] if transform.scheme == "nf4" else []  # layers of some packages cannot be copied
    refusal = r"save_pretrained: its weights are quantized.*ernie_accel.save\(pipe"
    for owner in (pipe, pipe.transformer, *copies):
        with pytest.raises(ErnieAccelError, match=refusal):
            owner.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    pipe.vae.save_pretrained(tmp_path / "vae")  # is not quantized
    again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"))
    with pytest.raises(ErnieAccelError, match="save_pretrained"):
        again.transformer.save_pretrained(tmp_path / "plain")
    ernie_accel.restore(pipe).save_pretrained(tmp_path / "stock")
    assert (tmp_path / "stock" / "transformer" / "config.json").is_file()


@each_backend
def test_a_lora_afterwards_works_or_is_refused_with_the_pipe_as_it_was(transform, tmp_path):
    stock = half()
    plain = picture(stock, output_type="latent")
    stock.transformer.add_adapter(lora())
    moved = picture(stock, output_type="latent") - plain
    stock.transformer.save_lora_adapter(tmp_path)
    original = half()
    assert torch.equal(picture(original, output_type="latent"), plain)
    before = snapshot(original)
    pipe = ernie_accel.optimize(original, transform)
    quantized = picture(pipe, output_type="latent")
    as_quantized = snapshot(pipe)
    file = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": None}
    if transform.backend in ("torchao", "quanto") or transform.scheme.startswith("gguf"):
        pipe.transformer.load_lora_adapter(str(tmp_path), **file)
        found = picture(pipe, output_type="latent") - quantized
        assert (found - moved).norm() < 0.5 * moved.norm()
        with pytest.raises(ErnieAccelError, match="cannot merge a LoRA into quantized weights"):
            pipe.transformer.fuse_lora()
        pipe.transformer.unload_lora()
        assert torch.equal(picture(pipe, output_type="latent"), quantized)
        ernie_accel.restore(pipe)
    else:
        for add in (
            lambda: pipe.transformer.load_lora_adapter(str(tmp_path), **file),
            lambda: pipe.transformer.add_adapter(lora()),
        ):
            with pytest.raises(ErnieAccelError, match="Load the LoRA before quantizing"):
                add()
        assert differences(as_quantized, snapshot(pipe)) == []
        ernie_accel.restore(pipe)
        assert differences(before, snapshot(pipe)) == []
    assert torch.equal(picture(pipe, output_type="latent"), plain)
    pipe.transformer.add_adapter(lora())
    assert torch.equal(picture(pipe, output_type="latent") - plain, moved)
