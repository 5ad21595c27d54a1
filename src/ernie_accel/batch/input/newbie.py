"""Check NewBie-image's structured prompts: XML blocks of tags, in which one slip of the pen breaks the picture.

The model is trained on ``<character_1>...</character_1>`` blocks, numbered from 1, and a ``<general_tags>`` block, with
or without an ``<img>`` around them and text before, between and after. Tags of one's own are common and let through;
what looks like a known tag misspelt is not.
"""

from __future__ import annotations

import difflib
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from xml.parsers import expat

from ernie_accel.batch.errors import listed
from ernie_accel.batch.input.gate import text_problem

CHARACTER_TAGS = (
    "n",
    "gender",
    "appearance",
    "clothing",
    "body_type",
    "expression",
    "action",
    "interaction",
    "position",
)
GENERAL_TAGS = (
    "count",
    "artists",
    "style",
    "background",
    "environment",
    "perspective",
    "atmosphere",
    "lighting",
    "quality",
    "resolution",
    "objects",
    "other",
    "caption",
)

_BLOCKS = ("character_1", "general_tags", "caption")  # character_2 and so on go before

_STRUCTURED = re.compile(r"</?\s*(character_[0-9]+|general_tags)\b")
_TAG = re.compile(r"<(/?)([a-zA-Z]\w{5,15})>")  # about as long as the names of blocks
_CHARACTER = re.compile(r"character_([0-9]{1,4})")
_MAX_TAGS, _MAX_MESSAGES = 1000, 10
_FIXES = {
    expat.errors.codes[expat.errors.XML_ERROR_UNDEFINED_ENTITY]: "there are no entities; write '&' as '&amp;'",
    expat.errors.codes[expat.errors.XML_ERROR_INVALID_TOKEN]: "write '<' as '&lt;', and no control characters",
}
_BARE_AMPERSAND = re.compile(r"&(?!#?\w+;)")  # the model reads plain text: people write it as it is


def structure_problems(prompt: str) -> list[str]:
    """Return what is wrong with a structured prompt; an empty list for a good one, and for one that is plain text."""
    if reason := text_problem(prompt):
        return [f"prompt {reason}"]
    if not (_STRUCTURED.search(prompt) or _misspelt(prompt)):
        return []
    if "<!" in prompt.replace("<!--", ""):
        return ["structured prompt declares a document type or entities; remove the declaration"]
    opening = "<prompt>"
    try:
        # As long as what it replaces, so that columns stay right: only the structure is looked at.
        root = ElementTree.fromstring(f"{opening}{_BARE_AMPERSAND.sub('+', prompt)}</prompt>")
    except ElementTree.ParseError as error:
        line, column = error.position
        column = max(1, column + 1 - (len(opening) if line == 1 else 0))
        reason, fix = str(error).partition(":")[0], _FIXES.get(error.code, "close every tag")
        return [f"structured prompt is not well-formed XML ({reason}) at its line {line}, column {column}; {fix}"]
    if sum(1 for _ in root.iter()) > _MAX_TAGS:
        return [f"structured prompt has more than {_MAX_TAGS:,} tags; expected some dozens"]
    wrapper = root.find("img")
    blocks = list(root if wrapper is None else wrapper)
    numbers = [int(match[1]) for block in blocks if (match := _CHARACTER.fullmatch(block.tag))]
    problems = []
    if numbers != list(range(1, len(numbers) + 1)):
        found = listed(numbers)
        problems.append(f"structured prompt numbers its characters {found}; expected 1 to {len(numbers)}, in order")
    for block in blocks:
        if block.tag.startswith("character_"):
            problems += _block_problems(block, CHARACTER_TAGS)
        elif block.tag == "general_tags":
            problems += _block_problems(block, GENERAL_TAGS)
        elif block.tag not in _BLOCKS and (close := _nearest(block.tag, _BLOCKS)):
            problems.append(f"structured prompt has a block <{block.tag}>; did you mean <{close}>?")
    return problems[:_MAX_MESSAGES]


def _misspelt(prompt: str) -> bool:
    """Return whether a prompt that names no block has a tag, opened and closed, that is spelt nearly like one."""
    found = list(dict.fromkeys(_TAG.findall(prompt)))
    closed = {name for slash, name in found if slash}
    both = [name for slash, name in found if not slash and name in closed]
    return any(_nearest(name, _BLOCKS[:2]) for name in both[:_MAX_TAGS])


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return the name that this one may be a misspelling of, with its own number if it has one; "" for none."""
    close = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), "")
    number = re.search("[0-9]+$", name)
    return f"character_{number[0]}" if number and close == "character_1" else close


def _block_problems(block: ElementTree.Element, known: Sequence[str]) -> list[str]:
    problems = []
    tags = Counter(child.tag for child in block)
    if not tags and not (block.text or "").strip():
        problems.append(f"structured prompt has nothing in <{block.tag}>; fill it or delete it")
    for tag, count in tags.items():
        if count > 1:
            problems.append(f"structured prompt has {count} <{tag}> in <{block.tag}>; join them with commas")
        if tag not in known and tag != "artist" and (close := _nearest(tag, known)):
            problems.append(f"structured prompt has <{tag}> in <{block.tag}>; did you mean <{close}>?")
    return problems
