"""First-block cache by the hooks of diffusers, attached to the blocks for one forward at a time.

diffusers 0.42 enables it for none of the three families. Their transformers have no ``enable_cache``. The blocks of
ERNIE-Image and Lumina 2 are not in the registry; those of Z-Image are, but with an argument "hidden_states", which is
called "x" there. No pipeline opens a ``cache_context``, without which each hook raises. All this concerns how the hooks
are attached, not what they do, so this module attaches them itself.
"""

from __future__ import annotations

from typing import Any

import torch

from ernie_accel.transforms.denoiser.cache_steps.backend import CacheSettings, Forward, Trajectory
from ernie_accel.transforms.denoiser.cache_steps.blocks import BLOCKS, BlockCache, kept


class FirstBlock(BlockCache):
    """diffusers' first-block cache."""

    name = "diffusers"
    promised_db = 25.0

    def cached(
        self, wanted: CacheSettings, transformer: torch.nn.Module, forward: Forward, trajectory: Trajectory
    ) -> Forward:
        from diffusers.hooks.first_block_cache import FBCBlockHook, FBCHeadBlockHook

        blocks, state = list(getattr(transformer, BLOCKS)), _State()
        head, tail = FBCHeadBlockHook(state, wanted.threshold), len(blocks) - 1
        rest = [FBCBlockHook(state, is_tail=i == tail) for i in range(1, len(blocks))]
        hooked = torch.nn.ModuleList(_Hooked(*pair) for pair in zip(blocks, [head, *rest], strict=True))
        left = wanted.first * trajectory.order

        def run(*args: object, **kwargs: object) -> object:
            nonlocal left
            head.threshold = wanted.threshold if left <= 0 else -1.0  # no change is less than that
            left -= 1
            with kept(transformer._modules):
                transformer._modules[BLOCKS] = hooked
                return forward(*args, **kwargs)

        return run


class _State:
    """A ``StateManager`` of diffusers for one run, so that no context has to separate runs."""

    def __init__(self) -> None:
        from diffusers.hooks.first_block_cache import FBCSharedBlockState

        self._state = FBCSharedBlockState()

    def get_state(self) -> object:
        return self._state


class _Hooked(torch.nn.Module):
    """A block with a hook around it. It is called as a module: compiled, offloaded and with its own hooks."""

    def __init__(self, block: torch.nn.Module, hook: Any) -> None:
        from diffusers.hooks._helpers import TransformerBlockMetadata
        from diffusers.hooks.hooks import HookFunctionReference

        super().__init__()
        hook._metadata = TransformerBlockMetadata(
            return_hidden_states_index=0, _cached_parameter_indices={"hidden_states": 0}
        )
        hook.fn_ref = HookFunctionReference()
        hook.fn_ref.original_forward = block
        self._hook = hook

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._hook.new_forward(None, *args, **kwargs)
