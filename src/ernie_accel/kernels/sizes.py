"""Sizes of grids and tiles on the host. Triton's own functions of these names are for kernels, and take 2 us a call."""

from __future__ import annotations


def ceil_div(number: int, by: int) -> int:
    """Return `number` / `by`, rounded up."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is >= `number`, which is >= 1."""
    return 1 << (number - 1).bit_length()
