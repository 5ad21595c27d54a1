"""Write docs/lifecycle.md from the cells of the matrix; what stands there after a marker stays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.lifecycle.actions import ACTIONS, GROUPS
from tests.lifecycle.cells import ABSENT, EQUAL, FAULT, LEFT, REFUSED, WITHIN, Cell
from tests.lifecycle.subjects import OTHERS, PIPES, ROWS, TITLES, Row

PAGE = Path(__file__).parents[2] / "docs" / "lifecycle.md"
#: What follows this comment on the page is written by others.
MARKER = "<!-- diffusers -->"
#: What follows this comment, up to the other, is `section`.
OTHERS_MARKER = "<!-- others -->"

INTRODUCTION = """\
# Life after `optimize`

Scripts go on with a pipe after `optimize`: they load LoRAs, replace parts, cast, copy, save and share it. This page
says what happens then. Each cell of the table stands for several actions, done to an optimized pipe and to a stock one
of the same weights. The pictures that both draw afterwards are compared:

| in the table | meaning |
|---|---|
| **=** | the same bits as stock after the same action |
| **≈** | within what the transform declares ([effects](concepts.md#effect)), or as if the script had acted first |
| **r** | refused, and the pipe proved unchanged; the note gives the reason |
| **!** | a known fault; the note says what is wrong |
| **·** | no such action on these pipes: stock cannot do it either |
| **?** | not run yet |

The last column restores the pipe after each action. **=** there means the bits of the stock pipe after the same
action; **≈** that what your script brought (a LoRA, other weights) had been rounded to the pipe's dtype by then; **w**
that a `RestoreWarning` names what your script had put there, and stays.

"As if the script had acted first" is the measure for transforms that draw another picture by design, and for those
whose floor was earned on trained weights: the pipe draws what it would draw if it were optimized after the action.

A pipe that a script makes of an optimized one (`from_pipe`, or its class called with the same components) shares the
optimized parts, the scheduler among them. It does not take over what belongs to the calls of the first pipe: its
default steps and guidance are the pipeline's own again. Pass them, or set them on the new pipe too:
`optimize(new, CallDefaults("turbo"))`. The matrix compares such a pipe with one that was made first and then optimized,
called with the pipeline's own defaults.

What your script passed through `torch.compile` is optimized as if it had not been: the wrapper is seen through, so
family and layers are found. `Quantize`, `SetAttention`, `ElideMask`, `ExpandAttentionMask` and `FewSteps` leave your
compiled object around the component, and it compiles again what is there now (after `Quantize` only if that makes
layers that can be compiled). Other transforms put something in a component that it cannot compile. They take it off,
which plan and report say, and `restore` gives your own compiled object back; `Compile()` and `CompileVae()` compile
what they make. The same holds for `module.compile()` in place. If you compile a transformer as a whole after
`optimize`, the pictures are right, but it runs without the graphs, caches and batches of guidance that were put there.

All of this runs on tiny pipelines with random weights on a CPU: {families}. CUDA graphs are recorded by a stand-in, and
compiled blocks run eagerly ({traced} are traced). The table cannot show what only a GPU does.

{count} of {total} cells have run: every action on every row, on one of its pipelines after another, and the more of
them the longer it ran. A mark stands for the actions of its column. `fuse_lora` on layers of `Quantize` was built
after that run: its note there says "cannot merge", and is out of date.

`python -m tests.lifecycle` runs the matrix and writes this page; `nox -s lifecycle` does so in its own environment.
"""

OTHERS_INTRODUCTION = """\
## Other pipelines of these families

The same actions and rows on what else diffusers draws with Z-Image, and on a stand-in for the code that NewBie-image's
authors publish with it (`tests/own_newbie.py`): {families}. Most of them share transformer and blocks with the
pipelines above, so they have a table of their own. {count} of {total} cells have run
(`python -m tests.lifecycle --others`); "on" names the pipelines of those. CI does every action on one of these
pipelines.
"""


def page(cells: Iterable[Cell], kept: str = "", total: int = 0, others: str = "") -> str:
    """Return the whole page.

    Args:
        cells: Of the pipes in `PIPES`.
        kept: What others have written at its end.
        total: How many cells there are, without the pairs.
        others: What `section` returned before.
    """
    every, notes = list(cells), _Notes()
    found, pairs = ([each for each in every if len(each.actions) == number] for number in (1, 2))
    traced = ", ".join(f"`{row.name}`" for row in ROWS.values() if row.traced)
    families = ", ".join(TITLES[family] for family in PIPES)
    text = INTRODUCTION.format(families=families, traced=traced, count=len(found), total=total)
    lines = [text, "## Transforms and presets", "", *_table(found, notes, PIPES), "", *notes.lines(), ""]
    lines += ["## The actions", "", "| column | what is done |", "|---|---|"]
    lines += [f"| {title} | {_in_group(group)} |" for group, title in GROUPS.items()]
    lines += ["", *_pairs_text(found, pairs), "", "## Where a row does not apply", "", *_absent(found, PIPES)]
    others = f"\n{OTHERS_MARKER}{others}" if others else ""
    return "\n".join(lines).rstrip() + "\n" + others + (f"\n{MARKER}{kept}" if kept else "")


def section(cells: Iterable[Cell], total: int = 0) -> str:
    """Return the part of the page on the pipes in `OTHERS`, which follows its marker."""
    every, notes = list(cells), _Notes()
    found, pairs = ([each for each in every if len(each.actions) == number] for number in (1, 2))
    families = ", ".join(TITLES[family] for family in OTHERS)
    lines = ["\n", OTHERS_INTRODUCTION.format(families=families, count=len(found), total=total)]
    lines += [*_table(found, notes, OTHERS), "", *notes.lines(), "", *_pairs_text(found, pairs), ""]
    return "\n".join([*lines, "Where a row does not apply:", "", *_absent(found, OTHERS)]).rstrip() + "\n"


def with_section(page_text: str, others: str) -> str:
    """Return a page with another `section`."""
    rest, _, kept = page_text.partition(f"\n{MARKER}")
    rest = rest.partition(f"\n{OTHERS_MARKER}")[0]
    return f"{rest}\n{OTHERS_MARKER}{others}" + (f"\n{MARKER}{kept}" if kept else "")


def others_text(page_text: str) -> str:
    """Return what stands on a page between the two markers."""
    return page_text.partition(OTHERS_MARKER)[2].partition(f"\n{MARKER}")[0]


def kept_text(page_text: str) -> str:
    """Return what stands on a page after the marker, which others have written."""
    return page_text.partition(MARKER)[2]


class _Notes:
    """Footnotes by text, numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._actions: dict[str, dict[str, None]] = {}

    def number(self, reason: str, action: str) -> int:
        text = _shared_text(reason)
        self._actions.setdefault(text, {})[action] = None
        return self._numbers.setdefault(text, len(self._numbers) + 1)

    def lines(self) -> Iterator[str]:
        for text, number in self._numbers.items():
            yield f"{number}. *{', '.join(self._actions[text])}*: {text}"


#: Names of classes, by which the same reason differs from family to family.
_CLASSES = re.compile(
    r"\b(?:ErnieImage|ZImage|Lumina2|NextDiT|Newbie|Flux|StableDiffusion|Wan|UNet2DCondition|AutoencoderKL)\w*"
)


#: Where the files of the tests lie on the machine that ran them.
_PLACES = re.compile(r"(?<=')[^'\s]*/tests/data/")


def _shared_text(reason: str) -> str:
    text = _PLACES.sub("", _CLASSES.sub("…", reason))
    return re.sub(r"[|<>]", " ", re.sub(r"(?<=\bto\()torch\.\w+", "…", text)).strip()


def _table(cells: list[Cell], notes: _Notes, pipes: Iterable[str]) -> Iterator[str]:
    yield "| transforms | on | " + " | ".join(GROUPS.values()) + " | then `restore` |"
    yield "|---|---|" + "---|" * (len(GROUPS) + 1)
    for row in ROWS.values():
        mine = [cell for cell in cells if cell.row == row.name]
        shown = " | ".join(_group_text([c for c in mine if _group(c) == group], notes) for group in GROUPS)
        yield f"| `{row.name}` | {_on(row, mine, [*pipes])} | {shown} | {_restore_text(mine, notes)} |"


def _group(cell: Cell) -> str:
    return ACTIONS[cell.actions[-1]].group


def _on(row: Row, cells: list[Cell], pipes: list[str]) -> str:
    families = [family for family in pipes if any(c.family == family and c.verdict != ABSENT for c in cells)]
    if row.gpu:
        return "planned only: needs a GPU"
    if not cells:
        return "?"
    return "all" if len(families) == len(pipes) else ", ".join(TITLES[family] for family in families)


def _group_text(cells: list[Cell], notes: _Notes) -> str:
    if not cells:
        return "?"
    verdicts = {cell.verdict for cell in cells}
    parts = ["≈" if WITHIN in verdicts else "=" if EQUAL in verdicts else ""]
    for verdict, sign in ((REFUSED, "r"), (FAULT, "!")):
        numbers = sorted({notes.number(c.reason, c.actions[-1]) for c in cells if c.verdict == verdict})
        if numbers:
            parts.append(f"{sign}<sup>{', '.join(map(str, numbers))}</sup>")
    return " ".join(filter(None, parts)) or "·"


def _restore_text(cells: list[Cell], notes: _Notes) -> str:
    if all(len(cell.actions) == 1 and cell.verdict == ABSENT for cell in cells) or not cells:
        return "·" if cells else "?"
    restored = {cell.restored for cell in cells}
    parts = ["≈" if WITHIN in restored else "=" if EQUAL in restored else ""]
    for verdict, sign in ((LEFT, "w"), (REFUSED, "r"), (FAULT, "!")):
        numbers = sorted(
            {notes.number(_left(c.restored_reason), c.actions[-1]) for c in cells if c.restored == verdict}
        )
        if numbers:
            parts.append(f"{sign}<sup>{', '.join(map(str, numbers))}</sup>")
    return " ".join(filter(None, parts)) or "·"


def _left(reason: str) -> str:
    """Return a warning of `restore` without the one place out of many that it names."""
    return re.sub(r"restore left \S+ as it is", "restore left it as it is", reason)


def _in_group(group: str) -> str:
    return "; ".join(action.name for action in ACTIONS.values() if action.group == group)


def _pairs_text(singles: list[Cell], pairs: list[Cell]) -> Iterator[str]:
    yield f"{len(singles)} cells were run for the table: {_counted(singles)}."
    if pairs:
        yield f"{len(pairs)} pairs of actions, one after the other, were drawn at random: {_counted(pairs)}."


def _counted(cells: list[Cell]) -> str:
    count = Counter(cell.verdict for cell in cells)
    words = {EQUAL: "equal", WITHIN: "within", REFUSED: "refused", FAULT: "faults", ABSENT: "not applicable"}
    return ", ".join(f"{count[verdict]} {word}" for verdict, word in words.items())


def _absent(cells: list[Cell], pipes: Iterable[str]) -> Iterator[str]:
    """Yield why a row does nothing to some pipes, each reason once."""
    for row in ROWS.values():
        reasons: dict[str, list[str]] = {}
        for family in pipes:
            mine = [cell for cell in cells if cell.row == row.name and cell.family == family]
            if mine and all(cell.verdict == ABSENT for cell in mine) and not row.gpu:
                reasons.setdefault(_shared_text(mine[0].reason), []).append(TITLES[family])
        for reason, families in reasons.items():
            yield f"- `{row.name}` on {', '.join(families)}: {reason}"
