"""DBCache of cache-dit, with its Taylor calibrator; the transformer is restored after every forward.

``cache_dit.enable_cache(pipe)`` of 1.5.3 patches the class of the pipe, so that its calls run in the contexts of every
enabled pipe of that class. After two pipes were enabled, ``disable_cache`` of both leaves the class patched. It also
leaves a ``forward`` attribute on the transformer (for ERNIE-Image stock's, whatever was there before), and moves the
blocks to the end of the children. So cache-dit gets the transformer with a stand-in for the pipe. The forward that it
makes is taken from the transformer, and its other changes are undone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.library_hooks import ACCELERATE
from ernie_accel.transforms.denoiser.cache_steps.backend import CacheSettings, Forward, Trajectory
from ernie_accel.transforms.denoiser.cache_steps.blocks import BLOCKS, BlockCache, kept

#: Handler levels belong to the process: the later of two threads would treat the earlier one's level as the original.
_QUIET = threading.Lock()


class DbCache(BlockCache):
    """cache-dit's DBCache: one block that is always computed, and a line through the residuals of the others."""

    name = "cache-dit"
    promised_db = 25.0

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = [*context.missing("cache_dit"), *super().unsupported(pipe, context)]
        if context.device == "npu":
            reasons.append(said("cache-dit chooses an attention kernel of its own on an NPU: use another backend"))
        return reasons

    def cached(
        self, wanted: CacheSettings, transformer: torch.nn.Module, forward: Forward, trajectory: Trajectory
    ) -> Forward:
        with kept(vars(transformer), vars(getattr(transformer, BLOCKS))), _quiet():
            transformer.forward = forward
            vars(transformer).pop(ACCELERATE, None)  # or cache-dit would call the forward under the offload hook
            _enable(transformer, wanted, trajectory)
            enabled = transformer.forward

        def run(*args: object, **kwargs: object) -> object:
            with kept(transformer._modules):  # it removes the blocks and appends them again in each forward
                return enabled(*args, **kwargs)

        return run


def _enable(transformer: torch.nn.Module, wanted: CacheSettings, trajectory: Trajectory) -> None:
    import cache_dit
    from cache_dit.caching.block_adapters import FakeDiffusionPipeline

    stand_in = type("StandIn", (FakeDiffusionPipeline,), {})  # cache-dit marks the class of the pipe it gets
    adapter = cache_dit.BlockAdapter(
        pipe=stand_in(transformer),
        transformer=transformer,
        blocks=getattr(transformer, BLOCKS),
        blocks_name=BLOCKS,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,  # one tensor in, one out; the rest is passed on
        check_forward_pattern=False,
        has_separate_cfg=False,  # the two halves of guidance are two runs
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=wanted.first * trajectory.order,
        max_continuous_cached_steps=1,
        residual_diff_threshold=wanted.threshold,
        enable_separate_cfg=False,
        num_inference_steps=2 * len(trajectory.sigmas),  # it would forget everything after that many
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep cache-dit from printing its settings to standard output for every picture."""
    import cache_dit  # noqa: F401  its loggers share one handler, and are made on import

    with _QUIET:
        handlers = logging.getLogger("CACHE_DIT").handlers
        levels = [handler.level for handler in handlers]
        for handler in handlers:
            handler.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for handler, level in zip(handlers, levels, strict=True):
                handler.setLevel(level)
