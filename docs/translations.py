"""Which Chinese pages are missing, or older than their English originals: ``python -m docs.translations``.

``--mark PAGE ...`` says that the translation has what the English page says now; ``--code`` copies code that differs.
A hash of what there is to translate is kept in ``docs/translations.json``: of the prose and of the comments in code,
not of code, nor of where lines break. Code must be equal, comments aside, so that running the English page is enough.
A plan that a page shows is printed by the command in the language of the page: see ``docs/generate_plans.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "translations.json"
#: The English pages that have a Chinese one beside them.
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/installation.md",
    "docs/faq.md",
    "docs/tutorials/first-picture.md",
    "docs/troubleshooting.md",
    "docs/tutorials/lora.md",
    "docs/tutorials/quantize-certify-ship.md",
    "docs/tutorials/service.md",
    "docs/memory.md",
    "docs/batch.md",
    "docs/tutorials/shop.md",
    "docs/evaluate.md",
    "docs/quantization.md",
    "docs/editing.md",
    "docs/lora.md",
    "docs/z-image-and-newbie.md",
    "docs/schedulers.md",
    "docs/comfyui.md",
    "docs/serving.md",
    "docs/performance.md",
    "docs/cards/index.md",
    "docs/cards/8gb.md",
    "docs/cards/12gb.md",
    "docs/cards/16gb.md",
    "docs/cards/24gb.md",
    "docs/cards/48gb.md",
    "docs/cards/80gb.md",
    "docs/cards/ascend.md",
    "docs/cards/cpu.md",
)
#: Written by docs/generate_cards.py in both languages from the same figures.
GENERATED = "docs/cards/"
_BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"(?:(?<=\s)|^)#(?: (?P<text>.*))?$", re.MULTILINE)
#: What `ernie-accel plan` prints, and the option for it that only a Chinese page needs.
_PRINTED = re.compile(r"^(?P<command>\$ ernie-accel plan .*?)(?: --lang zh)?\n(?s:.*)", re.MULTILINE)
_SHEET_FIGURES = re.compile(r"^\|.*\n|\d[\d.]*", re.MULTILINE)


def translated(page: str) -> Path:
    """Return where the translation of an English page is, or should be."""
    return ROOT / page.replace(".md", ".zh.md")


def original(name: str) -> str:
    """Return the English page, as in `PAGES`, that a path means: from the root, either language.

    Raises:
        SystemExit: The page has no translation.
    """
    page = name.replace(".zh.md", ".md").removeprefix("./")
    if page not in PAGES:
        raise SystemExit(f"{name} is not a page with a translation; these are: {', '.join(PAGES)}")
    return page


def read(page: Path) -> str:
    """Return the text of a page."""
    return page.read_text(encoding="utf-8")


def comments(code: str) -> list[str]:
    """Return the comments of a block, in order."""
    return [found["text"] or "" for found in _COMMENT.finditer(code)]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return kind and code of each block, without comments, nor what spaces stood before them, nor printed plans."""
    blocks = ((found["kind"], _PRINTED.sub(r"\g<command>\n", found["code"])) for found in _BLOCK.finditer(text))
    return [(kind, re.sub(r"[ \t]+$", "", _COMMENT.sub("", code), flags=re.MULTILINE)) for kind, code in blocks]


def digest(page: str) -> str:
    """Return the hash of what there is to translate in an English page."""
    text = _BLOCK.sub(lambda block: "\n".join(comments(block["code"])), read(ROOT / page))
    if page.startswith(GENERATED):
        text = _SHEET_FIGURES.sub("", text)
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def kept() -> dict[str, str]:
    """Return the hashes of the English pages as their translators saw them."""
    return dict(json.loads(read(KEPT)))


def faults() -> list[str]:
    """Return what is to be done, one line for each page."""
    seen, found = kept(), []
    for page in PAGES:
        if not translated(page).exists():
            found.append(f"{page}: has no translation")
        elif seen.get(page) != digest(page):
            found.append(f"{page}: changed since it was translated; then: python -m docs.translations --mark {page}")
        elif code_blocks(read(ROOT / page)) != code_blocks(read(translated(page))):
            found.append(f"{page}: the code differs in its translation; run: python -m docs.translations --code")
    return found


def mark(pages: list[str]) -> None:
    """Keep the hashes that these pages have now."""
    seen = kept() | {page: digest(page) for page in map(original, pages)}
    KEPT.write_text(json.dumps(dict(sorted(seen.items())), indent=1) + "\n", encoding="utf-8")


def copy_code() -> None:
    """Give translations the blocks that differ from the English ones; comments in these are English again.

    So are plans that a page shows, until `docs/generate_plans.py` has run.

    Raises:
        SystemExit: A page has more or fewer blocks than its translation.
    """
    for page in PAGES:
        english, path = read(ROOT / page), translated(page)
        chinese = read(path)
        blocks = [(found[0], code_blocks(found[0])) for found in _BLOCK.finditer(english)]
        if len(blocks) != len(code_blocks(chinese)):
            raise SystemExit(f"{page} has {len(blocks)} blocks of code, its translation {len(code_blocks(chinese))}")
        theirs = iter(blocks)

        def replaced(found: re.Match[str], theirs: object = theirs) -> str:
            block, code = next(theirs)  # type: ignore[call-overload]
            if code_blocks(found[0]) == code:
                return found[0]
            return _PRINTED.sub(lambda plan: plan[0].replace(plan["command"], f"{plan['command']} --lang zh", 1), block)

        path.write_text(_BLOCK.sub(replaced, chinese), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mark", nargs="+", metavar="PAGE", default=[])
    parser.add_argument("--code", action="store_true")
    asked = parser.parse_args()
    mark(asked.mark)
    if asked.code:
        copy_code()
    print("\n".join(faults()) or "every translation is up to date")
    sys.exit(bool(faults()))
