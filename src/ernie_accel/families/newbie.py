"""NewBie-image: a NextDiT in the manner of Lumina 2, run in diffusers by its Lumina 2 transformer."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from ernie_accel.families.family import (
    CallSettings,
    Family,
    GuidanceCalls,
    PromptEncoding,
    Shape,
    SingleFileNames,
)

_LISTS = ("context_refiner", "noise_refiner", "layers")

_IN_DIFFUSERS = Family(
    name="NewBie-image",
    transformer_classes=("Lumina2Transformer2DModel",),
    # Its pooled CLIP text embedding is what NewBie adds to Lumina 2: `pooled_projection_dim` in diffusers' open pull
    # request 12803. Z-Image has the refiners too, FLUX has the setting; only this architecture has both.
    shape=Shape(modules=_LISTS, config=("pooled_projection_dim",)),
    modes=MappingProxyType({"quality": CallSettings(28, None, "the authors' guides name 20 to 28 steps")}),
    schedulers=("unipc", "dpmpp_2m_sde"),
    size_multiple=16,
    sizes=((1024, 1024),),
    keep_precise=MappingProxyType(
        {
            "transformer": (
                r"context_refiner\b",  # refines the prompt, which takes no time
                r"x_embedder\b",
                r"time_caption_embed\b",
                r"norm_out\b",
                r".*norm1\.linear\b",
                # The same parts by the names of the authors' own code, and the pooled embedding's.
                r"t_embedder\b",
                r"cap_embedder\b",
                r"final_layer\b",
                r".*adaLN_modulation\b",
                r"(.*\.)?clip_text_pooled_proj\b",
                r"time_text_embed\b",
            ),
        }
    ),
    rewritten="ernie_accel.models.lumina.blocks",
    kernels="ernie_accel.models.lumina.kernels:KERNELS",
    repeated_blocks=("Lumina2TransformerBlock",),
    dispatched=MappingProxyType({"Lumina2AttnProcessor2_0": "ernie_accel.models.lumina.attention:DispatchedProcessor"}),
    forward_inputs="ernie_accel.models.lumina.inputs:forward_inputs",
    encode_pictures="ernie_accel.models.latents:encode_as_prompts",
    text_argument="encoder_hidden_states",
    guidance_calls=GuidanceCalls(
        ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"), "encode_prompt"
    ),
    # Lumina 2's pipeline has the first method; beside it, the pull request's has one for Jina CLIP, which adds a pooled
    # embedding of each text. The second is of the authors' own, where that is `clip_model`, and Gemma 3 may come with a
    # vision tower.
    prompt_encoding=PromptEncoding(
        layers=("layers", "language_model.layers"),
        hidden_state=-2,
        unused=("vision_tower", "multi_modal_projector"),
        methods=("_get_gemma_prompt_embeds", "_encode_prompt"),
        encoders=("text_encoder", "clip_model"),
        beside=(("_get_clip_prompt_embeds", "text_encoder_2", "tokenizer_2"),),
    ),
    single_file=SingleFileNames(
        renamed=(
            (r"^cap_embedder\.", "time_caption_embed.caption_embedder."),
            (r"^t_embedder\.mlp\.0\.", "time_caption_embed.timestep_embedder.linear_1."),
            (r"^t_embedder\.mlp\.2\.", "time_caption_embed.timestep_embedder.linear_2."),
            (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear_1."),
            (r"^final_layer\.linear\.", "norm_out.linear_2."),
            # Blocks of the context refiner are not modulated, and have a plain norm.
            (r"^(context_refiner\.\d+\.)attention_norm1\.", r"\1norm1."),
            (r"\.attention_norm1\.", ".norm1.norm."),
            (r"\.attention_norm2\.", ".norm2."),
            (r"\.adaLN_modulation\.1\.", ".norm1.linear."),
            (r"\.attention\.([qk])_norm\.", r".attn.norm_\1."),
            (r"\.attention\.out\.", ".attn.to_out.0."),
            (r"\.attention\.", ".attn."),
            (r"\.feed_forward\.w(\d)\.", r".feed_forward.linear_\1."),
        ),
        fused=MappingProxyType({"attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}),
        unused=("norm_final.weight",),
    ),
)

#: The authors' own code, which comes with the checkpoint. It has no config, but layers of its own for the pooled
#: embedding, and its pipeline calls it once for both halves of guidance.
_OWN_CODE = replace(
    _IN_DIFFUSERS,
    transformer_classes=("NextDiT_CLIP",),
    shape=Shape(modules=(*_LISTS, "clip_text_pooled_proj", "time_text_embed")),
    rewritten="ernie_accel.models.newbie.blocks",
    kernels="ernie_accel.models.newbie.kernels:KERNELS",
    repeated_blocks=("JointTransformerBlock",),
    dispatched=MappingProxyType({}),
    forward_inputs="ernie_accel.models.newbie.inputs:forward_inputs",
    encode_pictures="ernie_accel.models.latents:encode_as_transformer",
    text_argument="cap_feats",
    guidance_calls=None,
    single_file=None,
)
NEWBIE = replace(_IN_DIFFUSERS, other_codes=(_OWN_CODE,))
