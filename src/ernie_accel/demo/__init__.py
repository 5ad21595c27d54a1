"""The embedded model: a real, trained ERNIE-Image pipeline of a few MB, for a first picture without a download.

Importing this module imports neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import ErnieImagePipeline

__all__ = ["load"]


def load(dtype: torch.dtype | None = None, prompt_enhancer: bool = True) -> ErnieImagePipeline:
    """Load the embedded pipeline on the CPU, without the network.

    It draws one to four flat shapes on pale backgrounds, from English or Chinese captions, and works best at
    128 x 128 to 128 x 192 pixels, 8 steps and `guidance_scale=1.0`.

    Args:
        dtype: Dtype of all weights; float32 by default, whatever the files hold.
        prompt_enhancer: Load the prompt enhancer too; without it `use_pe=True` does not change prompts.

    Returns:
        A stock `diffusers.ErnieImagePipeline`.
    """
    from ernie_accel.storage.embedded import load_embedded

    return load_embedded(dtype, prompt_enhancer)
