"""The command line speaks Chinese where it is asked to; programs, data and everybody else get English as before."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
import string
from pathlib import Path

import pytest

from ernie_accel import cli, optimize, report
from ernie_accel.batch import read_table
from ernie_accel.batch.errors import BatchInputError
from ernie_accel.common.chinese import CATALOGUE
from ernie_accel.common.language import VARIABLE, language_asked_for, localized, said, say, speaking
from ernie_accel.common.text import width
from ernie_accel.core.transform import Effect
from ernie_accel.transforms.denoiser.rewrite_blocks import RewriteBlocks
from ernie_accel.transforms.weights.cast_dtype import CastDtype
from tests.pipelines import tiny_ernie

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ernie_accel"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
BAD_TABLE = "sku,seed,width,height,steps,cfg,prompt\nmug,x,100,128,8,4,a red circle\nMUG,1,128,128,900,4,\ncup,1,128\n"


@pytest.fixture(autouse=True)
def no_locale(monkeypatch):
    for name in (VARIABLE, "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bad_table(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text(BAD_TABLE, encoding="utf-8")
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def strings():
    """Yield every string in the source, and whether it is the template of a message."""
    for path in SOURCE.rglob("*.py"):
        if path.name in ("chinese.py", "language.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        speaks = any(
            isinstance(node, ast.ImportFrom) and node.module == "ernie_accel.common.language" for node in tree.body
        )
        calls = [
            node.args[0]
            for node in ast.walk(tree)
            if speaks and isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("say", "said")
        ]
        named = {each.id for each in calls if isinstance(each, ast.Name)}
        templates = {each.value for each in calls if isinstance(each, ast.Constant)}
        for node in ast.walk(tree):
            is_named = isinstance(node, ast.Assign) and named & {getattr(each, "id", None) for each in node.targets}
            if is_named and isinstance(node.value, ast.Constant):
                templates.add(node.value.value)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value, node.value in templates


def fields(template):
    return sorted(
        (name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template) if name is not None
    )


def test_every_entry_of_the_catalogue_is_in_the_source_and_every_message_in_the_catalogue():
    found = dict.fromkeys(text for text, _ in strings())
    assert [key for key in CATALOGUE if key not in found] == []
    assert sorted({text for text, is_template in strings() if is_template} - CATALOGUE.keys()) == []
    assert {effect.value for effect in Effect} <= CATALOGUE.keys()


@pytest.mark.parametrize("key", CATALOGUE)
def test_a_translation_has_the_fields_of_its_original(key):
    assert set(fields(CATALOGUE[key])) == set(fields(key))
    assert not {"", None} & {name for name, *_ in fields(key)}, "fields are named"


def test_the_terms_are_those_of_the_glossary():
    rows = re.findall(
        r"^\|([^|]*)\|([^|]*)\|([^|]*)\|", (ROOT / "docs" / "glossary.md").read_text("utf-8"), re.MULTILINE
    )
    wrong = [word for *_, row in rows[2:] for word in row.strip().split("、") if word]
    assert len(wrong) > 20
    assert [(word, text) for text in CATALOGUE.values() for word in wrong if word in text] == []


def test_a_message_is_its_english_text_until_it_is_shown_in_chinese():
    message = said("{name} {reason}", name="steps", reason=said("has a NUL character; remove it"))
    for each in (message, pickle.loads(pickle.dumps(message)), copy.deepcopy(message)):
        assert each == "steps has a NUL character; remove it" == localized(each)
        assert json.dumps(each) == '"steps has a NUL character; remove it"'
        with speaking("zh"):
            assert localized(each) == "steps 含有 NUL 字符；请删除"
    with speaking("zh"):
        assert localized("steps") == "steps"
        assert say("a template without a translation, {n}", n=1) == "a template without a translation, 1"


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh"}, "zh"),
        ({"LC_MESSAGES": "zh_TW.Big5", "LANG": "de_DE"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN"}, "en"),
        ({"LC_ALL": "", "LANG": "zh_CN"}, "zh"),
        ({"LANG": "zhuang"}, "en"),
        ({VARIABLE: "en", "LANG": "zh_CN"}, "en"),
        ({VARIABLE: "fr"}, "fr"),  # refused by the command, with the list
    ],
)
def test_the_language_that_an_environment_asks_for(environment, language):
    assert language_asked_for(environment) == language


def english_words(text):
    return sorted(set(re.findall(r"[A-Za-z]{3,}", text)))


def english_phrases(text):
    return re.findall(r"[A-Za-z]+(?: [A-Za-z]+){2,}", text.replace("NVIDIA GeForce RTX", ""))


def labels_of(text, *known):
    """Return the English words of a text that are not part of something known to stay English."""
    for each in sorted(known, key=len, reverse=True):
        text = text.replace(each, "")
    return english_words(text)


@pytest.mark.parametrize("before", [True, False])
def test_a_plan_in_chinese_has_no_label_in_english(capsys, before):
    asked = ("plan", "--preset", "turbo-bf16", "--device", "rtx4090", "--memory", "12GiB")
    code, english, _ = run(capsys, *asked)
    arguments = ("--lang", "zh", *asked) if before else (*asked, "--lang", "zh")
    code_zh, chinese, _ = run(capsys, *arguments)
    assert code_zh == code
    assert chinese.startswith("计划：预设 'turbo-bf16'，用于 ErnieImagePipeline（ERNIE-Image），在 cuda (")
    assert len(chinese.splitlines()) == len(english.splitlines())
    for label in ("变换", "影响", "将改变什么", "总体影响：另一张图。", "阶段", "去噪", "占用峰值"):
        assert label in chinese
    labels = {key for key in CATALOGUE if "{" not in key and CHINESE.search(CATALOGUE[key]) and len(key) > 3}
    cells = {cell for line in chinese.splitlines() for cell in re.split(r"\s{2,}", line.strip())}
    assert cells & labels == set()
    starts = [key.partition("{")[0].strip() for key in CATALOGUE if CHINESE.search(CATALOGUE[key])]
    assert [start for start in starts if len(start) > 4 and any(cell.startswith(f"{start} ") for cell in cells)] == []


def test_the_notes_of_frequent_transforms_are_chinese(capsys):
    _, chinese, _ = run(capsys, "--lang", "zh", "plan", "--device", "rtx3060")
    assert "无需改动：所有权重已是 bfloat16" in chinese
    assert "无需改动：所有权重已是这种布局和对齐" in chinese
    assert english_phrases(chinese) == []
    assert re.search(r"^\d+: 设备上有 [\d.]+ GB 权重$", chinese, re.MULTILINE)


@pytest.mark.parametrize(
    ("preset", "device", "model"),
    [("turbo-fp8", "rtx3060", None), ("rtx4060", "rtx3060", "Tongyi-MAI/Z-Image-Turbo")],
)
def test_a_plan_in_chinese_has_no_phrase_in_english(capsys, preset, device, model):
    named = () if model is None else ("--model", model)
    _, chinese, _ = run(capsys, "--lang", "zh", "plan", "--preset", preset, "--device", device, *named)
    assert english_phrases(chinese) == []
    assert "轮到时从内存取" in chinese


def test_columns_of_chinese_tables_line_up(capsys):
    _, chinese, _ = run(capsys, "--lang", "zh", "plan", "--preset", "turbo-bf16", "--device", "h200")
    lines = chinese.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith(" #"))
    column = width(lines[header].partition("影响")[0])
    for line in lines[header + 1 : header + 4]:
        cell = next(i for i in range(len(line)) if width(line[:i]) == column)
        assert line[cell - 2 : cell] == "  "
        assert line[cell] != " "


def test_json_is_never_translated(capsys):
    asked = ("plan", "--preset", "turbo-bf16", "--device", "rtx4090", "--json")
    assert run(capsys, *asked) == run(capsys, *asked, "--lang", "zh")


def test_a_report_in_chinese_has_no_label_in_english():
    pipe = optimize(tiny_ernie(), CastDtype("bfloat16"), RewriteBlocks())
    found = report(pipe)
    english, as_json = str(found), found.to_json()
    with speaking("zh"):
        chinese = str(found)
        assert found.to_json() == as_json
        assert "报告：" in found._repr_html_()
    assert str(found) == english
    assert english.startswith("Report: CastDtype('bfloat16'), RewriteBlocks() on ErnieImagePipeline, cpu")
    notes = [entry.applied.note for entry in found.entries if entry.applied is not None]
    changed = [name for entry in found.entries if entry.applied is not None for name in entry.applied.changed]
    names = ("transformer.layers.*", "ErnieImagePipeline", "torch", "diffusers", *map(repr, (CastDtype("bfloat16"),)))
    versions = found.context.versions.values()
    assert (
        labels_of(chinese, "RewriteBlocks()", "cpu", "CPU", "GiB", "text_encoder", *names, *notes, *changed, *versions)
        == []
    )
    assert "已应用" in chinese


def test_errors_of_a_table_in_chinese_have_no_label_in_english(capsys, bad_table, tmp_path):
    asked = ("batch", bad_table, "--out", tmp_path / "out", "--demo-model")
    code, _, english = run(capsys, *asked)
    code_zh, _, chinese = run(capsys, *asked, "--lang", "zh")
    assert code == code_zh == 2
    assert english.startswith(f"error: Cannot use '{bad_table}' (")
    assert chinese.startswith(f"错误：无法使用 '{bad_table}'（")
    assert len(chinese.splitlines()) == len(english.splitlines()) > 5
    assert chinese.rstrip().endswith("请改正后重新运行；什么也没有画。")
    names = ("seed", "steps", "guidance_scale", "cfg", "extra_columns", "--extra-columns", "prompt", "Unicode", "sku")
    files = ("mug_{index}.png", "MUG.png", "mug.png", "{sku}_{index}.png", "{sku}.png", "height", "steps")
    assert labels_of(chinese, str(bad_table), *names, *files) == []


def test_an_error_of_the_library_stays_english(bad_table):
    with pytest.raises(BatchInputError) as caught:
        read_table(bad_table)
    assert not CHINESE.search(str(caught.value))
    english = caught.value.problems
    with speaking("zh"):
        assert CHINESE.search(str(caught.value))
        assert CHINESE.search(str(pickle.loads(pickle.dumps(caught.value))))
        assert caught.value.problems == english
    assert not CHINESE.search("".join(text for _, text in caught.value.problems))


def test_the_summary_of_a_batch_in_chinese_has_no_label_in_english(capsys, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,steps\na large red circle in the center on a grey background,1\n", encoding="utf-8")
    asked = ("batch", table, "--out", tmp_path / "out", "--preset", "exact", "--lang", "zh")
    code, out, _ = run(capsys, *asked)
    assert code == 0
    last = out.splitlines()[-1]
    assert re.fullmatch(
        rf"成功 1 张，失败 0 张，用时 [\d.]+ 秒：{re.escape(str(tmp_path / 'out'))}，由内置演示模型（.*）制作", last
    )
    code, out, _ = run(capsys, *asked)
    assert code == 0
    assert out.splitlines()[-1].startswith("无事可做，1 行此前已完成：")
    written = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out").rglob("*.json*"))
    assert not CHINESE.search(written)


@pytest.mark.parametrize("before", [True, False])
def test_an_unknown_language_is_refused_with_the_list(capsys, before):
    given = ("--lang", "fr", "info") if before else ("info", "--lang", "fr")
    code, out, err = run(capsys, *given)
    assert (code, out) == (2, "")
    assert "Unknown language 'fr'" in err
    assert "Valid: en, zh." in err
    assert VARIABLE in err


def test_the_environment_chooses_and_the_option_wins_and_nothing_stays(capsys, monkeypatch):
    asked = ("plan", "--preset", "exact", "--device", "h200")
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert run(capsys, *asked)[1].startswith("计划：")
    assert say("fits") == "fits"
    assert run(capsys, *asked, "--lang", "en")[1].startswith("Plan: ")
    monkeypatch.setenv(VARIABLE, "en")
    assert run(capsys, *asked)[1].startswith("Plan: ")
