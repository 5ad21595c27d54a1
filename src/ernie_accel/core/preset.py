"""What a preset is: a named combination of transforms, as plain data. The table is in ``recipes/presets.py``."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_accel.core.errors import ConflictError
from ernie_accel.core.transform import Transform
from ernie_accel.families.family import Family


@dataclass(frozen=True)
class Preset:
    """A name for a combination that works.

    Attributes:
        name: ``<mode>-<precision>`` in kebab-case.
        summary: One sentence: what it is for.
        transforms: What it applies, in any order.
        without_kernels: What takes the place of those in the same slots for a family that has no fused kernels.
    """

    name: str
    summary: str
    transforms: tuple[Transform, ...]
    without_kernels: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        for transforms in (self.transforms, self.without_kernels):
            by_slot: dict[str, Transform] = {}
            for transform in transforms:
                if transform.occupies in by_slot:
                    raise ConflictError(transform.occupies, (by_slot[transform.occupies], transform))
                by_slot[transform.occupies] = transform

    def transforms_for(self, family: Family | None) -> tuple[Transform, ...]:
        """Return what it applies to a pipe of `family`; None is a pipe of no known family."""
        instead = self.without_kernels if family is not None and family.kernels is None else ()
        return tuple({transform.occupies: transform for transform in (*self.transforms, *instead)}.values())
