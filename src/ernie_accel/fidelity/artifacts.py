"""Keep what an evaluation was made from: the pictures of both sides, a contact sheet, the page and the data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ernie_accel.core.atomic import write_atomically
from ernie_accel.demo.sheet import Column, contact_sheet

if TYPE_CHECKING:
    import torch

    from ernie_accel.fidelity.evaluation import Evaluation


def save(evaluation: Evaluation, folder: Path) -> Path:
    """Write evaluation.md, evaluation.json, sheet.png and baseline-N.png, candidate-N.png into `folder`.

    Values that are not finite are drawn as black; the page names them.

    Returns:
        The folder.

    Raises:
        OSError: It cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "evaluation.md", evaluation.to_markdown().encode())
    write_atomically(folder / "evaluation.json", evaluation.to_json().encode())
    columns = []
    for number, compared in enumerate(evaluation.pictures, start=1):
        pair = as_picture(compared.baseline.image), as_picture(compared.candidate.image)
        for side, picture in zip(("baseline", "candidate"), pair, strict=True):
            file = io.BytesIO()
            picture.save(file, format="PNG")
            write_atomically(folder / f"{side}-{number}.png", file.getvalue())
        columns.append(Column(compared.prompt, pair))
    sides = (evaluation.baseline, evaluation.candidate)
    contact_sheet(columns, folder / "sheet.png", rows=[f"{side.name}\n{side.picture_ms:.0f} ms" for side in sides])
    return folder


def as_picture(image: torch.Tensor) -> Image.Image:
    """Return an image [3, H, W] in [0, 1] as a picture of 8 bits a channel."""
    pixels = image.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
