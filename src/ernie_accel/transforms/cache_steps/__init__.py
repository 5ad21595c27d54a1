"""Compute fewer of a picture's steps in full. One backend a file."""

from __future__ import annotations

from ernie_accel.transforms.cache_steps.cache_steps import CacheSteps

__all__ = ["CacheSteps"]
