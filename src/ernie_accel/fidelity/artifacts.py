"""Keep what an evaluation was made from: the pictures of both sides, a contact sheet, the page and the data."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from ernie_accel.common.atomic import write_atomically
from ernie_accel.common.contact_sheet import Column, contact_sheet

if TYPE_CHECKING:
    import torch


class Pair(NamedTuple):
    """The same picture by both sides.

    Attributes:
        prompt: What was drawn.
        baseline: [3, H, W] in [0, 1].
        candidate: The same shape.
    """

    prompt: str
    baseline: torch.Tensor
    candidate: torch.Tensor


def save(folder: Path, pages: Mapping[str, str], pairs: Iterable[Pair], rows: Sequence[str]) -> Path:
    """Write pages, sheet.png and baseline-N.png, candidate-N.png into `folder`.

    Values that are not finite are drawn as black; the page names them.

    Args:
        folder: Made if it is not there.
        pages: File name -> text.
        pairs: The pictures.
        rows: What the sheet says of baseline and candidate.

    Returns:
        The folder.

    Raises:
        OSError: It cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        write_atomically(folder / name, text.encode())
    columns = []
    for number, pair in enumerate(pairs, start=1):
        pictures = as_picture(pair.baseline), as_picture(pair.candidate)
        for side, picture in zip(("baseline", "candidate"), pictures, strict=True):
            file = io.BytesIO()
            picture.save(file, format="PNG")
            write_atomically(folder / f"{side}-{number}.png", file.getvalue())
        columns.append(Column(pair.prompt, pictures))
    contact_sheet(columns, folder / "sheet.png", rows=list(rows))
    return folder


def as_picture(image: torch.Tensor) -> Image.Image:
    """Return an image [3, H, W] in [0, 1] as a picture of 8 bits a channel."""
    pixels = image.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
