"""In a notebook, plans and reports are tables; the notebooks of the examples run."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import ernie_accel
from ernie_accel import Call, Context, MakeContiguous, Plan
from ernie_accel.common.text import html_lines, html_table
from tests.page_blocks import embedded_instead

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.py"))


class Tables(HTMLParser):
    """The text of each cell, row by row, and whether what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("br", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def plan() -> Plan:
    request = {"context": Context.named("rtx3060"), "memory": "8GiB", "call": Call(256, 256)}
    return ernie_accel.plan(ernie_accel.demo.load(), MakeContiguous(), **request)


def test_a_plan_shows_in_a_notebook_what_it_prints(plan):
    rows = Tables(plan._repr_html_()).rows
    assert ["#", "transform", "effect", "what would change", "weights"] in rows
    assert ["stage", "weights", "computing", "in use"] in rows  # the memory
    printed = " ".join(str(plan).split())
    assert all(" ".join(cell.split()) in printed for row in rows for cell in row)


def test_a_report_and_a_recommendation_show_in_a_notebook_what_they_print():
    pipe = ernie_accel.optimize(ernie_accel.demo.load(), ernie_accel.CastDtype("bfloat16"))
    for shown in (ernie_accel.report(pipe), ernie_accel.recommend(Context.named("t4"))):
        printed = " ".join(str(shown).split())
        rows = Tables(shown._repr_html_()).rows
        assert len(rows) > 1
        assert all(cell in printed for row in rows[1:] for cell in row)


def test_an_evaluation_shows_its_pictures():
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    call = {"height": 128, "width": 128, "num_inference_steps": 1, "guidance_scale": 1.0}
    found = ernie_accel.evaluate(pipe, MakeContiguous(), "a red <b>circle</b> | a ring", **call)
    page = found._repr_html_()
    assert page.count('src="data:image/png;base64,') == 2  # of the baseline and the candidate
    assert "a red &lt;b&gt;circle&lt;/b&gt; | a ring" in page
    assert "circle</b> \\| a ring" in found.to_markdown()
    many = replace(found, pictures=found.pictures * 20)._repr_html_()
    assert many.count("<img ") < 20  # a notebook stays small
    Tables(page)


def test_text_is_shown_as_it_stands():
    assert "&lt;script&gt;" in html_table(("<script>",), [("a",)])
    assert html_lines(["<i>"], "<b>") == "<p><b>&lt;b&gt;</b><br>&lt;i&gt;</p>"
    assert html_lines(()) == ""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_run(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedded_instead(monkeypatch)
    text = notebook.read_text(encoding="utf-8")
    assert re.match(r"# %% \[markdown\]\n# # ", text)  # a title
    exec(compile(text, str(notebook), "exec"), {})
