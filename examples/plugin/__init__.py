"""A plug-in for ernie_accel in three files: a transform, a family and a quantization backend.

Installed with this in its pyproject.toml, it is found by itself::

    [project.entry-points."ernie_accel.plugins"]
    plugin = "plugin:register"
"""

from __future__ import annotations

from ernie_accel import register_family, register_quantization_backend


def register() -> None:
    """Let ernie_accel know what this package brings."""
    from examples.plugin.backend import ROWS, PlainRows
    from examples.plugin.family import FLUX

    register_family(FLUX)
    register_quantization_backend(PlainRows(), ROWS)
