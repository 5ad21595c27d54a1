"""Keep figures of tables with their units: no line of the site breaks between them. A hook of mkdocs."""

from __future__ import annotations

import re
from typing import Any

#: Code, which stays as it is; or a figure with its unit.
FIGURE = re.compile(r"`[^`]*`|(?<=\d) (?=(?:ms|us|s|min|x|px|[KMGT]i?B|GB/s|dB|%|M|B)(?![\w]))")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put spaces that do not break into the rows of tables, outside code."""
    lines = markdown.split("\n")
    fenced = False
    for index, line in enumerate(lines):
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("|") and not fenced:
            lines[index] = FIGURE.sub(lambda found: found[0] if found[0] != " " else "\N{NO-BREAK SPACE}", line)
    return "\n".join(lines)
