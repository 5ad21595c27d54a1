"""Find installed plug-ins: packages with an entry point in the group "ernie_accel.plugins".

An entry point names a function without arguments that registers what the package brings::

    [project.entry-points."ernie_accel.plugins"]
    my_family = "my_package:register"
"""

from __future__ import annotations

import importlib.metadata
import threading
import warnings

from ernie_accel.common.installed import Places, package_places

GROUP = "ernie_accel.plugins"
_lock = threading.RLock()
_loaded: dict[str, str] = {}
_looked_at: Places | None = None


def load_plugins() -> dict[str, str]:
    """Let every installed plug-in register what it brings, once in a process.

    A plug-in that cannot be loaded is left out with a warning that names it.

    Returns:
        Name of the entry point -> what it is in words, "my_package:register of my-package 1.0".
    """
    global _looked_at
    with _lock:
        places = package_places()
        if places == _looked_at:
            return dict(_loaded)
        for entry in importlib.metadata.entry_points(group=GROUP):
            if entry.name in _loaded:
                continue
            package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
            _loaded[entry.name] = f"{entry.value}{package}"
            try:
                entry.load()()
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"the plug-in {_loaded[entry.name]} is left out: {reason}", RuntimeWarning, stacklevel=2)
                _loaded[entry.name] += f", left out ({reason})"
        _looked_at = places  # last: after an interrupt, the rest is still to be loaded
        return dict(_loaded)
