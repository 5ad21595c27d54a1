"""Tiny random pipelines: every component of its true class, small enough that a picture takes milliseconds."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ernie_accel.core.context import Context
from ernie_accel.core.outputs import images_of
from ernie_accel.core.transform import Transform
from tests.copies import built_once


def after(context: Context, pipe: Any, *transforms: Transform) -> Context:
    """Return the context of a transform that runs on `pipe` after `transforms`, those that can run in it."""
    for transform in transforms:
        if not transform.unsupported(pipe, context) and transform.preview(pipe, context).changes:
            context = replace(context, state=transform.planned(pipe, context))
    return context


def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> None:
    """Give every matrix random values: adaLN and the final linear start at zero, and a random model must not."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std


def tiny_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "big", "small", "circle", "square", "on"]
    words = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        chat_template="{% for message in messages %}{{ message['content'] }} on {% endfor %}",
    )


@built_once
def tiny_ernie(*, layers: int = 2, dtype: torch.dtype = torch.float32, enhancer: bool = False) -> Any:
    """Return an ErnieImagePipeline of about 0.5 M parameters; 64x64 pixels are 16 tokens."""
    from diffusers import (
        AutoencoderKLFlux2,
        ErnieImagePipeline,
        ErnieImageTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Mistral3Config, Mistral3Model

    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=128,
        num_attention_heads=2,
        num_layers=layers,
        ffn_hidden_size=256,
        in_channels=16,
        out_channels=16,
        patch_size=1,
        text_in_dim=64,
        rope_axes_dim=(16, 24, 24),
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    text = {
        "model_type": "ministral3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 32,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    encoder = Mistral3Model(Mistral3Config(text_config=text, vision_config=vision))
    pe = tiny_enhancer() if enhancer else None
    for part in (transformer, vae, encoder, *filter(None, (pe,))):
        randomize(part)
        if dtype != torch.float32:
            part.to(dtype)
        part.eval().requires_grad_(False)
    pipe = ErnieImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tiny_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        pe=pe,
        pe_tokenizer=tiny_tokenizer() if enhancer else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_enhancer(**settings: Any) -> Any:
    """Return a Ministral3ForCausalLM of two layers for the tokenizer of `tiny_tokenizer`."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    config = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Ministral3ForCausalLM(Ministral3Config(**config | settings))


@built_once
def tiny_flux() -> Any:
    """Return a FluxPipeline without text encoders: a pipeline of no family the library knows."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.0,
    )
    for part in (transformer, vae):
        randomize(part)
        part.eval().requires_grad_(False)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_vae() -> Any:
    """Return an AutoencoderKL that makes 8 pixels of each latent, as those of FLUX, Z-Image and Lumina 2 do."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


@built_once
def tiny_z_image() -> Any:
    """Return a ZImagePipeline with one block of each kind; 64x64 pixels are 16 tokens, padded to 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=96,  # so that its feed-forward, 256 wide, can be quantized
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 64, 64],
    )
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return _assembled(
        ZImagePipeline,
        transformer=transformer,
        vae=tiny_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@built_once
def tiny_lumina2() -> Any:
    """Return a Lumina2Pipeline, whose transformer is the one NewBie-image was made from; 64x64 pixels are 16 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=32,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(256, 64, 64),
        cap_feat_dim=32,
    )
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    return _assembled(
        Lumina2Pipeline,
        transformer=transformer,
        vae=tiny_vae(),
        text_encoder=encoder,
        tokenizer=tiny_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


class NextDiT(torch.nn.Module):
    """A transformer of NewBie-image's architecture under a name of its own, with a pooled text embedding.

    Neither class nor pipeline is in diffusers yet (its pull request 12803), so the family must know it by its shape.
    """

    def __init__(self, lumina2: Any, pooled_projection_dim: int = 16) -> None:
        super().__init__()
        self.forward_as = type(lumina2).forward
        self.config = lumina2.config | {"pooled_projection_dim": pooled_projection_dim}
        self.config = type(lumina2.config)(self.config)  # attributes too, as diffusers' configs have them
        for name, child in lumina2.named_children():
            self.add_module(name, child)
        self.time_caption_embed = PooledEmbedding(lumina2.time_caption_embed, pooled_projection_dim)
        self.gradient_checkpointing = False
        self.out_channels = lumina2.out_channels

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_as(self, *args, **kwargs)


class PooledEmbedding(torch.nn.Module):
    """Adds a projected pooled text embedding (here: ones) to the time embedding."""

    def __init__(self, inner: torch.nn.Module, pooled_projection_dim: int) -> None:
        super().__init__()
        self.inner = inner
        width = inner.timestep_embedder.linear_2.out_features
        self.clip_text_pooled_proj = torch.nn.Linear(pooled_projection_dim, width)

    def forward(self, *args: Any) -> Any:
        embedded, caption = self.inner(*args)
        weight = self.clip_text_pooled_proj.weight
        return embedded + self.clip_text_pooled_proj(weight.new_ones(1, weight.shape[1])), caption


@built_once
def tiny_newbie() -> Any:
    """Return a Lumina2Pipeline around a `NextDiT`: the `pooled_projection_dim` variant, known by duck typing."""
    pipe = tiny_lumina2()
    torch.manual_seed(0)
    pipe.transformer = NextDiT(pipe.transformer).eval().requires_grad_(False)
    return pipe


def _assembled(cls: type, **parts: Any) -> Any:
    """Return a pipeline of randomized, frozen parts."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            randomize(part)
            part.eval().requires_grad_(False)
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: One tiny pipeline of every family, of every variant of it, and of an unknown one.
PIPELINES = {
    "ernie": tiny_ernie,
    "z_image": tiny_z_image,
    "lumina2": tiny_lumina2,
    "newbie": tiny_newbie,
    "flux": tiny_flux,
}


def picture(pipe: Any, *, seed: int = 0, steps: int = 3, **kwargs: Any) -> torch.Tensor:
    """Return a picture [B, 3, H, W] in [0, 1] of a tiny pipeline; the same seed gives the same picture."""
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
    }
    if type(pipe).__name__ == "FluxPipeline":
        given, dtype = torch.Generator().manual_seed(7), pipe.transformer.dtype
        arguments |= {
            "prompt_embeds": torch.randn(1, 5, 32, generator=given).to(dtype),
            "pooled_prompt_embeds": torch.randn(1, 32, generator=given).to(dtype),
            "height": 32,
            "width": 32,
        }
    else:
        arguments |= {"prompt": "a red circle on blue", "height": 64, "width": 64, "guidance_scale": 1.0}
        parameters = inspect.signature(type(pipe).__call__).parameters
        if "max_sequence_length" in parameters:
            arguments["max_sequence_length"] = 48  # these pipelines pad to it
        if "use_pe" in parameters:
            arguments["use_pe"] = False  # stock draws its words from the global random numbers
    images: torch.Tensor = images_of(pipe(**(arguments | kwargs)))
    return images.float()


def interrupt_at(step: int) -> Any:
    """Return a callback for the end of a step that is a Ctrl-C after step number `step`, from 0."""

    def callback(pipe: Any, at: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            raise KeyboardInterrupt
        return tensors

    return callback


@built_once
def tiny_sd() -> Any:
    """Return a StableDiffusionPipeline without text encoder: its denoiser is a UNet."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return _assembled(
        StableDiffusionPipeline,
        unet=unet,
        vae=tiny_vae(),
        scheduler=DDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@built_once
def tiny_wan(*, first: bool = True) -> Any:
    """Return a WanPipeline without text encoder: two transformers take turns, or (Wan 2.2's fast way) only the second.

    Its decoded latents are 16 x 16 pixels and one frame.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    def transformer() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return _assembled(
        WanPipeline,
        transformer=transformer() if first else None,
        transformer_2=transformer(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None,
        tokenizer=None,
        boundary_ratio=0.9 if first else 1.1,
    )
