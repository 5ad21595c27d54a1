"""The Chinese pages: none is missing or older than the English one, their words are those of the list of terms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.test_docs import PAGES, ROOT, script

TRANSLATIONS = script("translations")
CHINESE = [TRANSLATIONS.translated(page) for page in TRANSLATIONS.PAGES]
#: Code, targets of links, attributes and tags: not prose.
NOT_PROSE = re.compile(r"^```\w*\n.*?^```$|`[^`\n]+`|\]\([^)\n]*\)|\{[^}\n]*\}|<[^>\n]*>", re.DOTALL | re.MULTILINE)
HAN = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"
HEADING = re.compile(r"^(#+) (.*?)(?: \{ #(.*) \})?$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_no_translation_is_missing_or_older_than_its_original():
    assert TRANSLATIONS.faults() == []


def test_what_makes_a_translation_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(TRANSLATIONS, "ROOT", tmp_path)
    monkeypatch.setattr(TRANSLATIONS, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(TRANSLATIONS, "PAGES", ("a.md",))
    (tmp_path / "kept.json").write_text("{}")
    english, chinese = tmp_path / "a.md", tmp_path / "a.zh.md"
    english.write_text("One\ntwo.\n\n```sh\nls  # all\n```\n")
    assert TRANSLATIONS.faults() == ["a.md: has no translation"]
    chinese.write_text("一二。\n\n```sh\nls  # 全部\n```\n")
    assert "changed since" in TRANSLATIONS.faults()[0]
    TRANSLATIONS.mark(["a.zh.md"])
    assert TRANSLATIONS.faults() == []
    english.write_text("One two.\n\n```sh\nls   # all\n```\n")  # where lines break is nothing to translate
    assert TRANSLATIONS.faults() == []
    english.write_text("One two.\n\n```sh\nls  # each\n```\n")
    assert "changed since" in TRANSLATIONS.faults()[0]
    english.write_text("One two.\n\n```sh\nls -l  # all\n```\n")
    assert "--code" in TRANSLATIONS.faults()[0]
    TRANSLATIONS.copy_code()
    assert (TRANSLATIONS.faults(), chinese.read_text()) == ([], "一二。\n\n```sh\nls -l  # all\n```\n")
    english.write_text("One two three.\n\n```sh\nls -l  # all\n```\n")
    assert "changed since" in TRANSLATIONS.faults()[0]
    with pytest.raises(SystemExit, match=r"b\.md is not a page with a translation"):
        TRANSLATIONS.mark(["b.md"])


def test_every_translation_is_of_a_page_that_is_compared():
    found = sorted([*ROOT.glob("*.zh.md"), *(ROOT / "docs").rglob("*.zh.md")])
    assert found == sorted(CHINESE)
    assert sorted(TRANSLATIONS.kept()) == sorted(TRANSLATIONS.PAGES)
    assert {ROOT / page for page in TRANSLATIONS.PAGES} <= set(PAGES)


def test_a_sentence_on_the_pages_of_cards_without_its_chinese_is_an_error():
    chinese = script("cards_zh").in_chinese
    table = "| card | how it fits |\n|---|---|\n| L4 | {} |\n"
    assert chinese(table.format("everything stays on the device")) == (
        "| 显卡 | 放置方案 |\n|---|---|\n| L4 | 全部留在设备上 |\n"
    )
    with pytest.raises(SystemExit, match="has no Chinese for: by magic"):
        chinese(table.format("everything stays on the device; by magic"))
    with pytest.raises(SystemExit, match=r"has no Chinese for: It is fast\."):
        chinese("# 8 GB\n\nIt is\nfast.\n")


def slug(title: str) -> str:
    """Return the anchor that the site gives a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


@pytest.mark.parametrize("page", TRANSLATIONS.PAGES)
def test_headings_and_links_are_those_of_the_original(page):
    """Links into a page lead to the same place in both languages."""
    english, chinese = (ROOT / page).read_text("utf-8"), TRANSLATIONS.translated(page).read_text("utf-8")
    prose = [re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE) for text in (english, chinese)]
    headings = [HEADING.findall(text) for text in prose]
    assert [level for level, *_ in headings[0]] == [level for level, *_ in headings[1]]
    if page.startswith("docs/"):
        wanted = [given or slug(title) for _, title, given in headings[0][1:]]
        assert [given or slug(title) for _, title, given in headings[1][1:]] == wanted
    links = [sorted({link.replace(".zh.md", ".md") for link in LINK.findall(text)}) for text in prose]
    between = {"README.md"}
    assert set(links[0]) - between == set(links[1]) - between
    if page == "README.md":  # read where nothing chooses the language for the reader
        to_english = {link.partition("#")[0] for link in LINK.findall(chinese)} & set(TRANSLATIONS.PAGES)
        assert to_english == between


def terms() -> list[tuple[str, str, str]]:
    """Return each term, its Chinese word, and a word that is not used for it."""
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*)\|", page, flags=re.MULTILINE)[1:]
    return [(term, used, bad) for term, used, others in rows for bad in filter(None, others.strip().split("、"))]


def test_the_list_of_terms_does_not_contradict_itself():
    assert len(terms()) > 30
    assert [(used, bad) for _, used, _ in terms() for _, _, bad in terms() if bad in used] == []


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.stem)
def test_the_words_and_the_punctuation_are_chinese(page):
    text = page.read_text(encoding="utf-8")
    prose = NOT_PROSE.sub("", text)
    found = [f"{bad}: {term} is {used}" for term, used, bad in terms() if bad in text]
    assert found == [], "docs/glossary.md has the words"
    half = re.findall(rf".{{0,9}}(?:[{HAN}][,:;?!(]|[,:;?!)][{HAN}]).{{0,9}}", prose)
    assert half == [], "punctuation beside Chinese is full-width"
    assert len(re.findall(f"[{HAN}]", prose)) > len(prose) / 8  # and it is Chinese


def test_the_navigation_is_translated():
    site = yaml.safe_load(Path(ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    (plugin,) = (each["i18n"] for each in site["plugins"] if isinstance(each, dict) and "i18n" in each)
    (chinese,) = (each for each in plugin["languages"] if each["locale"] == "zh")
    same = {"LoRA", "ComfyUI", "API", "CPU", "8 GB", "12 GB", "16 GB"}
    english = re.compile(r"Load, plan, optimize|Pictures from pictures|Fidelity|Extending|Errors")  # pages in English

    def titles(nav):
        if isinstance(nav, dict):
            return [*nav, *(title for part in nav.values() for title in titles(part))]
        return [title for part in nav for title in titles(part)] if isinstance(nav, list) else []

    wanted = {title for title in titles(site["nav"]) if title not in same and not english.fullmatch(title)}
    assert wanted == set(chinese["nav_translations"])
