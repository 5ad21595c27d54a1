"""What a transform is: one opt-in change to a pipeline, with its order, its effect and its receipt.

A concrete transform is a frozen dataclass with four facts and three methods. Its repr is a line of a
plan, it compares by value and it survives a round trip through JSON. See ``docs/adding-a-transform.md``.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from types import MappingProxyType
from typing import ClassVar

from ernie_accel.core.arguments import arguments_of
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.planned import PlannedPipe


class Phase(enum.IntEnum):
    """When a transform runs. One linear order, so that no two transforms need to know each other."""

    DTYPE = 10
    REWRITE = 20
    QUANTIZE = 30
    SCHEDULER = 40
    ATTENTION = 50
    LAYOUT = 60
    MEMORY = 70
    CALL = 80
    COMPILE = 90
    RESIDENCY = 95
    WARMUP = 100


class Effect(enum.Enum):
    """What a transform does to the picture, from nothing to another picture. Each is earned by a test."""

    EXACT = "exact"
    """Bitwise the same output."""
    ROUNDING = "rounding"
    """The same arithmetic in another order: within `ROUNDING_REL`, the spread of stock's own kernels."""
    LOSSY = "lossy"
    """The same picture with a declared floor in dB (``Transform.floor_db``)."""
    RESAMPLES = "resamples"
    """Another picture by design: other steps, guidance or scheduler."""

    @property
    def severity(self) -> int:
        """0 for EXACT up to 3 for RESAMPLES, for comparing."""
        return list(Effect).index(self)


#: Relative L2 distance of the output that counts as ROUNDING, by dtype of the weights. In bfloat16, two stock attention
#: kernels differ by 2e-2 on the full-size model (NVIDIA H200); the others follow from their mantissas.
ROUNDING_REL: Mapping[str, float] = {"bfloat16": 2e-2, "float16": 2.5e-3, "float32": 1e-5}


@dataclass(frozen=True)
class Preview:
    """What `Transform.apply` would do, determined without doing it.

    Attributes:
        changes: What would change: module paths, or settings as "name old -> new". Empty: nothing is left to do.
        note: What a reader of the plan should know; with no changes, why there is nothing to do.
        skipped: What would be left as it is although asked for, with the reason of each; in the JSON, not in the table.
    """

    changes: tuple[str, ...]
    note: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerReceipt:
    """What quantizing did to one layer.

    Attributes:
        name: Component and path, "transformer.layers.1.mlp.up_proj".
        scheme: How its weight is stored, "fp8".
        backend: The library that did it, "torchao".
        dtype: Of the weight before, "bfloat16", which products still return.
        shape: (N, K) of the weight.
        bytes_before: Bytes of the layer before, bias included.
        bytes_after: Bytes afterwards, scales and bias included.
        sqnr_db: Signal-to-quantization-noise ratio of the weight in dB, to 0.001; infinite if no bit was lost.
        correction_rank: Rank of the correction that is added to the stored weight; 0: none.
        uncorrected_db: What `sqnr_db` is without that correction; None where there is none.
    """

    name: str
    scheme: str
    backend: str
    dtype: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    sqnr_db: float
    correction_rank: int = 0
    uncorrected_db: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return plain data; an infinite SQNR becomes None, because JSON has no infinity."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Applied:
    """The receipt of one transform.

    Attributes:
        changed: What changed, in the words of `Preview.changes`. Never empty: changing nothing is an error.
        undo: Restores the original bit for bit; or None.
        no_undo: Where `undo` is None, the reason why.
        skipped: What was left as it was although asked for, with the reason of each.
        note: What the reader of a report should know.
        details: One receipt a layer, where a transform changes layers one by one; in the JSON, not in the table.
        unfinished: Whether `apply` has not returned, or was interrupted; filled in by ``optimize``.
        replaced: What it set attributes in the place of (`Undo.replaced`); filled in by ``optimize``.
        seconds: Wall time of `Transform.apply`; filled in by ``optimize``.
        bytes_before: Bytes of the pipe's weights before; filled in by ``optimize``.
        bytes_after: Bytes of the pipe's weights after; filled in by ``optimize``.
    """

    changed: tuple[str, ...]
    undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    no_undo: str | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    details: tuple[LayerReceipt, ...] = field(default=(), repr=False)
    unfinished: bool = False
    replaced: frozenset[tuple[int, str, int]] = field(default=frozenset(), repr=False, compare=False)
    seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0

    def __post_init__(self) -> None:
        if (self.undo is None) == (self.no_undo is None):
            raise TypeError("a receipt has either an undo or the reason why there is none (no_undo=...)")


