"""The README and the docs: their examples run, their commands exist, their figures are those of the files they name."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import ernie_accel
from ernie_accel.batch.output import ledger
from ernie_accel.cli.app import app
from ernie_accel.core import context
from ernie_accel.families import registry
from ernie_accel.storage import manifest
from ernie_accel.transforms import TRANSFORMS, transform_class
from tests.page_blocks import blocks, embedded_instead, run_commands

ROOT = Path(__file__).parents[1]
#: The Chinese ones have the same code: see test_translations.py.
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if not page.name.endswith(".zh.md")),
]


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.is_run for b in blocks(p))], ids=lambda p: p.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    """In order, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", [])  # a page registers a family, and another a package
    monkeypatch.setattr("ernie_accel.core.context._REGISTERED", {})
    embedded_instead(monkeypatch)
    (tmp_path / "prompts.csv").write_text("sku,prompt\nmug,a large red circle in the center on a grey background\n")
    namespace: dict = {}
    for block in blocks(page):
        if block.is_run and block.kind == "python":  # so that a failure names the line
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
        elif block.is_run:
            run_commands(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_is_of_a_kind_that_is_checked_or_is_text(page):
    for block in blocks(page):
        assert block.kind in ("python", "sh", "json", "toml", "text"), f"{page.name}:{block.line} is {block.kind!r}"
        if block.kind == "json":
            json.loads(block.code)


COMMANDS = [
    pytest.param(command, id=f"{page.name}:{block.line} {command[0] if command else ''}")
    for page in PAGES
    for block in blocks(page)
    for command in block.commands()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_pages_are_ones_that_exist(command):
    """Their options too; nothing is run."""
    name, *arguments = command
    typer.main.get_command(app).commands[name].make_context(name, arguments)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_transforms_is_what_the_code_says():
    written = script("generate_transforms")
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run: python docs/generate_transforms.py"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the script reads TOML with Python's own parser")
def test_the_page_of_licences_has_every_dependency():
    """Not what each declares today: a new release of one must not fail here."""
    written = script("generate_licences")
    table = written.PAGE.read_text(encoding="utf-8").removeprefix(written.HEAD)
    assert table.startswith("| accelerate |"), "run: python docs/generate_licences.py"
    assert {name: use for name, use, _ in written.ROW.findall(table)} == written.uses(), (
        "run: python docs/generate_licences.py"
    )
    assert "not installed" not in table


PLANS = script("generate_plans")
SHOWN = [(page, *found.groups()) for page in PLANS.PAGES for found in PLANS.SHOWN.finditer(page.read_text("utf-8"))]


@pytest.mark.parametrize(
    ("command", "shown", "beside"),
    [
        pytest.param(command, shown, beside, id=f"{page.name}: {command} {' '.join(beside)}".rstrip())
        for page, command, shown in SHOWN
        for beside in ({}, {"cudnn": "1.32"})[: 2 if "h200" in command else 1]
    ],
)
def test_the_plans_in_the_docs_are_what_the_command_prints(command, shown, beside, monkeypatch):
    installed = context.installed_versions()
    monkeypatch.setattr(context, "installed_versions", lambda: {**installed, **beside})
    printed = PLANS.printed(command)
    # Where cuDNN is installed, attention is in fp8 and not in bf16, and needs less.
    elsewhere = re.compile(
        "attention in |^denoise |ExplainOutOfMemory" if "h200" in command else "attention in |注意力用 "
    )
    everywhere = [[line for line in text.splitlines() if not elsewhere.search(line)] for text in (printed, shown)]
    assert everywhere[0] == everywhere[1], "run: python docs/generate_plans.py"


CARDS, CHARTS = script("generate_cards"), script("generate_charts")


@pytest.mark.parametrize(
    ("folder", "files", "command"),
    [
        (CARDS.FOLDER, CARDS.files, "python -m docs.generate_cards"),
        (CHARTS.IMAGES, CHARTS.charts, "python -m docs.generate_charts"),
    ],
    ids=["cards", "charts"],
)
def test_generated_pages_and_charts_are_what_the_figures_say(folder, files, command):
    stale = [name for name, text in files().items() if (folder / name).read_text(encoding="utf-8") != text]
    assert stale == [], f"run: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_compares_figures_without_a_picture(page):
    text = page.read_text(encoding="utf-8")
    rows = (re.sub(r"`[^`]*`", "", line) for line in text.splitlines() if line.startswith("|"))
    figures = [found for row in rows for found in re.findall(r"\| *([-+]?\d[\d.,]*(?: [A-Za-z%]+)?) *(?=\|)", row)]
    if len(figures) > 2 and page.name != "installation.md":  # which has versions and exit codes
        assert "![" in text, f"draw them in docs/generate_charts.py: {figures[:9]}"


def test_the_words_of_chinese_charts_are_chinese():
    chinese = script("charts_zh").in_chinese
    assert chinese("preset turbo-fp8, in an earlier run") == "预设 turbo-fp8，先前的一次运行"
    assert chinese("17.7 GiB") == "17.7 GiB"
    with pytest.raises(SystemExit, match="has no Chinese for: a nicer picture"):
        chinese("a nicer picture")
    drawn = {name: text for name, text in (CARDS.files() | CHARTS.charts()).items() if name.endswith(".svg")}
    texts = {name: re.findall(r"<text[^>]*>([^<]*)", text) for name, text in drawn.items()}
    assert all(len(words) == len(texts[name.replace(".zh.svg", ".svg")]) for name, words in texts.items())
    left = [
        word
        for name, words in texts.items()
        if ".zh." in name
        for word in words
        if re.search(r"\b(a|an|in|the|of|by|on)\b", word)
    ]
    assert left == []


def test_no_line_breaks_between_a_figure_of_a_table_and_its_unit():
    kept = script("keep_units").on_page_markdown(
        "| 9.0 s | 16.1 GB, stock | 2 x | `1 s` |\n9.0 s\n```text\n| 1 s |\n```\n"
    )
    assert kept == ("| 9.0\xa0s | 16.1\xa0GB, stock | 2\xa0x | `1 s` |\n9.0 s\n```text\n| 1 s |\n```\n")


@pytest.mark.parametrize("card", ["rtx3060", "rtx4060"])
def test_the_pages_of_cards_predict_what_the_page_of_memory_shows(card):
    """The plans on that page are compared with what the command prints, so these figures are too."""
    found = json.loads(CARDS.FIGURES.read_text(encoding="utf-8"))[CARDS.ERNIE][card]
    (shown,) = (shown for _, command, shown in SHOWN if command.endswith(f"--device {card}"))
    memory = f"{CARDS.needed(found) / CARDS.GIB:.1f} GiB of {found['budget'] / CARDS.GIB:.1f} GiB it may use: fits"
    assert memory in shown, "run: python -m docs.generate_cards --plan"
    assert f"Host memory for what is not on the device: {found['host'] / CARDS.GIB:.1f} GiB" in shown
    assert all(f"  + {why}" in shown for why in found["why"])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "card"), list(zip(CARDS.MODELS, ("rtx3090", "t4", "ascend910b"), strict=True)))
