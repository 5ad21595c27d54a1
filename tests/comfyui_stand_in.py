"""Stand in for ComfyUI, as its documents describe it for custom nodes: how it imports, checks, runs and caches them.

Not ComfyUI's code, and not all that it does: ``python -m tools.comfyui.run PATH`` runs the same workflows through
ComfyUI itself. What is stood in for here: `folder_paths`, the progress bar, interrupts, the list of models that hold
the card with the calls that ComfyUI makes to each (`ModelPatcher`), and the executor, in inference mode.
"""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

NODES = Path(__file__).parents[1] / "integrations" / "comfyui"


class InterruptProcessingException(Exception):
    """The user interrupted."""


class ModelPatcher:
    """What a class of nodes inherits to stand for a model."""

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.parent = None

    def model_patches_models(self) -> list[Any]:
        return []

    def is_clone(self, other: Any) -> bool:
        return self.model is other.model


class LoadedModel:
    def __init__(self, patcher: Any) -> None:
        self._patcher, self.device = weakref.ref(patcher), patcher.load_device

    @property
    def model(self) -> Any:
        return self._patcher()


class Host:
    """A running ComfyUI.

    Attributes:
        modules: What nodes can import from it, by name.
        loaded: The models that hold the card, the last one used first.
        bars: What progress bars showed: (done, total).
        interrupt_after: Interrupts once so many steps were shown; None: never.
        unloads: How often all models were asked to go.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: list[LoadedModel] = []
        self.bars: list[tuple[int, int]] = []
        self.interrupt_after: int | None = None
        self.unloads = 0
        self._interrupted = False
        for name in ("input", "output", "models/loras", "models/diffusion_models", "models/diffusers"):
            (root / name).mkdir(parents=True)
        self.modules = self._modules()

    # Memory

    def load_models_gpu(self, patchers: list[Any]) -> None:
        for patcher in patchers:
            assert patcher.model_patches_models() == []
            for there in [each for each in self.loaded if patcher.is_clone(each.model)]:
                self.loaded.remove(there)
                there.model.detach(unpatch_all=False)
            assert patcher.model_size() >= patcher.loaded_size() >= 0
            patcher.partially_load(patcher.load_device, 1e32, force_patch_weights=False)
            self.loaded.insert(0, LoadedModel(patcher))

    def free_memory(self, nbytes: float, device: Any, keep_loaded: Any = ()) -> None:
        self.loaded[:] = [each for each in self.loaded if each.model is not None]
        for each in [each for each in self.loaded if each not in keep_loaded and each.device == device]:
            if each.model.partially_unload(each.model.offload_device, nbytes) >= nbytes:
                continue
            each.model.detach(True)
            # As ComfyUI's log does: what stood for the model must still be there.
            assert type(each.model.model).__name__
            self.loaded.remove(each)

    def unload_all_models(self) -> None:
        self.unloads += 1
        self.free_memory(1e30, torch.device("cpu"))

    # Interrupts

    def interrupt(self) -> None:
        self._interrupted = True

    def throw_if_interrupted(self) -> None:
        if self._interrupted:
            self._interrupted = False
            raise InterruptProcessingException

    def _show(self, done: int, total: int) -> None:
        self.bars.append((done, total))
        if self.interrupt_after is not None and len(self.bars) >= self.interrupt_after:
            self.interrupt_after = None
            self.interrupt()

    def _modules(self) -> dict[str, ModuleType]:
        host = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None) -> None:
                self.total = self.total if total is None else total
                host._show(value, self.total)

        def folder_of(name: str) -> Callable[[], str]:
            return lambda: str(host.root / name)

        kinds = {name: ([str(host.root / "models" / name)], set()) for name in ("loras", "diffusion_models")}
        kinds["diffusers"] = ([str(host.root / "models" / "diffusers")], {"folder"})
        made = {
            "folder_paths": {
                "folder_names_and_paths": kinds,
                "get_folder_paths": lambda name: list(kinds[name][0]),
                "get_input_directory": folder_of("input"),
                "get_output_directory": folder_of("output"),
            },
            "comfy": {},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "comfy.model_management": {
                "get_torch_device": lambda: torch.device("cpu"),
                "unload_all_models": self.unload_all_models,
                "soft_empty_cache": lambda: None,
                "load_models_gpu": self.load_models_gpu,
                "free_memory": self.free_memory,
                "throw_exception_if_processing_interrupted": self.throw_if_interrupted,
                "processing_interrupted": lambda: self._interrupted,
                "current_loaded_models": self.loaded,
                "InterruptProcessingException": InterruptProcessingException,
            },
        }
        modules = {name: ModuleType(name) for name in made}
        for name, content in made.items():
            vars(modules[name]).update(content)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, modules[name])
        return modules


def load_nodes() -> Any:
    """Import the nodes as ComfyUI does: a module named by its path, made of the folder's ``__init__``."""
    name = str(NODES).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def running(root: Path) -> Iterator[tuple[Host, Any]]:
    """Give a host and the nodes, imported afresh in it; everything is gone afterwards."""
    before = set(sys.modules)
    host = Host(root)
    sys.modules.update(host.modules)
    try:
        yield host, load_nodes()
    finally:
        mine = str(NODES).replace(".", "_x_")
        for name in {each for each in sys.modules if each.startswith(mine)} | (set(host.modules) - before):
            del sys.modules[name]


