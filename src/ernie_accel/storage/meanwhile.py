"""What goes on while a model is read (mostly imports): its kernels are compiled, and its device wakes up."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import torch

from ernie_accel.core.context import Context
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.transform import Transform
from ernie_accel.families import families
from ernie_accel.kernels import ahead
from ernie_accel.storage.folders import current
from ernie_accel.storage.manifest import INDEX, MANIFEST, open_manifest
from ernie_accel.transforms.denoiser.fuse_kernels import FuseKernels

#: Bytes. An index has a few hundred; a longer file is none, which whoever reads it reports.
_LARGEST_INDEX = 2**20


def prepare(
    model: str | os.PathLike[str], transforms: Iterable[Transform], machine: Context, device: str | None = None
) -> None:
    """Begin with what the first picture of a model needs on CUDA, while it is about to be read.

    The kernels that it will launch are compiled, if a list of them is known, and the device's libraries are loaded.
    Both go on after this returns, and nobody hears of it if they fail: a launch then does what is missing.

    Args:
        model: A folder of diffusers, or one that `save` wrote; for a hub id nothing is done.
        transforms: What it is read with, beside what it was saved with. Of several `FuseKernels` the first counts.
        machine: Where it will run.
        device: The name of that device, as "cuda:1"; None: where `MoveTo` sends it, else the current CUDA device.
    """
    if machine.device != "cuda" or machine.capability is None:
        return
    folder, transforms = current(Path(model)), tuple(transforms)
    if not folder.is_dir():
        return
    moved_to = (each.moves_to for each in transforms if each.moves_to is not None)
    _start_to_wake(device or next(moved_to, machine.torch_device))
    transformer = _transformer_class(folder)
    known = [each.name for each in families() if transformer in each.transformer_classes]
    precision = _precision(folder, transforms) if known else None
    if precision is not None:
        ahead.start(known[0], precision, machine.capability)


def _start_to_wake(device: str) -> None:
    """Have a thread wake a CUDA device, by its number: a new thread's current device is the first one.

    The thread ends within two seconds. It is no daemon, which could be within CUDA when the process ends.
    """
    with contextlib.suppress(Exception):  # what does not work here is reported by whoever needs it
        where = torch.device(device)
        if where.type == "cuda":
            number = torch.cuda.current_device() if where.index is None else where.index
            threading.Thread(target=_wake, args=(f"cuda:{number}",), name="ernie_accel: wakes the device").start()


def _wake(device: str) -> None:
    """Create a device's context, and load cuBLAS, cuDNN and attention: 1.4 s of a first picture on an H200."""
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


def _precision(folder: Path, transforms: Iterable[Transform]) -> str | None:
    """Return the precision of the kernels that a pipe will run on; None for one that runs on none, or is damaged."""
    asked = next((each.precision for each in transforms if isinstance(each, FuseKernels)), None)
    if asked is not None or not (folder / MANIFEST).is_file():
        return asked
    try:
        saved = [each.transform for each in open_manifest(folder).transforms if each.changed]
    except (OSError, ErnieAccelError):  # for whoever reads it to complain about
        return None
    fused = (data for data in saved if data.get("transform") == FuseKernels.__name__)
    return next((str(data.get("precision")) for data in fused), None)
