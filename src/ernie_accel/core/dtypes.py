"""Dtypes of weights by name, and what prevents casting a pipe to one."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from ernie_accel.common.language import said
from ernie_accel.core.components import (
    Pipeline,
    absent_components,
    is_skeleton,
    modules_of,
    upcasts_in_a_hook,
    weights_of,
)
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
)
ALIASES: Mapping[str, str] = MappingProxyType({"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"})


def dtype_name(dtype: str) -> str:
    """Return the full name of a dtype: "bf16" is "bfloat16".

    Raises:
        UnknownNameError: It is none of `DTYPES` and none of `ALIASES`.
    """
    name = ALIASES.get(dtype, dtype)
    if name not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    return name


def unsupported_cast_reasons(
    pipe: Pipeline, context: Context, dtype: str, components: Iterable[str] | None = None
) -> list[str]:
    """Return every reason why components of `pipe` (default: all) cannot be cast to `dtype`, a key of `DTYPES`."""
    reasons = absent_components(pipe, components)
    if reasons:
        return reasons
    for name, module in modules_of(pipe, components).items():
        if not is_skeleton(module) and any(weight.tensor.device.type == "meta" for weight in weights_of(module)):
            reasons.append(
                said("{name} is offloaded (its weights are on the meta device): cast before offloading", name=name)
            )
        if upcasts_in_a_hook(module):
            reasons.append(
                said("{name} stores its weights by layerwise casting, and casting would break its hooks", name=name)
            )
    if dtype == "bfloat16" and context.capability is not None:
        reasons += [
            said("{reason}: use 'float16'", reason=reason) for reason in context.missing_capability("bfloat16", (8, 0))
        ]
    return reasons


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return `dtype` under the name that the installed diffusers' ``from_pretrained`` wants."""
    release = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("diffusers"))[:2])
    return {"dtype" if release >= (0, 42) else "torch_dtype": dtype}
