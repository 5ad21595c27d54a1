"""The facts about the machine that a plan depends on, frozen and injectable: a laptop can plan for an H200."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, cast

from ernie_accel.common.installed import package_places, version_of
from ernie_accel.common.language import joined, localized, said
from ernie_accel.core.components import AnyPipeline, Pipeline, device_of
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.hardware import GIB, hardware_named
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.plugins import load_plugins

if TYPE_CHECKING:
    import torch

#: Import name -> pip extra, for every optional package that the library knows.
OPTIONAL_PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "torchao": "torchao",
        "optimum.quanto": "quanto",
        "bitsandbytes": "bitsandbytes",
        "gguf": "gguf",
        "scipy": "scipy",
        "torch_npu": "npu",
        "ray": "ray",
        "httpcore": "http",
        "pyarrow": "parquet",
        "prometheus_client": "metrics",
        "cudnn": "cudnn",
        "cache_dit": "cache-dit",
    }
)
_DISTRIBUTIONS = {
    "optimum.quanto": "optimum-quanto",
    "torch_npu": "torch-npu",
    "prometheus_client": "prometheus-client",
    "cudnn": "nvidia-cudnn-frontend",
    "cache_dit": "cache-dit",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
}
_BUNDLED_PACKAGES = ("triton",)  # with CUDA builds of torch
#: Used if installed, but no extra installs them: they are built for one version of torch and one kind of card.
_WITHOUT_EXTRA = ("flash_attn", "flash_attn_interface", "sageattention", "xformers")
_REQUIRED_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy")

SUPPORTED_DEVICES = ("cpu", "cuda", "npu")
#: Other devices that torch runs on: name in `Context.device` -> what people call it.
UNSUPPORTED_DEVICES: Mapping[str, str] = MappingProxyType(
    {"rocm": said("AMD GPUs (ROCm)"), "mps": said("Apple GPUs (mps)"), "xpu": said("Intel GPUs (xpu)")}
)
NOT_SUPPORTED_YET = f"Not supported yet: {', '.join(UNSUPPORTED_DEVICES.values())}."


#: Import name -> how to install it, of packages that others registered.
_REGISTERED: dict[str, str] = {}


def register_package(package: str, *, install: str, distribution: str | None = None) -> None:
    """Let plans look for another package, for this process; `Context.missing` then says how to install it.

    Args:
        package: Import name ("my_kernels").
        install: What installs it ("pip install my-kernels").
        distribution: Its name on PyPI, if that differs from the import name.

    Raises:
        ValueError: The library looks for that package itself, or it was registered with another way to install it.
    """
    if package in OPTIONAL_PACKAGES or _REGISTERED.get(package, install) != install:
        raise ValueError(f"the package {package!r} is registered already, with another way to install it")
    _REGISTERED[package] = install
    if distribution is not None:
        _DISTRIBUTIONS[package] = distribution


@dataclass(frozen=True)
class Context:
    """Facts about one machine; nothing here is looked up again later.

    Attributes:
        device: torch device type: "cpu", "cuda", "npu", ...; an AMD GPU, which torch calls "cuda" too, is "rocm".
        device_name: What people call it.
        capability: CUDA compute capability (major, minor); None elsewhere.
        memory_bytes: Memory of the device that torch can use; None if unknown.
        versions: Installed packages by import name; a package that is not there cannot be imported.
        no_compile: Why torch.compile cannot work here; None if it can.
        idle: An accelerator that is here and not used because it is not supported yet ("mps"); None if there is none.
        state: What the pipe will be when a transform is asked; None: what it is. Ask `planned`.
    """

    device: str
    device_name: str
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    no_compile: str | None = None
    idle: str | None = None
    state: PlannedPipe | None = field(default=None, repr=False, compare=False)

    @classmethod
    def detect(cls, pipe: AnyPipeline | None = None, device: str | None = None) -> Context:
        """Look at this machine: at the device `pipe` lives on, or at the best one if no pipe is given.

        Args:
            pipe: The pipeline.
            device: Look at this one instead, if it exists ("cuda:1"); for a pipe that is about to move there.
        """
        import torch

        found = device_of(cast(Pipeline, pipe)) if pipe is not None else _best_device()
        return cls._of(torch.device(device) if device is not None and is_here(device) else found)

    @classmethod
    def _of(cls, device: torch.device) -> Context:
        import torch

        if device.type == "cuda":
            facts = torch.cuda.get_device_properties(device)
            no_triton = said("torch.compile on CUDA needs triton: pip install triton")
            is_amd = torch.version.hip is not None  # its major and minor are no CUDA compute capability
            return cls(
                device="rocm" if is_amd else "cuda",
                device_name=facts.name,
                capability=None if is_amd else (facts.major, facts.minor),
                memory_bytes=facts.total_memory,
                versions=installed_versions(),
                no_compile=no_triton if not _importable("triton") else None,
            )
        if device.type == "npu":
            npu: ModuleType = vars(torch)["npu"]  # of torch_npu, without which there is no such device
            facts = npu.get_device_properties(device)
            return cls("npu", facts.name, memory_bytes=facts.total_memory, versions=installed_versions())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        return cls(
            device=device.type,
            device_name=said("{count} CPU cores", count=os.cpu_count()) if device.type == "cpu" else device.type,
            memory_bytes=memory if device.type == "cpu" else None,
            versions=installed_versions(),
            no_compile=_no_cpu_compile_reason() if device.type == "cpu" else None,
            idle=_idle_accelerator() if device.type == "cpu" else None,
        )

    @classmethod
    def named(cls, name: str) -> Context:
        """Return the facts of a device of the table, with the packages that are installed here.

        For a CUDA device they include what CUDA builds of torch bring, whichever build is installed here.

        Args:
            name: A key of `HARDWARE` ("h200", "rtx3060", "ascend910b", ...), or what people write for it ("RTX 3060",
                "GeForce RTX 3060", "NVIDIA H200", "Ascend 910B"). A card that is not in the table is described by its
                compute capability and memory: "cuda:8.9:16GiB". "rocm", "mps" and "xpu" are devices of which nothing is
                known, and which are not supported yet.

        Raises:
            UnknownNameError: There is no such device in the table.
        """
        load_plugins()  # they may register rows, and packages to look for
        kind, installed = name.strip().lower(), installed_versions()
        on_cuda = {**dict.fromkeys(_BUNDLED_PACKAGES, "unknown"), **installed}
        described = re.fullmatch(r"cuda:(\d+)\.(\d+)(?::(\d+(?:\.\d+)?)\s*gib)?", kind)
        if described is not None:
            major, minor, gib = described.groups()
            memory = None if gib is None else int(float(gib) * GIB)
            label = said("a card that is not in the table")
            return cls("cuda", label, (int(major), int(minor)), memory, on_cuda)
        if kind in UNSUPPORTED_DEVICES:
            return cls(kind, kind, versions=installed)
        row = hardware_named(name, note=NOT_SUPPORTED_YET)
        versions = on_cuda if row.device == "cuda" else installed
        return cls(row.device, row.name, row.capability, row.usable_bytes or row.memory_bytes, versions)

    @property
    def torch_device(self) -> str:
        """What torch calls the device type."""
        return "cuda" if self.device == "rocm" else self.device

    @property
    def not_supported(self) -> str | None:
        """Say that the device is not supported yet; None if it is."""
        if self.device in SUPPORTED_DEVICES:
            return None
        what = UNSUPPORTED_DEVICES.get(self.device, said("{device} devices", device=self.device))
        return said("{what} are not supported yet: nothing was tested or measured on them", what=what)

    def planned(self, pipe: Pipeline) -> PlannedPipe:
        """Return what `pipe` will be by the time the transform that asks runs."""
        return PlannedPipe.of(pipe) if self.state is None else self.state

    def missing(self, package: str) -> list[str]:
        """Return the reason why `package` cannot be imported, with its pip extra; empty if it can.

        Raises:
            UnknownNameError: It is not a package that the library looks for.
        """
        if package in self.versions:
            return []
        if package in OPTIONAL_PACKAGES:
            extra = OPTIONAL_PACKAGES[package]
            return [
                said("{package} is not installed: pip install 'ernie-accel[{extra}]'", package=package, extra=extra)
            ]
        if package in _REGISTERED:
            return [said("{package} is not installed: {fix}", package=package, fix=_REGISTERED[package])]
        note = "For one of your own, call ernie_accel.register_package(...) first."
        raise UnknownNameError("package", package, (*OPTIONAL_PACKAGES, *_REGISTERED), note=note)

    def missing_capability(self, what: str, need: tuple[int, int]) -> list[str]:
        """Return the reason why `what` cannot run if it needs CUDA compute capability `need`; empty if it can."""
        if (self.capability or (0, 0)) >= need:
            return []
        least = "{}.{}".format(*need)
        if self.capability is None:
            template = "{what} needs CUDA compute capability >= {need}; this device has no CUDA ({device})"
            return [said(template, what=what, need=least, device=self.device)]
        template = "{what} needs CUDA compute capability >= {need}; this device has {have}"
        return [said(template, what=what, need=least, have="{}.{}".format(*self.capability))]

    def missing_triton(self, what: str, need: tuple[int, int]) -> list[str]:
        """Return the reasons why Triton kernels of capability `need` cannot run here; empty if they can."""
        triton = said("triton is not installed (it comes with CUDA builds of torch): pip install triton")
        return self.missing_capability(what, need) + ([] if "triton" in self.versions else [triton])

    def __str__(self) -> str:
        return self.text

    def localized(self) -> str:
        """Return the same text in the reader's language."""
        return localized(self.text)

    @property
    def text(self) -> str:
        """The machine in words, for a message."""
        facts = [self.device_name]
        if self.capability is not None:
            major, minor = self.capability
            facts.append(said("capability {major}.{minor}", major=major, minor=minor))
        if self.memory_bytes is not None:
            facts.append(f"{self.memory_bytes / GIB:.0f} GiB")
        text = joined(facts, "{first}, {second}")
        if self.device_name != self.device:
            text = said("{device} ({facts})", device=self.device, facts=text)
        if self.not_supported is not None:
            return said("{machine}, which is not supported yet", machine=text)
        if self.idle is None:
            return text
        return said("{machine}; {idle} are not supported yet", machine=text, idle=UNSUPPORTED_DEVICES[self.idle])


