"""Know the columns that say a setting in other words, so that they are pointed out and not ignored."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from ernie_accel.batch.input.row import SETTINGS
from ernie_accel.common.language import said

# What other tools and libraries call the same: diffusers, AUTOMATIC1111, ComfyUI, InvokeAI, the OpenAI images API.
_ALIASES = {
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "guidance_strength": "guidance_scale",
    "true_cfg_scale": "guidance_scale",
    "num_inference_steps": "steps",
    "inference_steps": "steps",
    "num_steps": "steps",
    "n_steps": "steps",
    "sampling_steps": "steps",
    "denoising_steps": "steps",
    "negative": "negative_prompt",
    "neg": "negative_prompt",
    "neg_prompt": "negative_prompt",
    "prompt_negative": "negative_prompt",
    "positive": "prompt",
    "positive_prompt": "prompt",
    "prompt_text": "prompt",
    "random_seed": "seed",
    "noise_seed": "seed",
    "image_width": "width",
    "img_width": "width",
    "width_px": "width",
    "image_height": "height",
    "img_height": "height",
    "height_px": "height",
    "num_images": "variants",
    "num_images_per_prompt": "variants",
    "images_per_prompt": "variants",
    "num_variants": "variants",
    "init_image": "image",
    "input_image": "image",
    "source_image": "image",
    "mask_image": "mask",
    "lora_path": "lora",
    "lora_file": "lora",
    "lora_weight": "lora_scale",
    "lora_strength": "lora_scale",
    "denoise": "strength",
    "denoising_strength": "strength",
}

# Settings of pictures that no column holds.
_WHOLE_JOB = {
    "sampler": "the whole job has one sampler: choose it with --sampler",
    "sampler_name": "the whole job has one sampler: choose it with --sampler",
    "scheduler": "the whole job has one sampler: choose it with --sampler",
    "clip_skip": "the text encoder is used as the model was trained with it",
    "aspect_ratio": "write 'width' and 'height'",
}

# Words of a shop that differ from a setting by a letter.
_OTHER_WORDS = frozenset({"weight", "eight", "speed", "steep", "stops", "stems", "impromptu"})


def ignored_column(name: str, columns: Collection[str], *, has_template: bool) -> str | None:
    """Return what to do with a column that looks like a setting but is not (None: it does not look like one).

    Args:
        name: The column.
        columns: All columns.
        has_template: Whether prompts are made by a template, so that no column needs to be called `prompt`.
    """
    if name in SETTINGS:
        return None
    # "cfgScale", "CFG scale" and "cfg-scale" are all cfg_scale.
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name[:100])
    plain = re.sub(r"\W+", "_", plain).strip("_").lower()
    if reason := _WHOLE_JOB.get(plain):
        return said("{reason}; delete it", reason=said(reason))
    meant = plain if plain in SETTINGS else _ALIASES.get(plain)
    if meant is None and plain not in _OTHER_WORDS:
        alike = [setting for setting in SETTINGS if abs(len(setting) - len(plain)) <= 1]
        meant = next(iter(difflib.get_close_matches(plain, alike, n=1, cutoff=0.8)), None)
    if meant is None or (has_template and meant == "prompt"):
        return None
    if meant in columns:
        return said("delete it, beside {meant!r}", meant=meant)
    return said("rename it to {meant!r}", meant=meant)
