"""What the library keeps on live objects that it did not make: a note of one name and one type each, and the list."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

T = TypeVar("T")
_notes: dict[str, Note[object]] = {}
#: All notes by name, as far as the modules that define them are imported.
NOTES: Mapping[str, Note[object]] = MappingProxyType(_notes)


class Note(Generic[T]):
    """A value of one type on a pipe, module, scheduler, processor or tensor.

    It is an attribute of the object itself, so a deep copy or a pickle has a note of its own. A transform attaches it
    with `Undo.attach`, whose undo removes it.

    Attributes:
        name: What it is called, unique.
        kind: The type of its values; whatever else is found under the name is not the library's, and ignored.
        holder: On what it is kept, in words.
        meaning: What it says, in words.
        attribute: The attribute that holds it.
    """

    def __init__(self, name: str, kind: type[T], holder: str, meaning: str) -> None:
        """Define a note.

        Raises:
            ValueError: There is one of this name.
        """
        if name in _notes:
            raise ValueError(f"a note named {name!r} is defined already: {_notes[name]!r}")
        self.name, self.kind, self.holder, self.meaning = name, kind, holder, meaning
        self.attribute = f"_ernie_accel_{name}"
        _notes[name] = self  # type: ignore[assignment]  # a value is only read from it there

    def __repr__(self) -> str:
        return f"Note({self.name!r}, {self.kind.__name__}, on a {self.holder})"

    def of(self, owner: object) -> T | None:
        """Return the value that `owner` has; None if it has none."""
        value = getattr(owner, self.attribute, None)
        return value if isinstance(value, self.kind) else None

    def required(self, owner: object) -> T:
        """Return the value that `owner` has.

        Raises:
            LookupError: It has none.
        """
        value = self.of(owner)
        if value is None:
            raise LookupError(f"this {type(owner).__name__} has no {self.name}: {self.meaning}")
        return value

    def put(self, owner: object, value: T) -> None:
        """Let `owner` have `value`, in place; pipelines do not register it among their components."""
        object.__setattr__(owner, self.attribute, value)

    def drop(self, owner: object) -> None:
        """Remove the value from `owner`, in place; a no-op if it has none."""
        if self.attribute in getattr(owner, "__dict__", {}):
            object.__delattr__(owner, self.attribute)
