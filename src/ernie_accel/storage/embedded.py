"""Load the pipeline that travels with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ErnieImagePipeline

from ernie_accel.core.dtypes import dtype_argument
from ernie_accel.embedded import MODEL_FOLDER


def load_embedded(dtype: torch.dtype | None = None, prompt_enhancer: bool = True) -> ErnieImagePipeline:
    """Load the embedded pipeline on the CPU; see ``ernie_accel.demo.load``."""
    return load_folder(MODEL_FOLDER, dtype, prompt_enhancer)


def load_folder(folder: Path, dtype: torch.dtype | None = None, prompt_enhancer: bool = True) -> ErnieImagePipeline:
    """Load a pipeline that ``tools/embedded_model`` saved; arguments as for ``ernie_accel.demo.load``."""
    options: dict[str, object] = {**dtype_argument(dtype if dtype is not None else torch.float32)}
    if not prompt_enhancer:
        options |= {"pe": None, "pe_tokenizer": None}
    pipe: ErnieImagePipeline = ErnieImagePipeline.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, **options
    )
    return pipe
