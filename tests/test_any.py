"""`py.typed` promises types, and ``Any`` breaks the promise: how often the package says it may not grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "ernie_accel"
#: As many as there are. Lower it when some are gone; never raise it.
MOST = 201


def uses_of_any(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each ``Any`` in code or in an annotation that is written as text; imports do not count."""
    for node in ast.walk(tree):
        if (isinstance(node, ast.Name) and node.id == "Any") or (
            isinstance(node, ast.Attribute) and node.attr == "Any"
        ):
            yield node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "Any" in node.value:
            try:
                quoted = ast.parse(node.value, mode="eval")
            except SyntaxError:  # prose
                continue
            yield from (node.lineno for _ in uses_of_any(quoted))


def test_any_is_not_used_more_often():
    found = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in sorted([*SOURCE.rglob("*.py"), *SOURCE.rglob("*.pyi")])
        for line in uses_of_any(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(found) <= MOST, (
        f"{len(found)} annotations say Any, {MOST} at most are allowed. Each switches off the type checker for whoever "
        "uses what it names, here and in programs that import this package. Write what it is: a class, a Protocol with "
        "the attributes that are read, a TypeVar where what goes in comes out, or object where a value is only passed "
        "on. All of them:\n" + "\n".join(found)
    )


def test_all_ways_of_writing_it_are_counted():
    written = '''
import typing
from typing import Any, cast
"""Any text."""
Alias = Any
def f(x: Any, *y: typing.Any) -> "dict[str, Any]":
    """Return Any."""
    z: list[Any] = cast("Any", x)
'''
    assert sorted(uses_of_any(ast.parse(written))) == [5, 6, 6, 6, 8, 8]
