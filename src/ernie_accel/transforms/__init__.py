"""The catalogue: one concept a file. `TRANSFORMS` says where each lives, so that importing one imports no other."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.transform import Transform

#: Class name -> module.
TRANSFORMS: Mapping[str, str] = {
    "Autocast": "ernie_accel.transforms.autocast",
    "BatchPromptEncoding": "ernie_accel.transforms.encode_prompts",
    "CacheSteps": "ernie_accel.transforms.cache_steps",
    "CallDefaults": "ernie_accel.transforms.call_defaults",
    "CaptureGraphs": "ernie_accel.transforms.graphs",
    "CastDtype": "ernie_accel.transforms.dtype",
    "CheckFinite": "ernie_accel.transforms.check_finite",
    "Compile": "ernie_accel.transforms.compile",
    "CompileVae": "ernie_accel.transforms.vae",
    "FuseKernels": "ernie_accel.transforms.fuse_kernels",
    "FuseVae": "ernie_accel.transforms.vae",
    "ElideMask": "ernie_accel.transforms.attention",
    "ExpandAttentionMask": "ernie_accel.transforms.attention",
    "FreeAfterUse": "ernie_accel.transforms.free_after_use",
    "KeepTimestepsOnHost": "ernie_accel.transforms.host_timesteps",
    "MakeContiguous": "ernie_accel.transforms.layout",
    "MoveTo": "ernie_accel.transforms.move_to",
    "Offload": "ernie_accel.transforms.offload",
    "Quantize": "ernie_accel.transforms.quantize",
    "RewriteBlocks": "ernie_accel.transforms.rewrite",
    "RewriteEnhancer": "ernie_accel.transforms.rewrite_enhancer",
    "RewriteTextEncoder": "ernie_accel.transforms.rewrite_text_encoder",
    "SetAttention": "ernie_accel.transforms.attention",
    "SliceVae": "ernie_accel.transforms.memory",
    "SwapScheduler": "ernie_accel.transforms.scheduler",
    "TileVae": "ernie_accel.transforms.memory",
    "TruncatePrompts": "ernie_accel.transforms.truncate_prompts",
    "Warmup": "ernie_accel.transforms.warm_up",
}


def transform_class(name: str) -> type[Transform]:
    """Return a transform of the catalogue by its class name.

    Raises:
        UnknownNameError: There is no such transform.
    """
    if name not in TRANSFORMS:
        raise UnknownNameError("transform", name, TRANSFORMS)
    found: type[Transform] = getattr(importlib.import_module(TRANSFORMS[name]), name)
    return found


def transform_from_json(data: Mapping[str, Any], known: Iterable[type[Transform]] = ()) -> Transform:
    """Return the transform that `Transform.to_json` described.

    Only classes of the catalogue and of `known` are made; data never names a module to import.

    Args:
        data: A mapping with the class name under "transform" and the fields; missing fields take their defaults.
        known: Further transform classes, of your own.

    Raises:
        UnknownNameError: The class or a field is unknown.
        ValueError: There is no class name.
    """
    if "transform" not in data:
        raise ValueError(f"a transform is told by its class name under 'transform', which is missing in {dict(data)}")
    name = data["transform"]
    own = {cls.__name__: cls for cls in known}
    cls = own[name] if name in own else transform_class(name)
    names = [f.name for f in fields(cls)]
    arguments: dict[str, Any] = {}
    for key, value in data.items():
        if key == "transform":
            continue
        if key not in names:
            raise UnknownNameError(f"field of {name}", key, names)
        arguments[key] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)
