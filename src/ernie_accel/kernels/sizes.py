"""Sizes of grids and tiles on the host. Triton's own functions of these names are made for kernels: 2 us a call."""

from __future__ import annotations


def ceil_div(number: int, by: int) -> int:
    """Return how many times `by` covers `number`."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is >= `number`, which is >= 1."""
    return 1 << (number - 1).bit_length()