def test_the_pages_of_cards_are_what_plans_predict(model, card):
    kept = json.loads(CARDS.FIGURES.read_text(encoding="utf-8"))
    now = {card: CARDS.planned(model, card), "cpu": CARDS.weights(model)}
    assert {key: kept[model][key] for key in now} == now, "run: python -m docs.generate_cards --plan"


def test_every_plan_in_the_docs_is_compared():
    found = [page for page in PAGES if PLANS.SHOWN.search(page.read_text("utf-8"))]
    assert {*found} == {page for page in PLANS.PAGES if ".zh." not in page.name}
    shown = [(page.name.replace(".zh.md", ".md"), command.replace(" --lang zh", "")) for page, command, _ in SHOWN]
    assert all(shown.count((page.name, command)) == 2 for page, command, _ in SHOWN if page.name == "memory.md")


@pytest.mark.parametrize(
    ("family", "rungs"),  # stock, compiled, torchao, ours: results/rung
    [
        (
            "ERNIE-Image",
            "ladder_products/stock ladder_products/stock+compile ladder_products/torchao-fp8+compile "
            "ladder_products/turbo-fp8",
        ),
        (
            "Z-Image-Turbo",
            "z_image_products/stock z_image_products/stock+compile z_image_products/torchao-fp8+compile "
            "z_image_products/turbo-fp8",
        ),
        (
            "NewBie-image",
            "newbie_products/stock newbie_products/compiled-bf16 newbie_products/compiled-fp8 "
            "newbie_products/quality-fp8",
        ),
    ],
)
def test_the_figures_in_the_readmes_are_those_of_the_benchmark(family, rungs):
    def found(results_and_rung: str) -> dict[str, Any]:
        name, _, rung = results_and_rung.partition("/")
        text = (ROOT / "benchmarks" / "results" / f"{name}_h200_202611.json").read_text(encoding="utf-8")
        return next(each for each in json.loads(text)["rungs"] if each["rung"] == rung)

    shown = [found(each) for each in rungs.split()]
    stock, *_, ours = shown
    preset = ours["rung"]
    figures = [
        *(f"{each['ms_1024']:.1f}" for each in shown),
        f"{stock['ms_1024'] / ours['ms_1024']:.2f} x",
        *(f"{each['weight_gb']:.1f}" for each in (ours, stock)),
        f"{ours['first_picture_s']:.1f} s",
    ]
    for name in ("README.md", "README.zh.md"):
        (row,) = re.findall(rf"^\| {family}.*$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        cells = row.partition(" B")[2]  # after the parameters
        assert re.findall(r"\d+\.\d+(?: x| s)?", cells) == figures, name
        assert f"`{preset}`" in cells


def test_the_readme_has_examples_that_run():
    assert any(block.is_run for block in blocks(ROOT / "README.md"))


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("*.zh.md"), *(ROOT / "docs").rglob("*.zh.md")], ids=lambda p: p.name
)
def test_links_within_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def pages_in(nav: Any) -> list[str]:
    """Return the pages of a part of the site's navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)]


def test_every_page_is_in_the_navigation_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages_in(nav)) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:])


def test_every_public_name_is_in_the_reference_once():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    found = sorted(name for page in pages for name in re.findall(r"^::: ernie_accel\.(\S+)$", page, flags=re.MULTILINE))
    own = [f"batch.{name}" for name in ernie_accel.batch.__all__ if name not in ernie_accel.__all__]
    public = [name for name in ernie_accel.__all__ if name not in ("batch", "demo", "fidelity")]
    assert found == sorted([*public, *own, "fidelity.grid_score", "demo.load"])


def documented_keys(document: str) -> set[str]:
    """Return the JSON keys that docs/stability.md promises for a document, given as in its table."""
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(document)} \| (.*) \|$", page, flags=re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))


def test_the_page_of_stability_lists_the_keys_of_plans_and_reports():
    pipe, transform = ernie_accel.demo.load(), ernie_accel.KeepTimestepsOnHost()  # has no fields
    request = ernie_accel.CastDtype("bfloat16")
    plan = json.loads(ernie_accel.plan(pipe, transform).to_json())
    ernie_accel.optimize(pipe, request)
    report = json.loads(ernie_accel.report(pipe).to_json())
    assert set(plan) == documented_keys("`Plan.to_json()`")
    assert set(plan["steps"][0]) == documented_keys("a step of a plan")
    card = ernie_accel.Context.named("rtx4090")
    placed = json.loads(ernie_accel.plan(pipe, transform, context=card, memory="auto").to_json())
    assert set(placed) - set(plan) == {"memory"}
    assert set(placed["memory"]) == documented_keys("`memory` of a plan that was asked for it")
    assert set(placed["memory"]["stages"][0]) == documented_keys("a stage of it")
    assert set(report) == documented_keys("`Report.to_json()`")
    assert set(report["entries"][0]) == documented_keys("an entry of a report") | {f.name for f in fields(request)}


def test_the_page_of_concepts_has_all_phases_in_their_order():
    page = " ".join((ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").split())
    assert f"`{' < '.join(phase.name for phase in sorted(ernie_accel.Phase))}`" in page


def test_the_page_of_stability_names_the_formats_that_are_written():
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    formats = re.findall(r"^\| (.*) \| (\d+) \| .* \| (\d+) \(.*\|$", page, flags=re.MULTILINE)
    assert [(int(now), int(before)) for _, now, before in formats] == [
        (manifest.FORMAT_VERSION, manifest.FORMAT_VERSIONS[0]),
        (ledger._VERSION, 1),
    ]
    assert max(manifest.FORMAT_VERSIONS) == manifest.FORMAT_VERSION


@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"Quantize"}))  # each scheme pays elsewhere: quantization.md
def test_every_transform_says_when_it_pays(name):
    prose, _, pays = (transform_class(name).__doc__ or "").partition("Pays:")
    assert prose.strip() and len(pays.split("Attributes:")[0].split()) > 5
