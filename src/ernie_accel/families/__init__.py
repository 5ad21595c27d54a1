"""What the library knows of each architecture, as data. Transforms ask the family; nothing else tests names."""

from __future__ import annotations

from ernie_accel.families.ernie_image import ERNIE_IMAGE
from ernie_accel.families.family import CallSettings, Family, Shape
from ernie_accel.families.newbie import NEWBIE
from ernie_accel.families.z_image import Z_IMAGE

__all__ = ["CallSettings", "FAMILIES", "Family", "Shape", "family_of", "family_of_transformer", "repeated_blocks"]

FAMILIES: tuple[Family, ...] = (ERNIE_IMAGE, Z_IMAGE, NEWBIE)


def family_of(pipe: object) -> Family | None:
    """Return the family whose transformer class `pipe` has, else the one whose shape its transformer has, or None."""
    return family_of_transformer(getattr(pipe, "transformer", None))


def family_of_transformer(transformer: object) -> Family | None:
    """Return the family whose transformer class this is, else the one whose shape it has, or None."""
    names = {cls.__name__ for cls in type(transformer).__mro__}
    by_class = (family for family in FAMILIES if names & set(family.transformer_classes))
    by_shape = (family for family in FAMILIES if family.shape is not None and family.shape.fits(transformer))
    return next(by_class, None) or next(by_shape, None)


def repeated_blocks(model: object) -> tuple[str, ...]:
    """Return the class names of a model's repeated blocks: those it declares, else those its family knows."""
    declared = getattr(model, "_repeated_blocks", None)
    if declared:
        return tuple(declared)
    family = family_of_transformer(model)
    return family.repeated_blocks if family is not None else ()
