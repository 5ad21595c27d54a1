"""Z-Image and Z-Image-Turbo: a 6B single-stream DiT with two refiners, a Qwen 3 text encoder."""

from __future__ import annotations

from types import MappingProxyType

from ernie_accel.families.family import CallSettings, Family, PromptEncoding, SingleFileNames

Z_IMAGE = Family(
    name="Z-Image",
    transformer_classes=("ZImageTransformer2DModel",),
    modes=MappingProxyType(
        {
            "turbo": CallSettings(9, 0.0, "the model card of Z-Image-Turbo"),
            "quality": CallSettings(50, 4.0, "the undistilled Z-Image: 28 to 50 steps, guidance 3 to 5"),
        }
    ),
    size_multiple=16,
    sizes=((1024, 1024), (1280, 720), (720, 1280)),
    keep_precise=MappingProxyType(
        {
            # Everything outside the blocks, and their modulation: with these precise, pictures of vLLM-Omni in fp8 are
            # 0.07 from those in bfloat16 by LPIPS, without 0.74. What refines the prompt takes no time anyway.
            "transformer": (
                r"context_refiner\b",
                r"all_x_embedder\b",
                r"all_final_layer\b",
                r"t_embedder\b",
                r"cap_embedder\b",
                r".*adaLN_modulation\b",
            ),
        }
    ),
    rewritten="ernie_accel.models.z_image.blocks",
    kernels="ernie_accel.models.z_image.kernels:KERNELS",
    forward_inputs="ernie_accel.models.z_image.inputs:forward_inputs",
    encode_pictures="ernie_accel.models.latents:encode_in_float32",
    text_argument="cap_feats",
    vae_dtypes=MappingProxyType({"ZImageOmniPipeline": "bfloat16"}),
    prompt_encoding=PromptEncoding(layers="layers", hidden_state=-2, methods=("_encode_prompt",), guided_above=0.0),
    single_file=SingleFileNames(
        renamed=(
            (r"^final_layer\.", "all_final_layer.2-1."),
            (r"^x_embedder\.", "all_x_embedder.2-1."),
            (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
            (r"\.attention\.out\.", ".attention.to_out.0."),
        ),
        fused=MappingProxyType({"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")}),
        unused=("norm_final.weight",),
    ),
)
