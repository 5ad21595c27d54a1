"""The catalogue, grouped by what a transform changes: one concept a file, and none imports another."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.transform import Transform
from ernie_accel.exports import TRANSFORMS

__all__ = ["TRANSFORMS", "transform_class", "transform_from_json"]


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

    Only classes of the catalogue and of `known` are made; data never names a module to import. Folders and files that
    it names for a transform are taken as they stand: this is for data of your own. `load` reads folders of strangers.

    Args:
        data: A mapping with the class name under "transform" and the fields; missing fields take their defaults.
        known: Further transform classes, of your own.

    Raises:
        UnknownNameError: The class or a field is unknown.
        ValueError: There is no class name.
    """
    if "transform" not in data:
        raise ValueError(f"a transform needs its class name under 'transform', which is missing in {dict(data)}")
    name = data["transform"]
    own = {cls.__name__: cls for cls in known}
    cls = own[name] if name in own else transform_class(name)
    names = [f.name for f in fields(cls)]
    arguments: dict[str, object] = {}
    for key, value in data.items():
        if key == "transform":
            continue
        if key not in names:
            raise UnknownNameError(f"field of {name}", key, names)
        arguments[key] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)