def installed_versions() -> Mapping[str, str]:
    """Return the versions of all packages the library can use, without importing any of them."""
    versions, places = {}, package_places()
    for package in (*_REQUIRED_PACKAGES, *_BUNDLED_PACKAGES, *OPTIONAL_PACKAGES, *_WITHOUT_EXTRA, *_REGISTERED):
        if _importable(package):
            versions[package] = version_of(_DISTRIBUTIONS.get(package, package), places) or "unknown"
    return versions


def _importable(package: str) -> bool:
    parent, _, child = package.rpartition(".")
    if not parent:
        return importlib.util.find_spec(package) is not None
    spec = importlib.util.find_spec(parent)  # asking for the dotted name would import the parent
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / child).exists() for folder in folders or ())


def _best_device() -> torch.device:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("npu" if is_here("npu") else "cpu")


def is_here(device: str) -> bool:
    """Return whether a device is on this machine: "cuda:1" where there are two, "cpu" everywhere."""
    import torch

    kind, _, index = device.partition(":")
    if kind == "cpu":
        return True
    module: object = getattr(torch, kind, None)  # torch.npu is there once torch_npu is imported
    if not hasattr(module, "is_available") or not hasattr(module, "device_count"):
        return False
    return bool(module.is_available()) and int(index or 0) < module.device_count()


def _idle_accelerator() -> str | None:
    import torch

    found = {"mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    return next((name for name, is_here in found.items() if is_here), None)


def _no_cpu_compile_reason() -> str | None:
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    if any(name and shutil.which(name) for name in candidates):
        return None
    return said("torch.compile on the CPU needs a C++ compiler, and none of g++, clang++, c++ is on the PATH")
