"""Quanto's linear layer, so that it can be copied: ``copy.deepcopy`` raises on the weights of quanto 0.2.7."""

from __future__ import annotations

import copy
from typing import Any

import torch
from optimum.quanto.nn import QLinear


class CopyableQLinear(QLinear):  # type: ignore[misc]
    """A ``QLinear`` with frozen weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyableQLinear:
        weight = self.weight
        memo[id(weight)] = torch.nn.Parameter(_copied(weight), requires_grad=weight.requires_grad)
        made: CopyableQLinear = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def _copied(tensor: Any) -> torch.Tensor:
    if not hasattr(tensor, "__tensor_flatten__"):
        plain: torch.Tensor = tensor.detach().clone()
        return plain
    names, about = tensor.__tensor_flatten__()
    inner = {name: _copied(getattr(tensor, name)) for name in names}
    made: torch.Tensor = type(tensor).__tensor_unflatten__(inner, about, tensor.size(), tensor.stride())
    return made
