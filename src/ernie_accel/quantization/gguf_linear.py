"""Diffusers' linear layer for GGUF blocks, so that it can be copied and pickled: its weight alone can be neither."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter


class CopyableGGUFLinear(GGUFLinear):  # type: ignore[misc]
    """A ``GGUFLinear`` whose state holds its blocks as a plain tensor, beside what they are encoded as."""

    def __getstate__(self) -> dict[str, object]:
        # Rebuilding a GGUFParameter takes its quant_type, which copy and pickle of torch's parameters do not hand on.
        weight = self.weight
        if not isinstance(weight, GGUFParameter):  # a script gave it another
            return dict(vars(self))
        parameters = {**self._parameters, "weight": (weight.as_tensor().detach(), weight.quant_type)}
        return {**vars(self), "_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight = state["_parameters"]["weight"]
        if isinstance(weight, tuple):
            blocks, encoded_as = weight
            made: torch.nn.Parameter = GGUFParameter(blocks, quant_type=encoded_as)
            state = {**state, "_parameters": {**state["_parameters"], "weight": made}}
        super().__setstate__(state)