# Nodes of ComfyUI's own --------------------------------------------------------------------------------------------


class SaveImage:
    """Takes pictures; here they are kept."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}}

    def save(self, images: torch.Tensor, filename_prefix: str = "") -> dict[str, Any]:
        return {"ui": {"images": [images]}}


class PreviewImage(SaveImage):
    """Takes pictures, too."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}}


class LoadImage:
    """Reads a picture of the input folder, and its mask: what is transparent."""

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (["example.png"], {"image_upload": True})}}

    def load(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        import folder_paths

        with Image.open(Path(folder_paths.get_input_directory()) / image) as opened:
            pixels = torch.from_numpy(np.asarray(opened.convert("RGB")).astype("float32") / 255)[None]
        return pixels, torch.zeros(1, 64, 64)


OwnNodes: dict[str, Any] = {"SaveImage": SaveImage, "PreviewImage": PreviewImage, "LoadImage": LoadImage}


# The executor ------------------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """A graph that is not run: what is wrong with it."""


class Executor:
    """Checks and runs graphs; what has not changed since the last one is not run again."""

    def __init__(self, classes: Mapping[str, Any]) -> None:
        self.classes = classes
        self.ran: list[str] = []
        self._kept: dict[str, tuple[Any, Any, dict[str, Any]]] = {}

    def run(self, prompt: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return what each output node shows, by number."""
        problems = [problem for number in prompt for problem in self._problems(prompt, number)]
        if problems:
            raise RefusedError("; ".join(problems))
        self.ran = []
        self._kept = {number: kept for number, kept in self._kept.items() if number in prompt}
        shown = {}
        with torch.inference_mode():
            for number, node in prompt.items():
                if getattr(self.classes[node["class_type"]], "OUTPUT_NODE", False):
                    shown[number] = self._result(prompt, number)[1]
        return shown

    def forget(self) -> None:
        """Let all results go."""
        self._kept.clear()

    def _problems(self, prompt: Mapping[str, Mapping[str, Any]], number: str) -> Iterator[str]:
        cls, given = self.classes[prompt[number]["class_type"]], dict(prompt[number]["inputs"])
        types = cls.INPUT_TYPES()
        assert set(types) <= {"required", "optional", "hidden"}
        specs = {**types.get("required", {}), **types.get("optional", {})}
        yield from (f"{number}: {name} is missing" for name in types.get("required", {}) if name not in given)
        validate = getattr(cls, "VALIDATE_INPUTS", None)
        checked = set(validate.__code__.co_varnames[1 : validate.__code__.co_argcount]) if validate else set()
        for name, value in given.items():
            kind, settings = specs[name][0], specs[name][1] if len(specs[name]) > 1 else {}
            if isinstance(value, list):
                other = self.classes[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                if other != kind:
                    yield f"{number}: {name} is {other}, not {kind}"
            elif name in checked:
                continue
            elif isinstance(kind, list):
                if value not in kind:
                    yield f"{number}: {name}: {value!r} not in list"
            elif not settings.get("min", value) <= value <= settings.get("max", value):
                yield f"{number}: {name}: {value!r} is out of range"
        if validate is not None:
            answer = validate(**{name: given[name] for name in checked if name in given})
            if answer is not True:
                yield f"{number}: {answer}"

    def _result(self, prompt: Mapping[str, Mapping[str, Any]], number: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cls, given = self.classes[prompt[number]["class_type"]], prompt[number]["inputs"]
        arguments = {
            name: self._result(prompt, value[0])[0][value[1]] if isinstance(value, list) else value
            for name, value in given.items()
        }
        constants = {name: value for name, value in given.items() if not isinstance(value, list)}
        changed = cls.IS_CHANGED(**constants) if hasattr(cls, "IS_CHANGED") else None
        key = (cls, repr(given), changed, [self._kept[v[0]][0] for v in given.values() if isinstance(v, list)])
        if number in self._kept and self._kept[number][0] == key:
            return self._kept[number][1:]
        self.ran.append(number)
        made = getattr(cls(), cls.FUNCTION)(**arguments)
        result, ui = (made.get("result", ()), made.get("ui", {})) if isinstance(made, dict) else (made, {})
        assert isinstance(result, tuple) and len(result) == len(cls.RETURN_TYPES)
        assert all(isinstance(value, list) for value in ui.values())
        self._kept[number] = key, result, ui
        return result, ui
