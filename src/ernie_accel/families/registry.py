"""The families the library knows: its own, and those that others register."""

from __future__ import annotations

from collections.abc import Iterator

from ernie_accel.common.notes import Note
from ernie_accel.families.ernie_image import ERNIE_IMAGE
from ernie_accel.families.family import UNKNOWN, Family
from ernie_accel.families.newbie import NEWBIE
from ernie_accel.families.z_image import Z_IMAGE

_OWN = (ERNIE_IMAGE, Z_IMAGE, NEWBIE)
_registered: list[Family] = []
GIVEN = Note("family", Family, "transformer", "the family that it was given, whatever its class is")


def families() -> tuple[Family, ...]:
    """Return all families, those that were registered last first."""
    return (*reversed(_registered), *_OWN)


def register_family(family: Family) -> Family:
    """Register an architecture for this process; return the family.

    If several fit a pipe, the last one registered wins.

    Raises:
        TypeError: It is not a `Family`.
        ValueError: A different family of this name is registered, or nothing says which pipes it fits, or which have
            one of its `other_codes`.
    """
    if not isinstance(family, Family):
        raise TypeError(f"expected a Family, got {family!r}")
    known = next((other for other in (UNKNOWN, *families()) if other.name == family.name), None)
    if known is not None and known != family:
        raise ValueError(f"a family named {family.name!r} is registered already, and differs: choose another name")
    if not family.transformer_classes and family.shape is None:
        raise ValueError(f"nothing says which pipes belong to {family.name!r}: give transformer_classes or a shape")
    if any(other.shape is None for other in family.other_codes):
        raise ValueError(f"nothing says which pipes have an other code of {family.name!r}: each of them needs a shape")
    if known is None:
        _registered.append(family)
    return family


def family_of(pipe: object) -> Family:
    """Return the family of `pipe`, or `UNKNOWN` if none fits; never None.

    In this order: the family that was given for it (``optimize(..., family=)``), the one whose transformer class it
    has, the one whose shape its transformer has; of several, the one that was registered last.
    """
    return family_of_transformer(getattr(pipe, "transformer", None))


def family_of_transformer(transformer: object) -> Family:
    """Return the family of a pipe with this transformer; see `family_of`."""
    transformer = _inside(transformer)
    given = GIVEN.of(transformer)
    return next(_fitting(transformer), UNKNOWN) if given is None else given


def _inside(transformer: object) -> object:
    """Return what ``torch.compile(...)`` wrapped, if `transformer` is its wrapper, whose class says nothing."""
    return getattr(transformer, "__dict__", {}).get("_modules", {}).get("_orig_mod", transformer)


def _fitting(transformer: object) -> Iterator[Family]:
    names = {cls.__name__ for cls in type(transformer).__mro__}
    yield from (family for family in families() if names & set(family.transformer_classes))
    for family in families():
        for other in family.other_codes:
            if other.shape is not None and other.shape.fits(transformer):
                yield other if type(transformer).__name__ in other.transformer_classes else other.of_other_code()
        if family.shape is not None and family.shape.fits(transformer):
            yield family.of_other_code() if family.transformer_classes else family


def give_family(transformer: object, family: Family | None) -> Family | None:
    """Assign `family` to `transformer`, whatever its class is; None goes back to class and shape.

    Returns:
        The family that was given before, or None.
    """
    inside = _inside(transformer)
    before = GIVEN.of(inside)
    if family is None:
        GIVEN.drop(inside)
    else:
        GIVEN.put(inside, family)
    return before


def repeated_blocks(model: object) -> tuple[str, ...]:
    """Return the class names of a model's repeated blocks: those it declares, else those its family knows."""
    declared = getattr(model, "_repeated_blocks", None)
    if declared:
        return tuple(declared)
    return family_of_transformer(model).repeated_blocks
