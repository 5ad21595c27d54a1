"""What ``torch.compile`` leaves alone. Saying so imports Dynamo, which takes a second: import this where it is used."""

from __future__ import annotations

from collections.abc import Callable

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def outside_graphs(work: Callable[[], object]) -> None:
    """Do some work, in place, that must not become part of a graph, such as what happens before a forward."""
    work()
