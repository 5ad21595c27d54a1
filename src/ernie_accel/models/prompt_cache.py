"""Where embeddings of prompts are kept between calls: in memory, or as safetensors files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ernie_accel.common.atomic import write_atomically
from ernie_accel.core.captured import Watch, adapters_of, plain_tensors

#: What a pipeline makes of one text: a tensor, or several in tuples and lists.
Embedded: TypeAlias = Tensor | tuple["Embedded", ...] | list["Embedded"] | None


def each_tensor(embedded: Embedded, change: Callable[[Tensor], Tensor]) -> Embedded:
    """Return `embedded` with every tensor changed."""
    if isinstance(embedded, tuple):
        return tuple(each_tensor(part, change) for part in embedded)
    if isinstance(embedded, list):
        return [each_tensor(part, change) for part in embedded]
    return None if embedded is None else change(embedded)


class PromptMemory:
    """The embeddings of the last `size` texts, and of those that are pinned for good."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[Hashable, Embedded] = OrderedDict()
        self._pinned: dict[Hashable, Embedded] = {}
        self._watches: list[Watch] = []

    def look_at(self, encoders: Sequence[nn.Module], pins: bool) -> None:
        """Forget all, unless `encoders` encode as they did; with `pins`, also where nothing else is kept."""
        if not self._size and not pins:
            return
        if _have_changed(self._watches, encoders):
            self._kept.clear()
            self._pinned.clear()

    def get(self, key: Hashable, device: torch.device) -> Embedded:
        """Return what was kept, on `device`; None if nothing was."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return each_tensor(self._kept.get(key, self._pinned.get(key)), lambda tensor: tensor.to(device))

    def put(self, key: Hashable, embedded: Embedded, pin: bool = False) -> None:
        """Keep the embeddings of a text; `pin` them to keep them whatever the size is."""
        if pin:
            self._pinned[key] = embedded
            return
        self._kept[key] = embedded
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)


class PromptFiles:
    """The embeddings of the last `size` texts, one safetensors file each; when a file was last used is its mtime."""

    def __init__(self, size: int, folder: Path) -> None:
        self._size, self._folder = size, folder
        self._latest = 0
        self._watches: list[Watch] = []
        self._model: str | None = None  # identifies checkpoint and adapters; None while weights are elsewhere
        folder.mkdir(parents=True, exist_ok=True)

    def look_at(self, encoders: Sequence[nn.Module], pins: bool) -> None:
        """Find out which files belong to `encoders` in their present state."""
        if _have_changed(self._watches, encoders):
            self._model = None
        if self._model is None and all(watch.is_whole for watch in self._watches):
            self._model = " ".join(map(_fingerprint, encoders))

    def get(self, key: Hashable, device: torch.device) -> Embedded:
        """Return what was kept, on `device`; None if nothing was, or the file is damaged."""
        from safetensors import SafetensorError, safe_open

        if self._model is None:
            return None
        file = self._file(key)
        try:
            with safe_open(file, framework="pt") as opened:
                form = json.loads((opened.metadata() or {}).get("form", '"hidden"'))
                embedded = _from_form(form, lambda name: opened.get_tensor(name).to(device))
        except (FileNotFoundError, SafetensorError):  # missing or truncated: encode it again
            return None
        with contextlib.suppress(FileNotFoundError):  # another process may have dropped it meanwhile
            self._was_used(file)
        return embedded

    def put(self, key: Hashable, embedded: Embedded, pin: bool = False) -> None:
        """Keep the embeddings of a text in a file of its own; files are not pinned."""
        from safetensors.torch import save

        if self._model is None:
            return
        tensors: dict[str, Tensor] = {}
        form = json.dumps(_to_form(embedded, tensors))
        write_atomically(self._file(key), save(tensors, {"form": form}))
        with contextlib.suppress(FileNotFoundError):
            self._was_used(self._file(key))
        files = sorted(self._folder.glob("*.safetensors"), key=_used_at)
        for file in files[: max(0, len(files) - self._size)]:
            file.unlink(missing_ok=True)

    def _was_used(self, file: Path) -> None:
        # By a clock of nanoseconds: what the kernel writes by itself moves on every few milliseconds only.
        self._latest = max(time.time_ns(), self._latest + 1)
        os.utime(file, ns=(self._latest, self._latest))

    def _file(self, key: Hashable) -> Path:
        digest = hashlib.sha256(f"{self._model} {key}".encode()).hexdigest()
        return self._folder / f"{digest}.safetensors"


def _used_at(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # another process has dropped it
        return 0


def _have_changed(watches: list[Watch], encoders: Sequence[nn.Module]) -> bool:
    """Look at every one of `encoders`, and return whether what was remembered of any is stale."""
    if len(watches) != len(encoders):
        watches[:] = [Watch() for _ in encoders]
    changed = [watch.has_changed(each) for watch, each in zip(watches, encoders, strict=True)]
    return any(changed)


def _to_form(embedded: Embedded, tensors: dict[str, Tensor]) -> object:
    """Return which tensors are where, as JSON takes it, and add them to `tensors` by name."""
    if isinstance(embedded, (tuple, list)):
        return {type(embedded).__name__: [_to_form(part, tensors) for part in embedded]}
    if embedded is None:
        return None
    name = f"hidden{len(tensors) or ''}"
    tensors[name] = embedded.cpu().contiguous()
    return name


def _from_form(form: object, tensor: Callable[[str], Tensor]) -> Embedded:
    if isinstance(form, dict):
        parts = [_from_form(part, tensor) for part in next(iter(form.values()))]
        return tuple(parts) if "tuple" in form else parts
    return None if form is None else tensor(str(form))


#: Integers of a tensor's item size: their sums are exact, so they are the same on every device.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(module: nn.Module) -> str:
    """Return a digest of a model's weights: shapes, dtypes, the sum of the bits in each row, and which adapters count.

    It reads all weights, because a script may have changed one row of them.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        for tensor in plain_tensors(parameter.detach()):
            bits = tensor.view(_INTEGERS[tensor.element_size()])
            rows = bits.flatten(1).sum(1, dtype=torch.int64) if bits.ndim > 1 else bits
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(rows.cpu().contiguous().numpy().tobytes())
    for name, part in module.named_modules():
        adapters = list(adapters_of(part))
        if adapters:
            digest.update(f"{name} {adapters}".encode())
    return digest.hexdigest()
