"""What happens while a model is read, which mostly is importing: its kernels are compiled, its device wakes up."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import torch

from ernie_accel.core.context import Context
from ernie_accel.core.transform import Transform
from ernie_accel.families import families
from ernie_accel.kernels import ahead
from ernie_accel.storage.folders import current
from ernie_accel.storage.manifest import INDEX, MANIFEST, open_manifest
from ernie_accel.transforms.denoiser.fuse_kernels import FuseKernels

#: An index has some hundred bytes. What is longer is none, and reported by whoever reads it.
_LARGEST_INDEX = 2**20


def prepare(model: str | os.PathLike[str], transforms: Iterable[Transform], machine: Context) -> None:
    """Begin with what the first picture of a model needs on CUDA, while it is about to be read.

    The kernels that it will launch are compiled, if a list of them is known, and the device's libraries are loaded.

    Args:
        model: A folder of diffusers, or one that `save` wrote; for a hub id nothing is done.
        transforms: What it is read with, beside what it was saved with.
        machine: Where it will run.
    """
    folder = current(Path(model))
    if machine.device != "cuda" or machine.capability is None or not folder.is_dir():
        return
    # It ends within two seconds. A daemon could be within CUDA when the process ends.
    threading.Thread(target=_wake, args=(machine.torch_device,), name="ernie_accel: wakes the device").start()
    name = _transformer_class(folder)
    for family in [each for each in families() if name in each.transformer_classes][:1]:
        for precision in _precisions(folder, transforms):
            ahead.start(family.name, precision, machine.capability)


def _wake(device: str) -> None:
    """Have a device make its context, and load cuBLAS, cuDNN and attention: 1.4 s of a first picture on an H200."""
    with contextlib.suppress(Exception):  # what does not work here is reported by whoever needs it
        x = torch.zeros(1, 16, 16, 16, device=device, dtype=torch.bfloat16)
        torch.matmul(x, x)
        torch.nn.functional.conv2d(x, torch.zeros(16, 16, 3, 3, device=device, dtype=x.dtype), padding=1)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)


def _transformer_class(folder: Path) -> str | None:
    """Return the class that the index names; None if it names none, for whoever reads it to complain about."""
    try:
        with (folder / INDEX).open(encoding="utf-8") as file:
            index = json.loads(file.read(_LARGEST_INDEX))
        _, name = index["transformer"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return name if isinstance(name, str) else None


def _precisions(folder: Path, transforms: Iterable[Transform]) -> set[str]:
    """Return the precisions of the kernels that a pipe will run on: one, or none."""
    asked = {each.precision for each in transforms if isinstance(each, FuseKernels)}
    if asked or not (folder / MANIFEST).is_file():
        return asked
    saved = [each.transform for each in open_manifest(folder).transforms if each.changed]
    return {str(data.get("precision")) for data in saved if data.get("transform") == FuseKernels.__name__}
