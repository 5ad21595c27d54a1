"""`FuseVae`: the same pictures and latents on fused kernels (here on their twins), what it knows, and back."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderDC, AutoencoderKL, ZImageTransformer2DModel
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

import ernie_accel
from ernie_accel import CompileVae, Context, FuseVae
from ernie_accel.families.published import CHECKPOINTS
from ernie_accel.memory.call import Call
from ernie_accel.memory.stages import activations_of
from ernie_accel.models.autoencoder import FusedDecoder, FusedEncoder, _twice_as_large, unsupported_reason
from tests.pipelines import picture, randomize, tiny_ernie, tiny_flux, tiny_lumina2, tiny_z_image

GPU = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6"})


def fused(pipe: Any) -> Any:
    return ernie_accel.optimize(pipe, FuseVae(), context=GPU)


def pipe_with_attention(heads: int = 1) -> Any:
    """A decoder that attends in its middle, as the real ones do; those of the tiny pipelines do not."""
    pipe = tiny_ernie()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"in_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1}
    pipe.vae.decoder = Decoder(**sizes, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8).eval()
    pipe.vae.decoder.mid_block.attentions[0].heads = heads
    return pipe


def pipe_without_biases() -> Any:
    pipe = pipe_with_attention()
    for part in pipe.vae.decoder.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.bias = None
    return pipe


def pipe_of_seamless_pictures() -> Any:
    """A well-known trick: convolutions that see the other edge."""
    pipe = pipe_with_attention()
    for part in pipe.vae.decoder.modules():
        if isinstance(part, nn.Conv2d):
            part.padding_mode, part._reversed_padding_repeated_twice = "circular", [part.padding[0]] * 4
    return pipe


def z_image_with_the_vae_of_flux(**settings: Any) -> Any:
    """The published configuration, an eighth as wide: 16 channels, attention in the middle, no convolution before."""
    vae = next(each for each in CHECKPOINTS if each.pipeline_class == "ZImagePipeline").models["vae"]
    assert vae.model_class == "AutoencoderKL"
    narrow = {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8, "layers_per_block": 1}
    pipe = tiny_z_image()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(**{**vae.config, **narrow, **settings}).eval().requires_grad_(False)
    pipe.transformer = ZImageTransformer2DModel.from_config({**pipe.transformer.config, "in_channels": 16}).eval()
    randomize(pipe.transformer.requires_grad_(False))
    return pipe


MAKERS = [
    tiny_ernie,
    z_image_with_the_vae_of_flux,
    tiny_flux,
    pipe_with_attention,
    partial(pipe_with_attention, heads=4),
    pipe_without_biases,
    pipe_of_seamless_pictures,
]


def decode(decoder: Any, *shape: int) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = decoder(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return out


@pytest.mark.parametrize("batch", [2, 65])
@pytest.mark.parametrize("make", MAKERS)
def test_it_only_rounds_and_goes_back(make: Any, batch: int) -> None:
    pipe = make()
    decoder, encoder = pipe.vae.decoder, pipe.vae.encoder
    strides = [p.stride() for p in pipe.vae.parameters()]
    pictures = (2, 3, 48, 72)
    encoded = decode(encoder, *pictures)
    shape = (batch, decoder.conv_in.in_channels, 6, 10)
    expected = decode(decoder, *shape)
    fused(pipe)
    assert ernie_accel.report(pipe).entries[0].applied.changed == ("vae.decoder", "vae.encoder")
    assert decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(encoder.forward, FusedEncoder)
    assert (decode(encoder, *pictures) - encoded).norm() < 1e-5 * encoded.norm()
    got = decode(decoder, *shape)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    ernie_accel.restore(pipe)
    assert not {"forward"} & (vars(decoder).keys() | vars(encoder).keys())
    assert [p.stride() for p in pipe.vae.parameters()] == strides
    assert torch.equal(decode(encoder, *pictures), encoded)
    assert torch.equal(decode(decoder, *shape), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pictures_of_z_image_on_the_vae_of_flux_stay_within_rounding(dtype: torch.dtype) -> None:
    pipe = z_image_with_the_vae_of_flux().to(dtype)
    expected, vae = picture(pipe, steps=1), pipe.vae
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(vae).float().decode(latents.to(dtype).float()).sample
        stock = vae.decode(latents.to(dtype)).sample.float()
        got = fused(pipe).vae.decode(latents.to(dtype)).sample.float()
    assert isinstance(vae.decoder.forward, FusedDecoder)
    if dtype is torch.float32:
        assert (picture(pipe, steps=1) - expected).norm() < 1e-5 * expected.norm()
    assert (got - exact).norm() < 1.1 * (stock - exact).norm() + 1e-5 * exact.norm()
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe, steps=1), expected)


@pytest.mark.parametrize("make", [z_image_with_the_vae_of_flux, tiny_lumina2])
def test_slices_and_tiles_go_through_the_fused_decoder(make: Any) -> None:
    """Both call the decoder for a part of the picture; the first convolution, where there is one, is before it."""
    pipe = make()
    latents = torch.randn(2, pipe.vae.config.latent_channels, 40, 40, generator=torch.Generator().manual_seed(0))
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size = 32
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample
        got = fused(pipe).vae.decode(latents).sample
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_a_vae_with_a_convolution_before_its_decoder_is_decoded_too() -> None:
    pipe = z_image_with_the_vae_of_flux(use_post_quant_conv=True, use_quant_conv=True)
    expected = picture(pipe, steps=1)
    assert (picture(fused(pipe), steps=1) - expected).norm() < 1e-5 * expected.norm()


def test_the_memory_of_the_decoder_of_flux_is_predicted_fused_and_stock() -> None:
    """The planner runs it on shapes alone; fused, the norms need no copy in float32."""
    pipe, call = z_image_with_the_vae_of_flux().to(torch.bfloat16), Call(256, 256, pictures=2)
    stock, mine = (activations_of(pipe, parts, GPU, call)["decode"] for parts in ((), (FuseVae(),)))
    widest = 2 * 256 * 256 * 32 * 2  # the largest activation in bytes: two pictures, 32 channels, bfloat16
    assert stock is not None and mine is not None
    assert 2 * widest <= mine < stock <= 8 * widest
    assert not isinstance(vars(pipe.vae.decoder).get("forward"), FusedDecoder)


def test_upsampling_takes_a_single_pixel() -> None:
    x = torch.randn(2, 8, 1, 1)
    assert torch.equal(_twice_as_large(x), x.expand(-1, -1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 4, 8, 12])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_upsampling_copies_bytes(channels: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(2, channels, 3, 5).to(dtype, memory_format=layout)
    x[0, 0, 0, 0], x[1, 2, 2, 4] = float("nan"), -0.0
    expected = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    got = _twice_as_large(x)
    as_bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(got.contiguous().view(as_bits), expected.contiguous().view(as_bits))


def test_a_picture_of_the_trained_model_stays_within_rounding() -> None:
    pipe = ernie_accel.demo.load(dtype=torch.float32, prompt_enhancer=False)
    expected = picture(pipe, steps=2)
    assert isinstance(fused(pipe).vae.decoder.forward, FusedDecoder)
    assert (picture(pipe, steps=2) - expected).norm() < 1e-5 * expected.norm()


def test_in_bfloat16_it_is_no_further_from_float32_than_stock() -> None:
    decoder = tiny_ernie().vae.decoder
    expected = decode(decoder, 1, decoder.conv_in.in_channels, 16, 16)
    latents = torch.randn(1, decoder.conv_in.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    decoder.to(torch.bfloat16)
    with torch.no_grad():
        stock, ours = (forward(latents.bfloat16()).float() for forward in (decoder, FusedDecoder(decoder)))
    assert (ours - expected).norm() <= (stock - expected).norm()


def test_no_weights_of_its_own() -> None:
    """What is loaded or cast later counts, and a copy of the pipe decodes with the copy's weights."""
    import copy

    pipe = fused(tiny_ernie())
    decoder = pipe.vae.decoder
    shape = (1, decoder.conv_in.in_channels, 4, 4)
    other = copy.deepcopy(pipe)
    before = decode(decoder, *shape)
    with torch.no_grad():
        decoder.conv_out.bias += 1
        decoder.mid_block.resnets[0].conv1.bias += 1
    assert torch.equal(decode(other.vae.decoder, *shape), before)
    assert not torch.allclose(decode(decoder, *shape), before + 1)
    expected = decode(type(decoder).forward.__get__(decoder), *shape)
    torch.testing.assert_close(decode(decoder, *shape), expected, rtol=1e-4, atol=1e-4)


