"""Pipelines with random weights: full size for a GPU, tiny for a CPU. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ernie_accel.families.published import CHECKPOINTS, published

_TURBO = CHECKPOINTS[0].models
#: Settings of the language model that those who build one give themselves.
_BY_CALLER = ("model_type", "tie_word_embeddings")
#: Keyword arguments of the components by size. "full" is ERNIE-Image's published configuration.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "transformer": dict(_TURBO["transformer"].config),
        "vae": dict(_TURBO["vae"].config),
        "text": {name: value for name, value in _TURBO["pe"].config.items() if name not in _BY_CALLER},
    },
    "tiny": {
        "transformer": {
            "hidden_size": 128,
            "ffn_hidden_size": 256,
            "num_layers": 3,
            "num_attention_heads": 2,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 64,
            "rope_axes_dim": (16, 24, 24),
        },
        "vae": {
            "block_out_channels": (16, 16, 32, 32),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
        },
        "text": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": 64,
        },
    },
}


def random_pipeline(size: str, device: str, dtype: torch.dtype, *, denoiser_only: bool = False) -> Any:
    """Return an ErnieImagePipeline without prompt enhancer; the same arguments give the same weights.

    Args:
        size: A key of `SIZES`.
        device: Where the weights are made.
        dtype: Of all weights.
        denoiser_only: Leave the text encoder out: 8 GB less; call the pipe with ``prompt_embeds``.
    """
    from diffusers import (
        AutoencoderKLFlux2,
        ErnieImagePipeline,
        ErnieImageTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Mistral3Config, Mistral3Model

    parts = SIZES[size]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = ErnieImageTransformer2DModel(**parts["transformer"])
            vae = AutoencoderKLFlux2(**parts["vae"])
            encoder = None
            if not denoiser_only:
                vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
                vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
                text = {"model_type": "ministral3", **parts["text"]}
                encoder = Mistral3Model(Mistral3Config(text_config=text, vision_config=vision))
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(1)
    for parameter in transformer.parameters():  # adaLN and the final linear start at zero: a random model must not
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02, generator=generator)
    for part in filter(None, (transformer, vae, encoder)):
        part.to(device, dtype).eval().requires_grad_(False)
    pipe = ErnieImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: Transformer and VAE of the other families by size; "full" is the published configuration.
_TINY_VAE = {
    "block_out_channels": (16, 16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "z-image": {
        "checkpoint": "Tongyi-MAI/Z-Image-Turbo",
        "tiny": {
            "in_channels": 4,
            "dim": 96,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12],
            "axes_lens": [512, 64, 64],
        },
    },
    "newbie": {
        "checkpoint": "NewBie-AI/NewBie-image-Exp0.1",
        "tiny": {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 64,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 32,
            "axes_dim_rope": (8, 12, 12),
            "axes_lens": (300, 64, 64),
            "cap_feat_dim": 32,
        },
    },
}


def random_family_pipeline(family: str, size: str, device: str, dtype: torch.dtype) -> Any:
    """Return a pipeline of another family without text encoder: call it with ``prompt_embeds``.

    Args:
        family: A key of `FAMILIES`.
        size: "full" or "tiny".
        device: Where the weights are made.
        dtype: Of all weights.
    """
    import diffusers

    checkpoint = published(FAMILIES[family]["checkpoint"])
    if checkpoint is None:
        raise LookupError(f"the configuration of {FAMILIES[family]['checkpoint']} is not known")
    models_of = checkpoint.models
    config = models_of["transformer"].config if size == "full" else FAMILIES[family]["tiny"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = getattr(diffusers, models_of["transformer"].model_class)(**config)
            vae = diffusers.AutoencoderKL(**(models_of["vae"].config if size == "full" else _TINY_VAE))
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02, generator=generator)
    for part in (transformer, vae):
        part.to(device, dtype).eval().requires_grad_(False)
    pipe = getattr(diffusers, checkpoint.pipeline_class)(
        transformer=transformer,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_of(tokens: int, seed: int = 0) -> str:
    """Return a prompt that the pipelines' tokenizer splits into `tokens` tokens."""
    words = torch.randint(4, 60, (tokens,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{word}" for word in words.tolist())


def _tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **names)
