"""Read YAML as the plain data it is used for in job files: text, numbers, true and false, lists and mappings.

Everything else that YAML can do is refused with its place: aliases (nine lines of them make a billion values), tags
(which name classes), keys that are not text or stand twice, dates, and numbers that are not written as in JSON.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_accel.batch.errors import BatchInputError, shown
from ernie_accel.batch.input.gate import MAX_DEPTH

if TYPE_CHECKING:
    import yaml
    from yaml.constructor import ConstructorError

_NUMBER = {
    "int": r"[-+]?(?:0|[1-9][0-9]{0,29})",  # not 010, which is 8 or 10, and not 1:30, which is 90
    "float": r"[-+]?(?:[0-9]{1,30}\.[0-9]*|\.[0-9]+|[0-9]{1,30}(?=[eE]))(?:[eE][-+]?[0-9]+)?",
}
_KEPT = ("bool", "null")


def parse_yaml(path: Path, text: str) -> object:
    """Return the value that YAML text holds; `path` is for the message.

    Raises:
        BatchInputError: It is not YAML, or more than plain data.
    """
    import yaml  # here, because most batches need none

    try:
        return yaml.load(text, Loader=_loader())  # a subclass of yaml.SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        line, column = (mark.line + 1, f" at column {mark.column + 1}") if mark else (None, "")
        if mark is None and (position := getattr(error, "position", None)) is not None:  # a character YAML forbids
            line = 1 + text.count("\n", 0, position)
            reason = f"{shown(text[position])}: {reason}"
        raise BatchInputError(path, [(line, f"is not valid YAML ({reason}{column})")]) from error


def _loader() -> type[yaml.SafeLoader]:
    import yaml
    from yaml.constructor import ConstructorError

    class PlainLoader(yaml.SafeLoader):
        """PyYAML's safe loader, less what is not plain data."""

        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if isinstance(event, yaml.AliasEvent):
                raise _refused(f"found the alias *{event.anchor}; write the value out", event)
            if getattr(event, "tag", None) is not None:
                raise _refused(f"found the tag {event.tag}; expected plain text, numbers, lists and mappings", event)
            if self.depth == MAX_DEPTH:
                raise _refused(f"nested more than {MAX_DEPTH} levels deep", event)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            seen = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise _refused("found a key that is not text; put it in quotes", key)
                if key.value in seen:
                    raise _refused(f"found the key {shown(key.value)} twice; keep one", key)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    def _refused(problem: str, at: Any) -> ConstructorError:
        return ConstructorError(None, None, problem, at.start_mark)

    resolvers: dict[object, object] = {}
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept = [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in _KEPT]
        resolvers[first] = kept
    PlainLoader.yaml_implicit_resolvers = resolvers
    for name, pattern in _NUMBER.items():
        PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), "-+.0123456789")
    return PlainLoader
