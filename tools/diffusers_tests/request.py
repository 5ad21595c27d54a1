"""What to ask of `optimize`, as it is written on a command line."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import ernie_accel
from ernie_accel import Transform


@dataclass(frozen=True)
class Wanted:
    """A preset, or transforms without one."""

    preset: str | None
    transforms: tuple[Transform, ...]


def parse(text: str) -> Wanted:
    """Return what `text` asks for: a preset's name, or transforms as a plan prints them.

    Args:
        text: ``exact``, ``SwapScheduler('unipc')`` or several transforms with commas between them.

    Raises:
        ValueError: It is neither.
    """
    if text in ernie_accel.presets:
        return Wanted(text, ())
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
        transforms = tuple(map(_transform, tree.elts if isinstance(tree, ast.List) else ()))
    except (SyntaxError, ValueError) as error:
        names = ", ".join(ernie_accel.presets)
        raise ValueError(
            "--optimize takes the name of a preset or transforms as a plan prints them, as in "
            f"\"SwapScheduler('unipc')\"; got {text!r} ({error}). Presets: {names}"
        ) from error
    if not transforms:
        raise ValueError(f"--optimize takes a preset or at least one transform; got {text!r}")
    return Wanted(None, transforms)


def _transform(node: ast.expr) -> Transform:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"{ast.unparse(node)} is no transform with its arguments in brackets")
    made: Any = getattr(ernie_accel, node.func.id, None)
    if not (isinstance(made, type) and issubclass(made, Transform)):
        raise ValueError(f"ernie_accel has no transform {node.func.id!r}")
    keywords = {each.arg: ast.literal_eval(each.value) for each in node.keywords if each.arg is not None}
    transform: Transform = made(*map(ast.literal_eval, node.args), **keywords)
    return transform
