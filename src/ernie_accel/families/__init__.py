"""What the library knows of each architecture, as data. Transforms ask the family; nothing else tests names."""

from __future__ import annotations

from ernie_accel.families.family import UNKNOWN, CallSettings, Family, Shape
from ernie_accel.families.registry import (
    families,
    family_of,
    family_of_transformer,
    give_family,
    register_family,
    repeated_blocks,
)

__all__ = [
    "UNKNOWN",
    "CallSettings",
    "Family",
    "Shape",
    "families",
    "family_of",
    "family_of_transformer",
    "give_family",
    "register_family",
    "repeated_blocks",
]
