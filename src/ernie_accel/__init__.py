"""Make a diffusers pipeline fast, lean and trustworthy.

>>> import ernie_accel
>>> pipe = ernie_accel.demo.load()
>>> pipe = ernie_accel.optimize(pipe, preset="exact")
>>> print(ernie_accel.report(pipe))  # doctest: +SKIP
>>> pipe = ernie_accel.restore(pipe)

Everything here is loaded when it is first used: importing the package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ernie_accel import batch, demo
    from ernie_accel.batch.errors import BatchChangedError, BatchInputError, BatchOutputError
    from ernie_accel.core.context import Context
    from ernie_accel.core.errors import (
        ApplyError,
        ConflictError,
        ErnieAccelError,
        MissingExtraError,
        RestoreError,
        SavedPipelineError,
        UnknownNameError,
        UnsupportedError,
    )
    from ernie_accel.core.optimize import optimize, report, restore
    from ernie_accel.core.plan import Plan, plan
    from ernie_accel.core.preset import Preset, presets
    from ernie_accel.core.recommend import Recommendation, recommend
    from ernie_accel.core.report import Report
    from ernie_accel.core.saving import load, save
    from ernie_accel.core.transform import Applied, Effect, LayerReceipt, Phase, Preview, Transform
    from ernie_accel.core.undo import Undo
    from ernie_accel.families.family import Family
    from ernie_accel.fidelity.compare import evaluate
    from ernie_accel.fidelity.evaluation import Evaluation, Thresholds
    from ernie_accel.transforms import transform_from_json
    from ernie_accel.transforms.attention import ElideMask, ExpandAttentionMask, SetAttention
    from ernie_accel.transforms.autocast import Autocast
    from ernie_accel.transforms.cache_steps import CacheSteps
    from ernie_accel.transforms.call_defaults import CallDefaults
    from ernie_accel.transforms.check_finite import CheckFinite
    from ernie_accel.transforms.compile import Compile
    from ernie_accel.transforms.dtype import CastDtype
    from ernie_accel.transforms.encode_prompts import BatchPromptEncoding
    from ernie_accel.transforms.free_after_use import FreeAfterUse
    from ernie_accel.transforms.fuse_kernels import FuseKernels
    from ernie_accel.transforms.graphs import CaptureGraphs
    from ernie_accel.transforms.host_timesteps import KeepTimestepsOnHost
    from ernie_accel.transforms.layout import MakeContiguous
    from ernie_accel.transforms.memory import SliceVae, TileVae
    from ernie_accel.transforms.move_to import MoveTo
    from ernie_accel.transforms.offload import Offload
    from ernie_accel.transforms.quantize import Quantize
    from ernie_accel.transforms.rewrite import RewriteBlocks
    from ernie_accel.transforms.rewrite_enhancer import RewriteEnhancer
    from ernie_accel.transforms.rewrite_text_encoder import RewriteTextEncoder
    from ernie_accel.transforms.scheduler import SwapScheduler
    from ernie_accel.transforms.truncate_prompts import TruncatePrompts
    from ernie_accel.transforms.vae import CompileVae, FuseVae
    from ernie_accel.transforms.warm_up import Warmup

__version__ = "0.1.0"

_HOMES = {
    "ernie_accel.batch.errors": ("BatchChangedError", "BatchInputError", "BatchOutputError"),
    "ernie_accel.core.context": ("Context",),
    "ernie_accel.core.errors": (
        "ApplyError",
        "ConflictError",
        "ErnieAccelError",
        "MissingExtraError",
        "RestoreError",
        "SavedPipelineError",
        "UnknownNameError",
        "UnsupportedError",
    ),
    "ernie_accel.core.optimize": ("optimize", "report", "restore"),
    "ernie_accel.core.plan": ("Plan", "plan"),
    "ernie_accel.core.preset": ("Preset", "presets"),
    "ernie_accel.core.recommend": ("Recommendation", "recommend"),
    "ernie_accel.core.report": ("Report",),
    "ernie_accel.core.saving": ("load", "save"),
    "ernie_accel.core.transform": ("Applied", "Effect", "LayerReceipt", "Phase", "Preview", "Transform"),
    "ernie_accel.core.undo": ("Undo",),
    "ernie_accel.families.family": ("Family",),
    "ernie_accel.fidelity.compare": ("evaluate",),
    "ernie_accel.fidelity.evaluation": ("Evaluation", "Thresholds"),
    "ernie_accel.transforms": ("transform_from_json",),
    "ernie_accel.transforms.attention": ("ElideMask", "ExpandAttentionMask", "SetAttention"),
    "ernie_accel.transforms.autocast": ("Autocast",),
    "ernie_accel.transforms.cache_steps": ("CacheSteps",),
    "ernie_accel.transforms.call_defaults": ("CallDefaults",),
    "ernie_accel.transforms.check_finite": ("CheckFinite",),
    "ernie_accel.transforms.compile": ("Compile",),
    "ernie_accel.transforms.dtype": ("CastDtype",),
    "ernie_accel.transforms.fuse_kernels": ("FuseKernels",),
    "ernie_accel.transforms.graphs": ("CaptureGraphs",),
    "ernie_accel.transforms.host_timesteps": ("KeepTimestepsOnHost",),
    "ernie_accel.transforms.layout": ("MakeContiguous",),
    "ernie_accel.transforms.move_to": ("MoveTo",),
    "ernie_accel.transforms.memory": ("SliceVae", "TileVae"),
    "ernie_accel.transforms.encode_prompts": ("BatchPromptEncoding",),
    "ernie_accel.transforms.free_after_use": ("FreeAfterUse",),
    "ernie_accel.transforms.offload": ("Offload",),
    "ernie_accel.transforms.quantize": ("Quantize",),
    "ernie_accel.transforms.rewrite": ("RewriteBlocks",),
    "ernie_accel.transforms.rewrite_enhancer": ("RewriteEnhancer",),
    "ernie_accel.transforms.rewrite_text_encoder": ("RewriteTextEncoder",),
    "ernie_accel.transforms.scheduler": ("SwapScheduler",),
    "ernie_accel.transforms.vae": ("CompileVae", "FuseVae"),
    "ernie_accel.transforms.warm_up": ("Warmup",),
    "ernie_accel.transforms.truncate_prompts": ("TruncatePrompts",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBPACKAGES = ("batch", "demo")

__all__ = [
    "Applied",
    "ApplyError",
    "Autocast",
    "BatchChangedError",
    "BatchInputError",
    "BatchOutputError",
    "BatchPromptEncoding",
    "CacheSteps",
    "CallDefaults",
    "CaptureGraphs",
    "CastDtype",
    "CheckFinite",
    "Compile",
    "CompileVae",
    "ConflictError",
    "Context",
    "Effect",
    "ElideMask",
    "ErnieAccelError",
    "ExpandAttentionMask",
    "Evaluation",
    "Family",
    "FuseKernels",
    "FuseVae",
    "LayerReceipt",
    "FreeAfterUse",
    "KeepTimestepsOnHost",
    "MakeContiguous",
    "MoveTo",
    "MissingExtraError",
    "Offload",
    "Phase",
    "Plan",
    "Preset",
    "Preview",
    "Quantize",
    "Recommendation",
    "Report",
    "RestoreError",
    "RewriteBlocks",
    "RewriteEnhancer",
    "RewriteTextEncoder",
    "SavedPipelineError",
    "SetAttention",
    "SliceVae",
    "SwapScheduler",
    "Thresholds",
    "TileVae",
    "Transform",
    "TruncatePrompts",
    "Undo",
    "UnknownNameError",
    "UnsupportedError",
    "Warmup",
    "batch",
    "demo",
    "evaluate",
    "load",
    "optimize",
    "plan",
    "presets",
    "recommend",
    "report",
    "restore",
    "save",
    "transform_from_json",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"ernie_accel.{name}")
    else:
        raise AttributeError(f"module 'ernie_accel' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
