"""Configurations of published checkpoints, for planning without downloading one: data only.

Only what sizes depend on is here. A configuration is that of the checkpoint's own ``config.json``; where the checkpoint
cannot be read without a download, `source` says where the values were read instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class PublishedModel:
    """One component of a checkpoint.

    Attributes:
        library: "diffusers" or "transformers".
        model_class: Its class there.
        config: Arguments of the class (diffusers), or of its configuration (transformers).
    """

    library: str
    model_class: str
    config: Mapping[str, object]


@dataclass(frozen=True)
class Checkpoint:
    """A published pipeline.

    Attributes:
        names: Hub ids, the usual one first.
        pipeline_class: Its class in diffusers.
        models: Its components with weights.
        mode: The family's mode that it was made for: "turbo" or "quality".
        source: Where the configuration was read.
        note: What the description leaves out; "" if nothing.
    """

    names: tuple[str, ...]
    pipeline_class: str
    models: Mapping[str, PublishedModel]
    mode: str
    source: str
    note: str = ""


_MINISTRAL_3B = MappingProxyType(
    {
        "model_type": "ministral3",
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "tie_word_embeddings": True,
    }
)
_ERNIE_MODELS = MappingProxyType(
    {
        "transformer": PublishedModel(
            "diffusers",
            "ErnieImageTransformer2DModel",
            {
                "hidden_size": 4096,
                "ffn_hidden_size": 12288,
                "num_layers": 36,
                "num_attention_heads": 32,
                "in_channels": 128,
                "out_channels": 128,
                "patch_size": 1,
                "text_in_dim": 3072,
            },
        ),
        "vae": PublishedModel("diffusers", "AutoencoderKLFlux2", {}),
        "text_encoder": PublishedModel(
            "transformers",
            "Mistral3Model",
            {"text_config": dict(_MINISTRAL_3B), "vision_config": {"model_type": "pixtral"}},
        ),
        "pe": PublishedModel("transformers", "Ministral3ForCausalLM", dict(_MINISTRAL_3B)),
    }
)
_FLUX_VAE = PublishedModel(
    "diffusers",
    "AutoencoderKL",
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)
_Z_IMAGE_MODELS = MappingProxyType(
    {
        "transformer": PublishedModel("diffusers", "ZImageTransformer2DModel", {}),
        "vae": _FLUX_VAE,
        "text_encoder": PublishedModel(
            "transformers",
            "Qwen3Model",
            {
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
        ),
    }
)
_NEWBIE_MODELS = MappingProxyType(
    {
        "transformer": PublishedModel(
            "diffusers",
            "Lumina2Transformer2DModel",
            {
                "hidden_size": 2304,
                "num_layers": 36,
                "num_attention_heads": 24,
                "num_kv_heads": 8,
                "in_channels": 16,
                "cap_feat_dim": 2560,
                "axes_dim_rope": (32, 32, 32),
            },
        ),
        "vae": _FLUX_VAE,
        "text_encoder": PublishedModel(
            "transformers",
            "Gemma3TextModel",
            {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 262208,
            },
        ),
    }
)

CHECKPOINTS: tuple[Checkpoint, ...] = (
    Checkpoint(
        ("baidu/ERNIE-Image-Turbo", "PaddlePaddle/ERNIE-Image-Turbo"),
        "ErnieImagePipeline",
        _ERNIE_MODELS,
        "turbo",
        "its config.json files; the prompt enhancer's by the size of its file",
    ),
    Checkpoint(
        ("baidu/ERNIE-Image", "PaddlePaddle/ERNIE-Image"),
        "ErnieImagePipeline",
        _ERNIE_MODELS,
        "quality",
        "its config.json files; the prompt enhancer's by the size of its file",
    ),
    Checkpoint(
        ("Tongyi-MAI/Z-Image-Turbo",),
        "ZImagePipeline",
        _Z_IMAGE_MODELS,
        "turbo",
        "diffusers' defaults for the transformer; the text encoder as DiffSynth-Studio builds it",
    ),
    Checkpoint(
        ("Tongyi-MAI/Z-Image",),
        "ZImagePipeline",
        _Z_IMAGE_MODELS,
        "quality",
        "diffusers' defaults for the transformer; the text encoder as DiffSynth-Studio builds it",
    ),
    Checkpoint(
        ("NewBie-AI/NewBie-image-Exp0.1",),
        "Lumina2Pipeline",
        _NEWBIE_MODELS,
        "quality",
        "its published sizes, on diffusers' Lumina 2",
        note="its second text encoder, Jina CLIP (1.7 GB in bfloat16), is code of its own and left out",
    ),
)


def published(name: str) -> Checkpoint | None:
    """Return the checkpoint of a hub id, in upper or lower case; None if its configuration is not known here."""
    return next((each for each in CHECKPOINTS for known in each.names if known.lower() == name.lower()), None)
