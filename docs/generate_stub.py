"""Write ``__init__.pyi`` from the list of exports: ``python docs/generate_stub.py``."""

from __future__ import annotations

from pathlib import Path

from ernie_accel.exports import HOMES, SUBPACKAGES

STUB = Path(__file__).parents[1] / "src" / "ernie_accel" / "__init__.pyi"


def stub() -> str:
    """Return the stub: what type checkers see of the package, which loads its names lazily."""
    lines = ["# Written by docs/generate_stub.py from exports.py."]
    lines.append("from ernie_accel import " + ", ".join(f"{name} as {name}" for name in SUBPACKAGES))
    for home, names in HOMES.items():
        lines += [f"from ernie_accel.{home} import {name} as {name}" for name in names]
    return "\n".join([*lines, "", "__version__: str", "__all__: list[str]", ""])


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
