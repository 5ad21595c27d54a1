"""The embedded model as data: its files, the scenes it draws, and the captions it understands.

``ernie_accel.demo.load()`` loads it. It was trained by ``tools/embedded_model``.
"""

from __future__ import annotations

from pathlib import Path

#: Where the weights are, in the layout of ``save_pretrained``, as float16 safetensors.
MODEL_FOLDER = Path(__file__).parent / "model"