def test_under_gradients_it_is_the_forward_as_it_was() -> None:
    decoder = fused(tiny_ernie()).vae.decoder
    stock = type(decoder).forward.__get__(decoder)
    latents = torch.randn(1, decoder.conv_in.in_channels, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(decoder(latents).square().sum(), latents)
    (expected,) = torch.autograd.grad(stock(latents).square().sum(), latents)
    assert torch.equal(gradient, expected)
    assert expected.any()


def _offload(decoder: Any) -> None:
    cpu_offload(decoder, torch.device("cpu"))


@pytest.mark.parametrize(
    "alter",
    [
        _offload,
        lambda d: d.up_blocks[0].register_forward_hook(lambda module, inputs, out: 2 * out),
        lambda d: d.mid_block.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], None)),
        lambda d: setattr(d.mid_block, "forward", lambda x, temb=None: x),
    ],
    ids=["offloaded", "hook", "pre-hook", "forward"],
)
def test_what_others_put_on_layers_afterwards_counts(alter: Any) -> None:
    decoder, stock = fused(pipe_with_attention()).vae.decoder, pipe_with_attention().vae.decoder
    shape = (1, decoder.conv_in.in_channels, 4, 4)
    alter(decoder)
    if alter is not _offload:
        alter(stock)
    got, expected = decode(decoder, *shape), decode(stock, *shape)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_embeddings_that_a_decoder_with_group_norms_cannot_take_are_refused_as_before() -> None:
    decoder = fused(tiny_ernie()).vae.decoder
    latents = torch.zeros(1, decoder.conv_in.in_channels, 4, 4)
    for forward in (type(decoder).forward.__get__(decoder), decoder):
        with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size of tensor"):
            forward(latents, latents)


