"""The only module that knows ComfyUI: its folders, progress bar, interrupts, and who holds the card.

Nothing here copies or changes ComfyUI. Outside of it (the library's tests) there is no progress and no interrupt.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


class HostError(ValueError):
    """A name or a path that a workflow may not use."""


def _comfy(name: str) -> Any:
    """Return a module of ComfyUI, or None where there is no ComfyUI; what is wrong inside of it is raised."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return None
        raise


# Folders ------------------------------------------------------------------------------------------------------------


def _folders(kind: str) -> list[Path]:
    paths = _comfy("folder_paths")
    if paths is None or kind not in paths.folder_names_and_paths:
        return []
    return [Path(each) for each in paths.get_folder_paths(kind)]


def files(kind: str, *suffixes: str) -> list[str]:
    """Return the names of files below ComfyUI's folders for a kind of model ("loras"), as its own lists have them."""
    found = {
        path.relative_to(folder).as_posix()
        for folder in _folders(kind)
        for path in (folder.rglob("*") if folder.is_dir() else ())
        if path.suffix.lower() in suffixes and path.is_file()
    }
    return sorted(found)


def find(kind: str, name: str) -> Path:
    """Return what `name` names below ComfyUI's folders for a kind of model.

    Raises:
        HostError: There is none, or the name leads out of them.
    """
    _check_inside(name, f"models/{kind}")
    for folder in _folders(kind):
        if (folder / name).exists():
            return folder / name
    raise HostError(f"there is no {name!r} in ComfyUI's models/{kind}")


def in_input(name: Path) -> Path:
    """Return a path below ComfyUI's input folder."""
    return _in("input", name)


def in_output(name: Path) -> Path:
    """Return a path below ComfyUI's output folder."""
    return _in("output", name)


def output_folder() -> Path:
    """Return ComfyUI's output folder."""
    return _place("output")


def _in(kind: str, name: Path) -> Path:
    _check_inside(str(name), f"the {kind} folder")
    return _place(kind) / name


def _place(kind: str) -> Path:
    paths = _comfy("folder_paths")
    if paths is None:
        raise HostError("this node runs inside ComfyUI only: there is no folder_paths")
    return Path(paths.get_input_directory() if kind == "input" else paths.get_output_directory())


def _check_inside(name: str, where: str) -> None:
    """Refuse a name that leads elsewhere on any system: a workflow, which may be anybody's, must not choose places."""
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or ":" in name or parts[0] == "" or ".." in parts:
        raise HostError(f"{name!r} does not name a place in ComfyUI's {where}: give a path inside it, without '..'")


# Progress and interrupts --------------------------------------------------------------------------------------------


class Progress:
    """The progress bar of the node at work; counts, and ends the node when the user interrupts it."""

    def __init__(self, total: int = 1) -> None:
        utils = _comfy("comfy.utils")
        self._bar = None if utils is None else utils.ProgressBar(total)

    def show(self, done: int, total: int) -> None:
        """Show how far it is, and raise ComfyUI's own exception if it was interrupted."""
        check_interrupt()
        if self._bar is not None:
            self._bar.update_absolute(done, total)

    def after_step(self, pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Be a pipeline's ``callback_on_step_end``."""
        self.show(step + 1, max(step + 1, len(pipe.scheduler.timesteps)))
        return tensors


def check_interrupt() -> None:
    """Raise ComfyUI's InterruptProcessingException if the user interrupted."""
    management = _comfy("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


def is_interrupted() -> bool:
    """Return whether the user interrupted; `check_interrupt` must follow, which ends the node."""
    management = _comfy("comfy.model_management")
    return management is not None and bool(management.processing_interrupted())


# Memory -------------------------------------------------------------------------------------------------------------


def device() -> str | None:
    """Return the device that ComfyUI runs models on, as torch names it; None outside of it."""
    management = _comfy("comfy.model_management")
    return None if management is None else str(management.get_torch_device())


def make_room() -> None:
    """Have ComfyUI unload all models that it knows of."""
    management = _comfy("comfy.model_management")
    if management is not None:
        management.unload_all_models()
        management.soft_empty_cache()


def hold_card(patcher: Any, nbytes: int) -> None:
    """Tell ComfyUI that a pipe is about to compute: it is the one used last, and the others make room for it.

    Args:
        patcher: Stands for the pipe.
        nbytes: What the pipe holds on the device.
    """
    management = _comfy("comfy.model_management")
    if management is None or patcher is None:
        return
    patcher.hold(nbytes)
    management.load_models_gpu([patcher])
    ours = [loaded for loaded in management.current_loaded_models if loaded.model is patcher]
    management.free_memory(1e30, patcher.load_device, keep_loaded=ours)


def patcher_for(release: Callable[[], None]) -> Any:
    """Return what stands for a pipe in ComfyUI's list of loaded models; None outside of it.

    Args:
        release: A method that lets the pipe go. Its object is not kept alive.
    """
    return None if _comfy("comfy.model_management") is None else _patcher_class()(weakref.WeakMethod(release))


class ErnieAccelPipe(torch.nn.Module):
    """The name under which ComfyUI's log mentions a pipe; it has no weights of its own."""


@functools.cache
def _patcher_class() -> Any:
    from comfy import model_management
    from comfy.model_patcher import ModelPatcher

    class HeldPatcher(ModelPatcher):  # type: ignore[misc, valid-type]  # ComfyUI has no types
        """A model that is either on the card, as its plan placed it, or gone: no part of it can be moved alone."""

        def __init__(self, release: Callable[[], Callable[[], None] | None]) -> None:
            self._release, self._bytes, self._is_held = release, 1, False
            super().__init__(ErnieAccelPipe(), model_management.get_torch_device(), torch.device("cpu"), size=1)

        def hold(self, nbytes: int) -> None:
            """Say that the pipe is there, with so many bytes on the device."""
            self._bytes, self._is_held = max(1, nbytes), True

        def model_size(self) -> int:
            return self._bytes

        def loaded_size(self) -> int:
            return self._bytes if self._is_held else 0

        def current_loaded_device(self) -> torch.device:
            return self.load_device if self._is_held else self.offload_device

        def partially_load(self, *_: Any, **__: Any) -> int:
            return 0

        def partially_unload(self, *_: Any, **__: Any) -> int:
            return 0

        def detach(self, unpatch_all: bool = True) -> Any:
            release = self._release()
            if unpatch_all and self._is_held and release is not None:
                self._is_held = False
                release()
            return self.model

    return HeldPatcher


def device_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of weights that are not on the host."""
    seen = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type not in ("cpu", "meta"):
                seen[tensor.data_ptr()] = tensor.nbytes
    return sum(seen.values())
