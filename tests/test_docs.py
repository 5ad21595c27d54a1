"""Every Python example of the README and the docs runs, in order, as a reader would paste it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from ernie_accel.cli import main
from ernie_accel.core import context
from ernie_accel.families import registry
from ernie_accel.transforms import TRANSFORMS, transform_class

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: An example that cannot run everywhere stands behind this comment, with the reason.
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")


def examples(page: Path) -> list[tuple[int, str]]:
    """Return (line, code) of the page's Python examples that are to be run."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if not NOT_RUN.search(text[: match.start()]):
            found.append((text[: match.start()].count("\n") + 2, match.group(1)))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: p.name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", [])  # a page registers a family, and another a package
    monkeypatch.setattr("ernie_accel.core.context._REGISTERED", {})
    (tmp_path / "prompts.csv").write_text("sku,prompt\nmug,a large red circle in the center on a grey background\n")
    namespace: dict = {}
    for line, code in examples(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # so that a failure names the line
    assert namespace


def test_the_page_of_transforms_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("generate_transforms", ROOT / "docs" / "generate_transforms.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python docs/generate_transforms.py"


@pytest.mark.parametrize("beside", [{}, {"cudnn": "1.32"}], ids=["here", "with cudnn"])
def test_the_plan_in_the_docs_is_what_the_command_prints(capsys, monkeypatch, beside):
    installed = context.installed_versions()
    monkeypatch.setattr(context, "installed_versions", lambda: {**installed, **beside})
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    command, shown = re.search(r"^\$ ernie-accel (plan .*)\n((?s:.*?))^```", text, flags=re.MULTILINE).groups()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(command.split())
    printed = capsys.readouterr().out
    elsewhere = "attention in "  # bf16, or where cuDNN is installed fp8
    everywhere = [[line for line in text.splitlines() if elsewhere not in line] for text in (printed, shown)]
    assert everywhere[0] == everywhere[1]


def test_the_readme_has_examples_that_run():
    assert examples(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"Quantize"}))  # each scheme pays elsewhere: quantization.md
def test_every_transform_says_when_it_pays(name):
    prose, _, pays = (transform_class(name).__doc__ or "").partition("Pays:")
    assert prose.strip() and len(pays.split("Attributes:")[0].split()) > 5