@pytest.mark.parametrize(
    ("path", "name", "value", "reason"),
    [
        ("mid_block.resnets.0", "conv1", nn.Identity(), "has quantized or adapted convolutions"),
        ("mid_block.resnets.0", "conv2", nn.Identity(), "has quantized or adapted convolutions"),
        ("up_blocks.1.resnets.0", "conv_shortcut", nn.Identity(), "has quantized or adapted convolutions"),
        ("mid_block.resnets.1", "norm1", nn.Identity(), "has a Identity for a norm"),
        ("mid_block.resnets.1", "norm2", nn.GroupNorm(8, 32, affine=False), "has a GroupNorm for a norm"),
        ("mid_block.resnets.1", "nonlinearity", nn.GELU(), "has a GELU for an activation"),
        ("mid_block.resnets.1", "dropout", nn.Dropout(0.1), "drops values out"),
        ("mid_block.resnets.1", "time_emb_proj", nn.Identity(), "takes a time embedding"),
        ("up_blocks.1.resnets.0", "time_embedding_norm", "scale_shift", "takes a time embedding"),
        ("mid_block.resnets.1", "output_scale_factor", 2.0, "resamples, or scales its output"),
        ("mid_block.resnets.1", "upsample", nn.Identity(), "resamples, or scales its output"),
        ("mid_block.resnets.1", "downsample", nn.Identity(), "resamples, or scales its output"),
        ("mid_block.attentions.0", "to_q", nn.Identity(), "has quantized or adapted layers"),
        ("mid_block.attentions.0", "to_k", nn.Identity(), "has quantized or adapted layers"),
        ("mid_block.attentions.0", "to_v", nn.Identity(), "has quantized or adapted layers"),
        ("mid_block.attentions.0.to_out", "0", nn.Identity(), "has quantized or adapted layers"),
        ("mid_block.attentions.0.to_out", "1", nn.Dropout(0.1), "drops values out"),
        ("mid_block.attentions.0", "processor", object(), "computes with a object"),
        ("mid_block.attentions.0", "group_norm", None, "has a NoneType for a norm"),
        ("mid_block.attentions.0", "norm_q", nn.Identity(), "has other norms"),
        ("mid_block.attentions.0", "spatial_norm", nn.Identity(), "has other norms"),
        ("mid_block.attentions.0", "residual_connection", False, "has no residual, or scales its output"),
        ("mid_block.attentions.0", "rescale_output_factor", 2.0, "has no residual, or scales its output"),
        ("up_blocks.0.upsamplers.0", "norm", nn.Identity(), "does not interpolate and then convolve"),
        ("up_blocks.0.upsamplers.0", "interpolate", False, "does not interpolate and then convolve"),
        ("up_blocks.0.upsamplers.0", "use_conv_transpose", True, "does not interpolate and then convolve"),
        ("up_blocks.0.upsamplers.0", "conv", None, "has no convolution, or a quantized or adapted one"),
        ("up_blocks.0.resnets", "0", nn.Identity(), "up_blocks.0.resnets.0 is a torch.nn.modules.linear.Identity"),
        ("up_blocks", "0", nn.Identity(), "up_blocks.0 is a torch.nn.modules.linear.Identity"),
        ("", "mid_block", nn.Identity(), "mid_block is a torch.nn.modules.linear.Identity"),
        ("", "conv_norm_out", nn.Identity(), "it ends with a Identity for a norm"),
        ("", "conv_act", nn.GELU(), "it ends with a GELU for an activation"),
        ("", "forward", print, "its forward was replaced"),
    ],
)
def test_a_decoder_it_does_not_know_is_left_alone_with_the_reason(
    path: str, name: str, value: object, reason: str
) -> None:
    pipe = pipe_with_attention()
    setattr(pipe.vae.decoder.get_submodule(path), name, value)
    assert reason in (unsupported_reason(pipe.vae.decoder) or "")
    preview = FuseVae().preview(pipe, GPU)
    assert preview.changes == ("vae.encoder",)
    assert reason in preview.note


