"""What stock tools would do to quantized layers and get wrong is refused before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

import ernie_accel
from ernie_accel import CastDtype, ErnieAccelError, Quantize, RewriteBlocks
from ernie_accel.quantization.choose import BACKENDS
from tests.examples import differences, snapshot
from tests.pipelines import picture, tiny_ernie, tiny_flux, tiny_z_image

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
def test_a_lora_afterwards_works_and_goes_again(transform, tmp_path):
    stock = half()
    plain = picture(stock, output_type="latent")
    stock.transformer.add_adapter(lora())
    moved = picture(stock, output_type="latent") - plain
    stock.transformer.save_lora_adapter(tmp_path)
    original = half()
    assert torch.equal(picture(original, output_type="latent"), plain)
    pipe = ernie_accel.optimize(original, transform)
    quantized = picture(pipe, output_type="latent")
    file = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": None}
    for add in (
        lambda: pipe.transformer.load_lora_adapter(str(tmp_path), **file),
        lambda: pipe.transformer.add_adapter(lora()),
    ):
        add()
        found = picture(pipe, output_type="latent") - quantized
        assert (found - moved).norm() < 0.5 * moved.norm()
        pipe.transformer.unload_lora()
        assert torch.equal(picture(pipe, output_type="latent"), quantized)
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe, output_type="latent"), plain)
    pipe.transformer.add_adapter(lora())
    assert torch.equal(picture(pipe, output_type="latent") - plain, moved)


@pytest.mark.parametrize("transform", [t for t in QUANTIZED if t.backend != "layerwise"], ids=repr)
def test_plain_weights_are_refused_before_any_is_loaded_and_its_own_are_taken(transform):
    plain = half().transformer.state_dict()
    pipe = ernie_accel.optimize(half(), transform)
    expected, before = picture(pipe, output_type="latent"), snapshot(pipe)
    with pytest.raises(ErnieAccelError, match=r"load_state_dict: layers\.\d.* is quantized"):
        pipe.transformer.load_state_dict({name: tensor * 2 for name, tensor in plain.items()})
    assert differences(before, snapshot(pipe)) == []
    pipe.transformer.load_state_dict({name: value.clone() for name, value in pipe.transformer.state_dict().items()})
    assert torch.equal(picture(pipe, output_type="latent"), expected)
    ernie_accel.restore(pipe).transformer.load_state_dict(plain)


def test_plain_weights_that_take_the_place_of_quantized_ones_make_plain_layers():
    pipe, plain = ernie_accel.optimize(half(), Quantize("int8-weight-only")), half()
    pipe.transformer.load_state_dict(plain.transformer.state_dict(), assign=True)
    assert torch.equal(picture(pipe, output_type="latent"), picture(plain, output_type="latent"))


@pytest.mark.parametrize("rewritten", [(), (RewriteBlocks(),)], ids=["stock blocks", "rewritten blocks"])
@pytest.mark.parametrize("name", ["unfuse_lora", "disable_lora"])
def test_a_lora_that_was_merged_before_stays_in_quantized_weights(name, rewritten):
    pipe = half()
    plain = picture(pipe, output_type="latent")
    pipe.transformer.add_adapter(lora(), "a")
    pipe.fuse_lora()
    ernie_accel.optimize(pipe, *rewritten, Quantize("int8-weight-only", backend="torchao"))
    expected, before = picture(pipe, output_type="latent"), snapshot(pipe)
    other = type(half())(**pipe.components)
    if name == "unfuse_lora":
        with pytest.raises(ErnieAccelError, match=r"unmerge: a LoRA is merged into layers\.\d"):
            other.unfuse_lora()
        assert differences(before, snapshot(pipe)) == []
    for owner in (pipe, pipe.transformer):
        with pytest.raises(ErnieAccelError, match=rf"{name}: a LoRA is merged into layers\.\d"):
            getattr(owner, name)()
        assert differences(before, snapshot(pipe)) == []
        assert torch.equal(picture(pipe, output_type="latent"), expected)
    ernie_accel.restore(pipe)
    getattr(pipe, name)()
    assert torch.allclose(picture(pipe, output_type="latent"), plain, atol=0.1)


@pytest.mark.parametrize("transform", [Quantize("int8-weight-only", backend="quanto"), Quantize("nf4")], ids=repr)
def test_a_lora_that_the_pipe_would_fit_to_weights_it_cannot_find_is_refused(transform):
    pipe = ernie_accel.optimize(tiny_flux(), transform)
    before = snapshot(pipe)
    name = "transformer.transformer_blocks.0.attn.to_q"
    loaded = {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(32, 4)}
    with pytest.raises(ErnieAccelError, match="FluxPipeline: cannot load a LoRA"):
        pipe.load_lora_weights(dict(loaded))
    assert differences(before, snapshot(pipe)) == []
    ernie_accel.restore(pipe).load_lora_weights(loaded)


def test_layerwise_casting_of_quantos_layers_is_refused_before_any_is_cast():
    pipe = ernie_accel.optimize(tiny_flux(), QUANTIZED[1])
    before = snapshot(pipe)
    with pytest.raises(ErnieAccelError, match="enable_layerwise_casting: some of its layers are quanto's"):
        pipe.transformer.enable_layerwise_casting(compute_dtype=torch.float32)
    assert differences(before, snapshot(pipe)) == []


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int4"])
def test_quantos_layers_can_be_copied(scheme):
    layer = BACKENDS["quanto"].quantize(scheme, torch.nn.Linear(64, 64))
    made = copy.deepcopy({"one": layer, "other": layer})
    assert made["one"] is made["other"] is not layer
    x = torch.randn(2, 64)
    assert torch.equal(made["one"](x), layer(x))
    with torch.no_grad():
        made["one"].bias += 1
    assert not torch.equal(made["one"](x), layer(x))


def gguf_transformer(pipe, folder):
    """Return the transformer of a Z-Image pipe as diffusers loads it from a GGUF file."""
    import gguf
    from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel

    pipe.transformer.save_config(folder)
    file, kind = folder / "z.gguf", gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, "zimage")
    for name, tensor in pipe.transformer.state_dict().items():
        array = tensor.numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0 and "layers." in name:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return ZImageTransformer2DModel.from_single_file(
        str(file), config=str(folder), quantization_config=config, torch_dtype=torch.float32
    )


def quanto_transformer(pipe, folder):
    """Return the transformer of a Z-Image pipe as diffusers loads it with a QuantoConfig."""
    from diffusers import QuantoConfig, ZImageTransformer2DModel

    pipe.transformer.save_pretrained(folder)
    config = QuantoConfig(weights_dtype="int8")
    return ZImageTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)


@pytest.mark.parametrize("load", [gguf_transformer, quanto_transformer])
def test_what_others_quantized_is_not_cast_around(load, tmp_path):
    z_image = tiny_z_image()
    z_image.transformer = load(z_image, tmp_path)
    want = picture(z_image)
    with pytest.raises(ernie_accel.UnsupportedError, match=r"transformer is quantized \(") as caught:
        ernie_accel.optimize(z_image, CastDtype("bf16"))
    assert "leave it out with components=('vae', 'text_encoder')" in str(caught.value)
    assert torch.equal(picture(z_image), want)
    assert ernie_accel.plan(z_image, CastDtype("fp32")).ok
