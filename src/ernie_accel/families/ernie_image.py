"""ERNIE-Image and ERNIE-Image-Turbo: one 8B single-stream DiT, a Mistral 3 text encoder, a prompt enhancer."""

from __future__ import annotations

from types import MappingProxyType

from ernie_accel.families.family import AlwaysMasks, CallSettings, Family, PromptEncoding, PromptEnhancement

ERNIE_IMAGE = Family(
    name="ERNIE-Image",
    transformer_classes=("ErnieImageTransformer2DModel",),
    modes=MappingProxyType(
        {
            "turbo": CallSettings(8, 1.0, "the model card of ERNIE-Image-Turbo", highest_guidance=1.5),
            "quality": CallSettings(50, 4.0, "the model card of ERNIE-Image"),
        }
    ),
    size_multiple=16,
    sizes=((1024, 1024), (848, 1264), (1264, 848), (1200, 896), (896, 1200), (768, 1376), (1376, 768)),
    keep_precise=MappingProxyType(
        {
            # Everything outside the blocks, and the first block's attention and gate/up: the exclusion list of the
            # published fp8 checkpoints of ERNIE-Image-Turbo.
            "transformer": (
                r"x_embedder\b",
                r"text_proj\b",
                r"time_embedding\b",
                r"adaLN_modulation\b",
                r"final_norm\b",
                r"final_linear\b",
                r"layers\.0\.self_attention\b",
                r"layers\.0\.mlp\.(gate|up|gate_up)_proj\b",
            ),
            # Text-to-image never calls the vision half of the text encoder: nothing to gain, nothing measured.
            "text_encoder": (r"vision_tower\b", r"multi_modal_projector\b"),
            # Which token comes next is decided by small differences.
            "pe": (r"lm_head\b",),
        }
    ),
    # Files of the published checkpoint, as a derivative's card lists them (Xiejiehang/ERNIE-Image-NF4); the VAE is
    # what remains of the whole.
    weight_bytes=MappingProxyType(
        {
            "transformer": 16_067_025_160,
            "text_encoder": 7_698_241_104,
            "pe": 7_663_346_520,
            "vae": 219_468_267,
        }
    ),
    max_prompt_tokens=2048,
    rewritten="ernie_accel.models.ernie_image.blocks",
    kernels="ernie_accel.models.ernie_image.kernels",
    forward_inputs="ernie_accel.models.ernie_image.inputs:forward_inputs",
    encode_pictures="ernie_accel.models.latents:encode_patches",
    text_argument="text_bth",
    always_masks=AlwaysMasks(lengths="text_lens", text="text_bth", pad_method="_pad_text"),
    prompt_encoding=PromptEncoding(
        layers="language_model.layers", hidden_state=-2, unused=("vision_tower", "multi_modal_projector")
    ),
    prompt_enhancement=PromptEnhancement(
        model="pe", tokenizer="pe_tokenizer", method="_enhance_prompt_with_pe", switch="use_pe"
    ),
    reads_timesteps=True,
)