@pytest.mark.parametrize(
    ("path", "name", "value", "reason"),
    [
        ("down_blocks.0.downsamplers.0", "norm", nn.Identity(), "does not only convolve"),
        ("down_blocks.0.downsamplers.0", "use_conv", False, "does not only convolve"),
        ("down_blocks.0.downsamplers.0", "conv", nn.AvgPool2d(2), "has no convolution, or a quantized or adapted one"),
        ("down_blocks.0.resnets", "0", nn.Identity(), "down_blocks.0.resnets.0 is a torch.nn.modules.linear.Identity"),
        ("down_blocks", "0", nn.Identity(), "down_blocks.0 is a torch.nn.modules.linear.Identity"),
        ("", "conv_act", nn.GELU(), "it ends with a GELU for an activation"),
    ],
)
def test_an_encoder_it_does_not_know_is_left_alone_with_the_reason(
    path: str, name: str, value: object, reason: str
) -> None:
    pipe = tiny_ernie()
    setattr(pipe.vae.encoder.get_submodule(path), name, value)
    preview = FuseVae().preview(pipe, GPU)
    assert preview.changes == ("vae.decoder",)
    assert preview.note.startswith("not this encoder: ")
    assert reason in preview.note


def test_a_vae_without_encoder_has_only_its_decoder_fused() -> None:
    pipe = tiny_ernie()
    pipe.vae.encoder = None
    assert FuseVae().preview(pipe, GPU) == ernie_accel.Preview(("vae.decoder",))
    expected = picture(pipe, steps=1)
    assert (picture(fused(pipe), steps=1) - expected).norm() < 1e-5 * expected.norm()