@dataclass(frozen=True)
class Transform(ABC):
    """One opt-in change to a pipeline. Concrete transforms are final, frozen dataclasses.

    Class-level facts:
        phase: When it runs.
        slot: What it occupies; a pipe has at most one transform per slot.
        effect: What it does to the picture: a class attribute, or a property where it depends on the arguments.
        extra: The pip extra it needs, or None.
    """

    phase: ClassVar[Phase]
    slot: ClassVar[str]
    extra: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        missing = [fact for fact in ("phase", "slot") if not hasattr(cls, fact)]
        missing += ["effect"] if inspect.getattr_static(cls, "effect") is vars(Transform)["effect"] else []
        if missing and ABC not in cls.__bases__:
            raise TypeError(
                f"{cls.__name__} must say its {', '.join(missing)} as class attributes; "
                "an effect that depends on the arguments may be a property"
            )
        own = vars(cls).get("__post_init__")
        if own is not None:
            type.__setattr__(cls, "__post_init__", _after_check(own))

    def __post_init__(self) -> None:
        """Refuse arguments of types other than declared, and turn lists into tuples, before a subclass's own checks.

        Raises:
            ValueError: There are some.
        """
        for name, value in arguments_of(self).items():
            object.__setattr__(self, name, value)
        if getattr(self, "components", None) == ():
            raise ValueError("components takes a tuple of at least one name, as in ('transformer',); got ()")

    @property
    @abstractmethod
    def effect(self) -> Effect:
        """What this transform, with these arguments, does to the picture."""

    @property
    def occupies(self) -> str:
        """What at most one transform of a pipe occupies: its slot, or a part of it if a slot has several parts."""
        return self.slot

    @property
    def changes_inside(self) -> tuple[str, ...]:
        """The components whose modules or forwards it replaces; it sees them without wrappers of torch.compile."""
        return ()

    def keeps_compiled(self, pipe: Pipeline, context: Context) -> bool:
        """Return whether a script's own ``torch.compile`` of what it `changes_inside` can compile what it makes there.

        Where it cannot, that is taken off when this is applied, and comes back when it is undone.
        """
        return False

    @property
    def floor_db(self) -> float | None:
        """For a LOSSY transform, the promised signal-to-noise ratio of the latents in dB; else None."""
        return None

    @property
    def moves_to(self) -> str | None:
        """The device that this moves the pipe to, and that the plan is then made for; None if it moves nothing."""
        return None

    @property
    def runs_on_accelerator(self) -> bool:
        """Whether a pipe on the host will run on the machine's accelerator, which the plan is then made for."""
        return False

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        """Return what the pipe will be once this has run, from ``context.planned(pipe)``, what it will be before.

        Asked only where `preview` lists changes. Override it in a transform that changes anything `PlannedPipe`
        describes: the transforms after it, and the bytes of the plan, follow what is returned.
        """
        return context.planned(pipe)

    @abstractmethod
    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        """Return every reason why this cannot run on this pipe and machine; empty if it can. Changes nothing."""

    def family_reasons(self, pipe: Pipeline) -> list[str]:
        """Return those reasons of `unsupported` that are only a lack of knowledge: the pipe is of no known family.

        A preset leaves such a transform out, with the reason, and does everything else that the pipe allows.
        """
        return []

    @abstractmethod
    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        """Return what `apply` would change; asked only if it is supported. Changes nothing."""

    @abstractmethod
    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        """Change the pipe in place and return the receipt. Leave the pipe untouched if it raises (see `Undo`)."""

    def __repr__(self) -> str:
        """Write the call that makes this transform: the main argument, then what differs from the defaults."""
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if f.repr and value != default:
                shown.append(f"{f.name}={value!r}" if f.kw_only else repr(value))
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_json(self) -> dict[str, object]:
        """Return the transform as plain data: its class name under "transform", and all its fields."""
        return {"transform": type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(self)}


def _after_check(own: Callable[[Transform], None]) -> Callable[[Transform], None]:
    """Return the ``__post_init__`` of a subclass, run once the arguments are of the types it declares."""

    @functools.wraps(own)
    def __post_init__(self: Transform) -> None:
        Transform.__post_init__(self)
        own(self)

    return __post_init__


#: Metadata of a field that belongs to one machine, as a folder does: ``field(default=None, metadata=MACHINE_LOCAL)``.
#: ``save`` leaves it out and ``load`` refuses a folder that gives it, because whoever made the folder would otherwise
#: choose what is read, run or written here. A transform with such a field and no default for it is not saved at all.
MACHINE_LOCAL: Mapping[str, bool] = MappingProxyType({"machine_local": True})

_PATH_WORDS = re.compile(r"(^|_)(path|folder|dir|directory|cache|file|filename|root|location|module|command)s?(_|$)")


def machine_local_fields(cls: type[Transform]) -> dict[str, Field[object]]:
    """Return the fields of a transform class that are declared `MACHINE_LOCAL`, by name."""
    return {f.name: f for f in fields(cls) if f.metadata.get("machine_local")}


def undeclared_paths(cls: type[Transform]) -> list[str]:
    """Return the fields of a transform class that look like a path and are not declared `MACHINE_LOCAL`.

    Any whose type is a path does, and any text whose name says folder, file, path, cache, command or the like.
    """
    declared = machine_local_fields(cls)
    return [
        f.name
        for f in fields(cls)
        if f.name not in declared
        and ("Path" in str(f.type) or ("str" in str(f.type) and _PATH_WORDS.search(f.name.lower())))
    ]
