"""The embedded model as data: its files, the scenes it draws, and the captions it understands.

``ernie_accel.demo.load()`` loads it. It was trained by ``tools/embedded_model``.
"""

from __future__ import annotations

from pathlib import Path

#: Where the weights are, in the layout of ``save_pretrained``, as float16 safetensors.
MODEL_FOLDER = Path(__file__).parent / "model"

#: Width and height that it is good at; diffusers' default of 1024 x 1024 takes minutes, and shows no shapes.
SIZE_PX = (128, 128)


def is_embedded(pipe: object) -> bool:
    """Return whether a pipe, or whatever else draws, is the embedded model: by where it was loaded from."""
    return str(getattr(pipe, "name_or_path", "")) == str(MODEL_FOLDER)
