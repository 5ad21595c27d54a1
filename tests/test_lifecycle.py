"""A sample of the lifecycle matrix: every action, transform and family; ``nox -s lifecycle`` runs it all."""

from __future__ import annotations

from dataclasses import replace

import pytest

import ernie_accel
from ernie_accel.transforms import TRANSFORMS
from tests.lifecycle.actions import ACTIONS, GROUPS, Action
from tests.lifecycle.cells import ABSENT, EQUAL, FAULT, WITHIN, Cell, Effect, cell, is_known, not_applicable
from tests.lifecycle.matrix import in_turns, singles
from tests.lifecycle.page import MARKER, OTHERS_MARKER, PAGE, kept_text, others_text, page, section, with_section
from tests.lifecycle.subjects import BESIDE_Z_IMAGE, OTHERS, PIPES, ROWS, TITLES, Row

RUN_HERE = [row for row in ROWS.values() if not row.gpu and not row.preset]  # presets are left to the whole
#: Rows whose cells take long, as they trace or draw many steps, by the beginning of their name, and the quickest pipe.
SLOW = {"CacheSteps": "ernie", "Compile()": "wan", "CompileVae": "flux", "RewriteEnhancer": "ernie"}
SLOW["Compile(), Warmup"] = "ernie"  # the longer beginning counts
QUICK = [row for row in RUN_HERE if not row.name.startswith(tuple(SLOW))]

MASKED = "z_image controlled within a mask"

#: What stock cannot do on tiny pipes that have no text encoder, or draw only one picture at a time.
_OF_PROMPTS = {
    "text encoder",
    "in place: text encoder",
    "`save_pretrained`, `from_pretrained`",
    "`pipe.transformer = torch.compile(...)` before",
    "`pipe.transformer = torch.compile(...)` after",
    "list of generators",
    "several images per prompt",
    "several prompts",
    "empty negative prompt",
    "negative prompt",
}


#: What stock cannot do on a transformer that is none of diffusers' models, or in a pipeline without a callback.
_OF_DIFFUSERS = {
    "group offload",
    "layerwise casting",
    "`set_attention_backend`",
    "`from_pipe`",
    "`from_pipe` to image to image",
    "`save_pretrained`, `from_pretrained`",
    "`compile_repeated_blocks()` after",
    "Ctrl-C in a call, then another call",
    "error in a callback, then another call",
    "latents",
    "`prompt_embeds`",
}


def families_for(action: Action) -> list[str]:
    """Return the tiny pipes on which stock can do this."""
    if action.name == "`from_pipe` to image to image":
        return ["z_image", "flux", "sd"]
    absent = {"flux", "sd", "wan"} if action.name in _OF_PROMPTS else set()
    if action.group in ("LoRA", "memory", "copies", "compile"):
        absent |= {"newbie"} | ({"lumina2"} if action.name.startswith("`compile_repeated") else set())
    return [family for family in PIPES if family not in absent]


def chosen(name: str, families: list[str]) -> tuple[str, Row]:
    """Return the tiny pipe and the row on which an action is tried: both go around with the number of the action."""
    number = list(ACTIONS).index(name)
    turned = [families[(number + at) % len(families)] for at in range(len(families))]
    rows = (QUICK[(number + at) % len(QUICK)] for at in range(len(QUICK)))
    return next((family, row) for row in rows for family in turned if not_applicable(row, family) is None)


@pytest.mark.parametrize("action", ACTIONS)
def test_what_a_script_does_to_an_optimized_pipe_is_right_or_refused(action):
    check(*chosen(action, families_for(ACTIONS[action])), action)


#: What stock cannot do on tiny pipelines of Z-Image that draw from pictures, and on which of them.
_NOT_ON_OTHERS = {
    "`from_pipe` to image to image": frozenset(BESIDE_Z_IMAGE),
    **dict.fromkeys(("list of generators", "several images per prompt", "several prompts"), frozenset([MASKED])),
    **dict.fromkeys(("`.to(float32)`", "`.half()`", "`prompt_embeds`"), frozenset(["z_image omni"])),
}


def others_for(action: str) -> list[str]:
    """Return the tiny pipelines of Z-Image that draw from pictures, on which stock can do this."""
    return [family for family in BESIDE_Z_IMAGE if family not in _NOT_ON_OTHERS.get(action, ())]


@pytest.mark.parametrize("action", [name for name in ACTIONS if others_for(name)])
def test_the_same_on_what_else_is_drawn_with_z_image(action):
    check(*chosen(action, others_for(action)), action)


@pytest.mark.parametrize(
    "action",
    [each.name for each in ACTIONS.values() if each.group != "LoRA" and each.name not in _OF_DIFFUSERS],
)
def test_the_same_on_the_code_of_newbies_authors(action):
    check(*chosen(action, ["own_newbie"]), action)


@pytest.mark.parametrize("row", [row.name for row in RUN_HERE if row not in QUICK])
def test_what_takes_long_is_restored(row):
    check(SLOW[max((start for start in SLOW if row.startswith(start)), key=len)], ROWS[row], "`restore`")


def check(family: str, row: Row, action: str) -> None:
    found = cell(family, row, action)
    assert found.verdict != ABSENT, found
    assert (FAULT in (found.verdict, found.restored)) == is_known(found), found


