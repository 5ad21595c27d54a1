"""What ``torch.compile`` leaves alone. Saying so imports Dynamo, which takes a second: import this where it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ernie_accel.kernels.low_rank import LowRankProduct, update_all
from ernie_accel.models.stacked_adapters import stack


@torch.compiler.disable  # type: ignore[untyped-decorator]
def update_early(products: Sequence[LowRankProduct]) -> None:
    """Bring the low-rank parts of products up to date, in place, before anything else of a forward runs."""
    update_all(products, early=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def update_stacked_early(model: nn.Module) -> None:
    """Bring what is stacked of the adapters in compiled blocks up to date, in place, before a forward runs them."""
    stack(model)
