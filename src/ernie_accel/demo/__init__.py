"""The embedded model: a real, trained ERNIE-Image pipeline of a few MB, so that a picture takes a minute, no download.

Importing this module imports neither torch nor diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import ErnieImagePipeline

__all__ = ["MODEL_FOLDER", "load", "load_folder"]

MODEL_FOLDER = Path(__file__).parent / "model"
"""Where the weights lie, in the layout of `save_pretrained`, as float16 safetensors."""


def load(dtype: torch.dtype | None = None, prompt_enhancer: bool = True) -> ErnieImagePipeline:
    """Load the embedded pipeline on the CPU, without the network.

    It draws one to four flat shapes on pale backgrounds, from English or Chinese captions, and is good at
    128 x 128 to 128 x 192 pixels, 8 steps and `guidance_scale=1.0`.

    Args:
        dtype: Of all weights; float32 by default, whatever the files hold.
        prompt_enhancer: Load the prompt enhancer too; without it `use_pe=True` leaves prompts as they are.

    Returns:
        A stock `diffusers.ErnieImagePipeline`.
    """
    return load_folder(MODEL_FOLDER, dtype, prompt_enhancer)


def load_folder(folder: Path, dtype: torch.dtype | None = None, prompt_enhancer: bool = True) -> ErnieImagePipeline:
    """Load a pipeline that `ernie_accel.demo.train` saved; arguments as for :func:`load`."""
    import torch
    from diffusers import ErnieImagePipeline

    from ernie_accel.storage.loading import dtype_argument

    options: dict[str, Any] = {**dtype_argument(dtype if dtype is not None else torch.float32)}
    if not prompt_enhancer:
        options |= {"pe": None, "pe_tokenizer": None}
    pipe: ErnieImagePipeline = ErnieImagePipeline.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, **options
    )
    return pipe