def test_the_sample_has_every_row_and_every_family():
    sample = [chosen(name, families_for(action)) for name, action in ACTIONS.items()]
    assert {row.name for _, row in sample} == {row.name for row in QUICK}
    assert {family for family, _ in sample} == set(PIPES)
    assert {chosen(name, others)[0] for name in ACTIONS if (others := others_for(name))} == set(BESIDE_Z_IMAGE)


def test_every_transform_and_preset_has_a_row_and_every_action_a_column():
    rows = list(ROWS.values())
    assert {type(each).__name__ for row in rows for each in row.all_transforms} == set(TRANSFORMS)
    assert all(any(name in row.name.split() or f"{name}," in row.name for row in rows) for name in ernie_accel.presets)
    assert {action.group for action in ACTIONS.values()} == set(GROUPS)


def test_the_page_has_every_row_and_every_action():
    text = PAGE.read_text(encoding="utf-8")
    for title, run in (("Transforms and presets", ""), ("Other pipelines of these families", " --others")):
        part = text.partition(f"## {title}")[2].partition("\n## ")[0]
        table = [line.split(" | ")[0].strip("| `") for line in part.splitlines() if line.startswith("| `")]
        assert table == list(ROWS), f"run: python -m tests.lifecycle{run}"
    assert all(TITLES[family] in text for family in (*PIPES, *OTHERS))
    listed = {
        name
        for line in text.splitlines()
        for title in GROUPS.values()
        if line.startswith(f"| {title} |")
        for name in line.split(" | ")[1].removesuffix(" |").split("; ")
    }
    assert listed == set(ACTIONS), "run: python -m tests.lifecycle"


def test_the_page_keeps_what_others_have_written():
    made = page([], "\n\n## Counts\n")
    assert made.endswith(f"{MARKER}\n\n## Counts\n")
    assert page([], kept_text(made)) == made
    both = page([], "\n\n## Counts\n", others=section([]))
    assert (kept_text(both), others_text(both)) == (kept_text(made), section([]))
    assert page([], kept_text(both), others=others_text(both)) == both
    assert both.index(OTHERS_MARKER) < both.index(MARKER)
    assert with_section(made, section([])) == with_section(both, section([])) == both
    assert with_section(page([]), section([])) == page([], others=section([]))


def test_a_fault_is_seen(monkeypatch):
    """An undo that does nothing, an effect that is declared too small: the matrix can fail."""
    row = Row("casts", (ernie_accel.CastDtype("bfloat16"),))
    assert isinstance(found := cell("flux", row, "scheduler"), Cell)
    assert found.restored == EQUAL
    monkeypatch.setattr(ernie_accel, "restore", lambda pipe: pipe)
    assert cell("flux", row, "scheduler").restored == FAULT
    monkeypatch.setattr(ernie_accel.CastDtype, "effect", Effect.EXACT)
    monkeypatch.setattr(ernie_accel.CastDtype, "floor_db", None)
    exact = Row("casts exactly", row.transforms)
    assert cell("flux", exact, "scheduler").verdict == FAULT


def test_a_pipe_that_a_script_makes_has_the_optimized_parts_and_stocks_defaults(monkeypatch):
    row, action = ROWS["preset turbo-int8, quality-int8"], ACTIONS["`from_pipe`"]
    assert cell("z_image", row, action.name).verdict == WITHIN

    def with_its_defaults(pipe, case):
        made = action.do(pipe, case)
        return ernie_accel.optimize(made, *row.transforms) if ernie_accel.report(pipe).entries else made

    monkeypatch.setitem(ACTIONS, action.name, replace(action, do=with_its_defaults))
    assert cell("z_image", row, action.name).verdict == FAULT


def test_what_stock_cannot_do_is_no_fault():
    assert cell("flux", ROWS["SliceVae()"], "text encoder").verdict == ABSENT


def test_what_a_cast_loses_by_itself_is_measured_on_stock(monkeypatch):
    """Changed in bfloat16, weights are others than those that are cast after: no fault, but nothing may be added."""
    row, action = ROWS["preset npu-bf16"], "in place: transformer"
    assert cell("sd", row, action).verdict == WITHIN
    optimize, made = Row.optimize, []

    def worse(self, pipe):
        made.append(optimize(self, pipe))
        if len(made) == 1:
            pipe.unet.conv_in.weight.data.mul_(1.05)
        return pipe

    monkeypatch.setattr(Row, "optimize", worse)
    assert cell("sd", row, action).verdict == FAULT


def test_a_run_that_is_stopped_has_some_of_every_row_and_column():
    jobs = singles(0, [*OTHERS])
    ordered = in_turns(jobs)

    def cells(jobs):
        return [(row, *each) for row, cells in jobs for each in cells]

    assert sorted(cells(ordered)) == sorted(cells(jobs))
    whole = [row.name for row in RUN_HERE if not_applicable(row, "z_image omni") is None]
    first = [(row, ACTIONS[actions[0]].group) for row, _, actions in cells(ordered)[: len(ROWS) * len(GROUPS)]]
    assert {(row, group) for row in whole for group in GROUPS} <= set(first)