def test_an_encoder_that_others_hooked_or_that_learns_runs_as_before() -> None:
    pipe, stock = fused(tiny_ernie()), tiny_ernie()
    for each in (pipe, stock):
        each.vae.encoder.down_blocks[0].register_forward_hook(lambda module, inputs, out: 2 * out)
    got, expected = (decode(each.vae.encoder, 1, 3, 32, 32) for each in (pipe, stock))
    assert (got - expected).norm() < 1e-5 * expected.norm()
    pictures = torch.randn(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(pipe.vae.encoder(pictures).square().sum(), pictures)
    assert gradient.any()


def test_decoders_of_other_autoencoders_are_left_alone() -> None:
    """That of AutoencoderDC is a class of the same name."""
    pipe = tiny_ernie()
    with torch.device("meta"):
        pipe.vae = AutoencoderDC()
    assert unsupported_reason(pipe.vae.decoder) == "it is a diffusers.models.autoencoders.autoencoder_dc.Decoder"
    assert unsupported_reason(pipe.vae.encoder) == "it is a diffusers.models.autoencoders.autoencoder_dc.Encoder"
    assert FuseVae().preview(pipe, GPU).changes == ()


def test_a_warm_up_after_it_calls_the_pipe() -> None:
    """Its kernels are compiled when they are first launched."""
    warm_up = ernie_accel.Warmup(sizes=((64, 64),))
    pipe = ernie_accel.optimize(tiny_ernie(), FuseVae(), warm_up, context=GPU)
    assert [entry.status for entry in ernie_accel.report(pipe).entries] == ["applied", "applied"]


def test_it_does_nothing_where_the_kernels_cannot_run() -> None:
    pipe = tiny_ernie()
    note = ernie_accel.plan(pipe, FuseVae(), context=Context.named("cpu")).steps[0].preview.note
    assert note.startswith(
        "the kernels cannot run here: FuseVae needs CUDA compute capability >= 8.0; this device has no"
    )
    without = Context("cuda", "NVIDIA H200", (9, 0))
    assert "pip install triton" in FuseVae().preview(pipe, without).note


def test_it_takes_the_place_of_compile_vae() -> None:
    with pytest.raises(ernie_accel.ErnieAccelError, match="vae-compile"):
        ernie_accel.plan(tiny_ernie(), CompileVae(), FuseVae(), context=GPU)
    pipe = fused(tiny_ernie())
    assert FuseVae().preview(pipe, GPU).note == (
        "the decoder runs on the kernels already; the encoder runs on the kernels already"
    )
    pipe = tiny_ernie()
    pipe.vae.decoder.compile()
    assert FuseVae().preview(pipe, GPU).note == "the decoder is compiled already"
    pipe.vae = None
    assert FuseVae().unsupported(pipe, GPU) == ["ErnieImagePipeline has no vae.decoder"]


def test_a_lora_on_a_pipe_with_a_fused_decoder_draws_as_it_does_without() -> None:
    name = "transformer.layers.1.self_attention.to_q"
    drawn = []
    for fuse in (False, True):
        pipe = tiny_ernie()
        if fuse:
            fused(pipe)
        loaded = {f"{name}.lora_A.weight": torch.ones(4, 128) * 0.1, f"{name}.lora_B.weight": torch.ones(128, 4)}
        plain = picture(pipe, output_type="latent")
        pipe.load_lora_weights(loaded, adapter_name="a")
        drawn.append(picture(pipe, output_type="latent"))
        assert not torch.equal(drawn[-1], plain)
    assert torch.equal(*drawn)
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe, output_type="latent"), drawn[0])
