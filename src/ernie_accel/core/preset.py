"""What a preset is: a named combination of transforms, as plain data. The table is in ``recipes/presets.py``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ernie_accel.core.components import Pipeline, denoisers_of
from ernie_accel.core.errors import ConflictError
from ernie_accel.core.transform import Transform
from ernie_accel.families import family_of
from ernie_accel.families.family import Family


@dataclass(frozen=True)
class Preset:
    """A name for a combination that works.

    Attributes:
        name: What `optimize` finds it by, in kebab-case.
        summary: One sentence: what it is for.
        transforms: What it applies, in any order.
        without_kernels: Replacements, by slot, for families that have no fused kernels.
        mode: How the pipe is called: "turbo", "quality", or "exact" for its own settings; None if it is none of these.
        precision: What the denoiser computes in: "fp8", "bf16", ...; None where the pipe's own precision stays.
        device: Torch device type it is made for; None: for any.
    """

    name: str
    summary: str
    transforms: tuple[Transform, ...]
    without_kernels: tuple[Transform, ...] = ()
    mode: str | None = field(default=None, kw_only=True)
    precision: str | None = field(default=None, kw_only=True)
    device: str | None = field(default=None, kw_only=True)

    @classmethod
    def of(
        cls,
        mode: str,
        precision: str | None,
        summary: str,
        transforms: tuple[Transform, ...],
        without_kernels: tuple[Transform, ...] = (),
        *,
        device: str | None = None,
    ) -> Preset:
        """Return a preset whose name follows from its facts: ``<mode>-<precision>``, or ``<device>-<precision>``."""
        name = "-".join(filter(None, (device or mode, precision)))
        return cls(name, summary, transforms, without_kernels, mode=mode, precision=precision, device=device)

    def __post_init__(self) -> None:
        for transforms in (self.transforms, self.without_kernels):
            by_slot: dict[str, Transform] = {}
            for transform in transforms:
                if transform.occupies in by_slot:
                    raise ConflictError(transform.occupies, (by_slot[transform.occupies], transform))
                by_slot[transform.occupies] = transform

    def transforms_for(self, family: Family) -> tuple[Transform, ...]:
        """Return the transforms for a pipe of `family`, with the replacements if that has no fused kernels."""
        instead = self.without_kernels if family.kernels is None else ()
        return tuple({transform.occupies: transform for transform in (*self.transforms, *instead)}.values())

    def transforms_on(self, pipe: Pipeline) -> tuple[Transform, ...]:
        """Return the transforms for `pipe`: those of its family, for all of its denoisers where there are others.

        What works on "transformer" works on the UNet of a pipe that has one, and on both of two that take turns.
        """
        denoisers = tuple(denoisers_of(pipe))
        return tuple(_on(transform, denoisers) for transform in self.transforms_for(family_of(pipe)))


def _on(transform: Any, denoisers: tuple[str, ...]) -> Any:
    if not denoisers or getattr(transform, "components", None) != ("transformer",):
        return transform
    return replace(transform, components=denoisers)
