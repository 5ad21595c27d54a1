"""Tiny random pipelines: every component of its true class, small enough that a picture takes milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers


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
    )


def tiny_ernie(*, layers: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """Return an ErnieImagePipeline of about 0.5 M parameters without prompt enhancer; 64x64 pixels are 16 tokens."""
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
    for part in (transformer, vae, encoder):
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
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def picture(pipe: Any, *, seed: int = 0, steps: int = 3, **kwargs: Any) -> torch.Tensor:
    """Return a picture [B, 3, H, W] in [0, 1] of a tiny pipeline; the same seed gives the same picture."""
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
    }
    if type(pipe).__name__ == "FluxPipeline":
        given = torch.Generator().manual_seed(7)
        arguments |= {
            "prompt_embeds": torch.randn(1, 5, 32, generator=given),
            "pooled_prompt_embeds": torch.randn(1, 32, generator=given),
            "height": 32,
            "width": 32,
        }
    else:
        arguments |= {"prompt": "a red circle on blue", "height": 64, "width": 64, "guidance_scale": 1.0}
    images: torch.Tensor = pipe(**(arguments | kwargs)).images
    return images.float()
