"""The floors of the package: each imports only those below it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ernie_accel"
#: From the ground up; names on one line share a floor and do not import each other.
FLOORS = (
    ("common",),
    ("exports", "families", "embedded", "plugins"),
    ("core",),
    ("kernels",),
    ("models", "samplers", "quantization"),
    ("residency", "editing"),
    ("transforms",),
    ("recipes", "storage"),
    ("memory",),
    ("api",),
    ("testing", "fidelity"),
    ("batch",),
    ("demo",),
    ("cli",),
)
#: Of the package `batch`, likewise; `errors` is below them, and `ernie_accel.batch` itself above.
BATCH_ROOMS = ("engines", "input", "watch", "output", "line")
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(("ernie_accel", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Yield every module of the package that a file imports, wherever: lazily and for type checkers, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES or node.module in MODULES:
                    yield whole if whole in MODULES else node.module


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


GRAPH = {name: set(imports(path)) - {name} for name, path in MODULES.items()}


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in FLOOR_OF])
def test_no_arrow_goes_up(module):
    floor = FLOOR_OF[room(module)]
    up = [
        other
        for other in GRAPH[module]
        if room(other) != room(module) and (room(other) not in FLOOR_OF or FLOOR_OF[room(other)] >= floor)
    ]
    assert up == []


def test_the_drawing_in_the_docs_has_every_floor_in_its_place():
    page = (SOURCE.parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
    drawing = page.partition("## Layout")[2].partition("```text\n")[2].partition("```")[0].splitlines()
    lines = {
        name: [number for number, line in enumerate(drawing) if re.search(rf"(?<![\w/]){name}(?:/|\.py)", line)]
        for name in FLOOR_OF
    }
    assert [name for name, found in lines.items() if len(found) != 1] == []
    from_the_top = sorted(FLOOR_OF, key=lambda name: lines[name])
    floors = [FLOOR_OF[name] for name in from_the_top]
    assert floors == sorted(floors, reverse=True)


def batch_floor(module: str) -> int:
    """Return a module's floor within `batch`."""
    parts = module.split(".")[2:]
    return len(BATCH_ROOMS) if not parts else -1 if parts == ["errors"] else BATCH_ROOMS.index(parts[0])


BATCH = [name for name in MODULES if room(name) == "batch"]


@pytest.mark.parametrize("module", BATCH)
def test_no_room_of_batch_imports_one_above_it(module):
    up = [other for other in GRAPH[module] if other in BATCH and batch_floor(other) > batch_floor(module)]
    assert up == []


def test_every_room_of_batch_says_what_it_is_for():
    assert {name.split(".")[2] for name in BATCH if name.count(".") >= 2} == {"errors", *BATCH_ROOMS}
    for name in BATCH_ROOMS:
        modules = {path.stem for path in (SOURCE / "batch" / name).glob("*.py")} - {"__init__"}
        text = ast.get_docstring(ast.parse((SOURCE / "batch" / name / "__init__.py").read_text(encoding="utf-8")))
        missing = {each for each in modules if not re.search(rf"\b{each}\b", text)}
        assert name == "engines" or not missing


def test_no_transform_imports_another():
    transforms = {name: path for name, path in MODULES.items() if name.count(".") >= 3 and room(name) == "transforms"}
    package = {name: name.rpartition(".")[0] for name in transforms}
    crossing = {
        (name, other)
        for name in transforms
        for other in GRAPH[name] & transforms.keys()
        if not (package[name] == package[other] and name.count(".") > 3)  # the backends of one transform
    }
    assert crossing == set()


def test_no_modules_import_each_other_in_a_circle():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_graph_sees_what_is_there():
    assert "ernie_accel.core.undo" in GRAPH["ernie_accel.transforms.calls.autocast"]
    assert len(MODULES) > 140
