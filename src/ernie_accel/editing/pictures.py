"""Pictures and masks as people have them (files, PIL, NumPy, tensors) become tensors in [0, 1], or a clear error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from ernie_accel.editing.files import PictureError, read_picture

#: One picture: a file, a PIL picture, an array [H, W, 3] or a tensor [3, H, W] (or several: [B, ...]).
Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[np.generic] | torch.Tensor"


def as_pictures(image: Picture | Sequence[Picture]) -> torch.Tensor:
    """Return pictures as one tensor [B, 3, H, W], float32 in [0, 1]. What is transparent becomes white.

    Raises:
        PictureError: One cannot be used, or their sizes differ.
    """
    return _together("image", [_as_picture(each, name) for each, name in _each("image", image)])


def as_masks(mask: Picture | Sequence[Picture], size: tuple[int, int]) -> torch.Tensor:
    """Return masks as one tensor [B, 1, H, W], float32 in [0, 1]; 1 (white) is what may change.

    Args:
        mask: As pictures, of which the lightness counts, or without channels: [H, W].
        size: (height, width) of the pictures.

    Raises:
        PictureError: One cannot be used, or is of another size than the pictures.
    """
    masks = []
    for each, name in _each("mask", mask):
        found = _as_mask(each, name)
        if tuple(found.shape[-2:]) != size:
            raise PictureError(
                f"{name} is {_size(found)}, and the picture {size[1]} x {size[0]}: a mask has the size of its picture"
            )
        masks.append(found)
    return _together("mask", masks)


def check_strength(strength: object) -> float:
    """Return a strength.

    Raises:
        PictureError: It is not a number from 0 to 1.
    """
    number = isinstance(strength, (int, float, np.integer, np.floating)) and not isinstance(strength, bool)
    if not number or not 0 <= strength <= 1:  # type: ignore[operator]  # NaN compares as false
        raise PictureError(
            f"strength must be a number from 0 (the picture as it is) to 1 (a new one), got {strength!r}"
        )
    return float(strength)  # type: ignore[arg-type]


def padded(pictures: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return pictures [B, C, H, W] whose last rows and columns are repeated until `multiple` divides both sides."""
    height, width = pictures.shape[-2:]
    return F.pad(pictures, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def resized(pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return pictures [B, C, H, W] in [0, 1] of another size."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    return F.interpolate(pictures, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def finished(images: Any, originals: torch.Tensor, masks: torch.Tensor | None) -> Any:
    """Return what a pipeline drew, cut to the size of the originals; outside the masks it is the originals again.

    Args:
        images: PIL pictures, an array [B, H, W, 3] or a tensor [B, 3, H, W], at least as large as the originals.
        originals: [B, 3, H, W].
        masks: [B, 1, H, W]; None: everything was drawn.
    """
    height, width = originals.shape[-2:]
    if isinstance(images, list):
        tensors = torch.stack([_of_pil(each) for each in images])
        done = finished(tensors, originals, masks).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(each) for each in done]
    if isinstance(images, np.ndarray):
        tensor = finished(torch.from_numpy(images).permute(0, 3, 1, 2), originals, masks)
        return tensor.permute(0, 2, 3, 1).numpy()
    cut = images[..., :height, :width]
    if masks is None:
        return cut
    kept, drawn = originals.to(cut.device, cut.dtype), masks.to(cut.device, cut.dtype)
    return torch.where(drawn == 0, kept, kept + (cut - kept) * drawn)


def _each(kind: str, given: Picture | Sequence[Picture]) -> list[tuple[Picture, str]]:
    """Return the pictures of an argument, each with its name for messages."""
    if isinstance(given, (np.ndarray, torch.Tensor)):
        plain = (3,) if kind == "image" or given.ndim < 4 else ()
        single = given.ndim in (*plain, 2)
        return [(given, kind)] if single or given.ndim != 4 else [(each, f"{kind} {i}") for i, each in enumerate(given)]
    if isinstance(given, (list, tuple)):
        if not given:
            raise PictureError(f"{kind} is an empty {type(given).__name__}; expected at least one")
        return [(each, f"{kind} {i}") for i, each in enumerate(given)] if len(given) > 1 else [(given[0], kind)]
    return [(given, kind)]  # type: ignore[list-item]  # the sequences are lists and tuples


def _together(kind: str, found: list[torch.Tensor]) -> torch.Tensor:
    other = next((each for each in found if each.shape != found[0].shape), None)
    if other is not None:
        raise PictureError(
            f"the pictures of one call have one size; found {_size(found[0])} and {_size(other)} as {kind}: resize "
            "them, or make a call for each size"
        )
    return torch.stack(found)


def _as_picture(given: object, name: str) -> torch.Tensor:
    if isinstance(given, (str, os.PathLike)):
        given = read_picture(given)
    if isinstance(given, Image.Image):
        return _of_pil(_opaque(given, name))
    if isinstance(given, np.ndarray):
        if given.ndim != 3 or given.shape[-1] != 3:
            raise PictureError(f"{name} is an array {given.shape}; expected [H, W, 3]")
        return _in_range(torch.from_numpy(np.array(given)).permute(2, 0, 1), name)
    if isinstance(given, torch.Tensor):
        if given.ndim != 3 or given.shape[0] != 3:
            raise PictureError(f"{name} is a tensor {tuple(given.shape)}; expected [3, H, W]")
        return _in_range(given, name)
    raise PictureError(f"{name} is {given!r}; expected a file, a PIL picture, an array [H, W, 3] or a tensor [3, H, W]")


def _as_mask(given: object, name: str) -> torch.Tensor:
    if isinstance(given, (str, os.PathLike)):
        given = read_picture(given)
    if isinstance(given, Image.Image):
        return _from_bytes(_opaque(given, name).convert("L"))[None]
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(np.array(given))
    if not isinstance(given, torch.Tensor):
        raise PictureError(f"{name} is {given!r}; expected a file, a PIL picture, or an array or tensor [H, W]")
    if given.ndim == 3 and 1 in (given.shape[0], given.shape[-1]):
        given = given.squeeze(0 if given.shape[0] == 1 else -1)
    if given.ndim != 2:
        raise PictureError(f"{name} has the shape {tuple(given.shape)}; expected [H, W]")
    if given.dtype == torch.uint8 and given.numel() and int(given.max()) == 1:
        raise PictureError(f"{name} holds bytes from 0 to 1, and bytes go to 255: pass it as bool")
    return _in_range(given, name)[None]


def _opaque(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture of 8 bits a channel, without transparency, on white."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        raise PictureError(f"{name} has more than 8 bits a channel (mode {picture.mode!r}): convert it first")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def _of_pil(picture: Image.Image) -> torch.Tensor:
    return _from_bytes(picture).permute(2, 0, 1)


def _from_bytes(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).float() / 255


def _in_range(values: torch.Tensor, name: str) -> torch.Tensor:
    """Return values as float32 in [0, 1] on the CPU."""
    if 0 in values.shape:
        raise PictureError(f"{name} is empty: {tuple(values.shape)}")
    if values.dtype == torch.uint8:
        return values.float().cpu() / 255
    if values.dtype != torch.bool and not values.is_floating_point():
        raise PictureError(f"{name} holds {values.dtype}; expected bytes (0 to 255), bool, or floats from 0 to 1")
    found = values.detach().float().cpu()
    if not bool(found.isfinite().all()):
        raise PictureError(f"{name} has NaN or infinite values")
    low, high = float(found.min()), float(found.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise PictureError(f"{name} goes from {low:g} to {high:g}; expected floats from 0 to 1")
    return found.clamp(0, 1)


def _size(picture: torch.Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"
