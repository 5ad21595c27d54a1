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

from ernie_accel import (
    BatchPromptEncoding,
    CacheSteps,
    CallDefaults,
    CastDtype,
    FewSteps,
    FreeAfterUse,
    MakeContiguous,
    Quantize,
    Residency,
    RewriteBlocks,
    SwapScheduler,
    TileVae,
    TruncatePrompts,
    Warmup,
    cli,
    optimize,
    report,
)
from ernie_accel.batch import read_table
from ernie_accel.batch.errors import BatchInputError
from ernie_accel.common.chinese import CATALOGUE
from ernie_accel.common.language import VARIABLE, language_asked_for, localized, said, say, speaking
from ernie_accel.common.text import width
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Effect
from tests.examples import ELSEWHERE, EXAMPLES
from tests.pipelines import after, tiny_ernie, tiny_flux, tiny_lumina2, tiny_sd, tiny_wan

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


def parsed(*folders):
    """Yield the path and the tree of every module of the source, or of some of its folders."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if path.name != "chinese.py" and (not folders or name.partition("/")[0] in folders):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def templates_of(tree):
    """Return the templates of messages in a module: what `say`, `said` and `joined` are called with."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    first = [call.args[0] for call in calls if getattr(call.func, "id", None) in ("say", "said")]
    first += [call.args[1] for call in calls if getattr(call.func, "id", None) == "joined" and len(call.args) > 1]
    named = {each.id for each in first if isinstance(each, ast.Name)}
    given = [each for each in first if isinstance(each, ast.Constant)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and named & {getattr(each, "id", None) for each in node.targets}:
            given.append(node.value)
    return {each.value for each in given if isinstance(each, ast.Constant)}


def strings():
    """Yield every string in the source, and whether it is the template of a message."""
    for _, tree in parsed():
        templates = templates_of(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value, node.value in templates


#: Where what plans, reports and the commands say is made.
SAYING = ("cli", "core", "families", "kernels", "memory", "models", "quantization", "recipes", "residency", "samplers")
SAYING += ("transforms",)
#: What stays English there, by the reason: "module: function or class", or the call that a string is an argument of.
ENGLISH = {
    "exceptions are English, and so is what is made for one": (
        "core/arguments.py: _advice",
        "core/arguments.py: _in_words",
        "core/arguments.py: arguments_of",
        "core/context.py: Context.missing",
        "core/context.py: NOT_SUPPORTED_YET",
        "core/errors.py: ApplyError.__init__",
        "core/errors.py: ConflictError.__init__",
        "core/errors.py: MissingExtraError.__init__",
        "core/errors.py: RestoreError.__init__",
        "core/errors.py: UnknownNameError.__init__",
        "core/hardware.py: _instead",
        "core/peft_layers.py: config_problems",
        "core/plan.py: compose",
        "kernels/hopper/attention.py: _check",
        "kernels/hopper/compiling.py: Kernel.__init__",
        "kernels/hopper/tensor_maps.py: _encoded",
        "kernels/low_rank.py: LowRankProduct.unmergeable_reason",
        "memory/planner.py: budget_of",
        "models/adapters.py: _missing",
        "models/adapters.py: _shape_problems",
        "models/adapters.py: _tensor_problem",
        "models/adapters.py: weight_problems",
        "models/lora_keys.py: ReadsForeignKeys.__call__",
        "models/lora_keys.py: ReadsForeignKeys._check_kinds",
        "models/ministral/enhancer.py: _too_long",
        "quantization/choose.py: check_names",
        "quantization/merging.py: _problem",
        "quantization/merging.py: stuck_reason",
        "quantization/refusals.py: _LoadStateDict.__call__",
        "quantization/refusals.py: _refuse_layerwise",
        "quantization/refusals.py: refuse_other_weights",
        "quantization/shown_plain.py: variant_problems",
        "residency/keeper.py: _NO_COPY",
        "transforms/calls/check_finite.py: _Check._no_rerun_reason",
        "transforms/calls/check_finite.py: _Check.around",
        "transforms/calls/check_finite.py: _Check._call",
        "transforms/calls/check_finite.py: _Check._call.check",
        "transforms/calls/check_finite.py: _Decode.__call__",
        "transforms/calls/explain_out_of_memory.py: _lines",
        "transforms/calls/explain_out_of_memory.py: _smaller",
        "transforms/calls/explain_out_of_memory.py: _words",
        "transforms/calls/warm_up.py: Warmup.__post_init__",
        "transforms/denoiser/cache_steps/blocks.py: BlockCache.bad_values",
        "transforms/denoiser/cache_steps/cache_steps.py: CacheSteps.__post_init__",
        "transforms/denoiser/cache_steps/forecast.py: Forecast.bad_values",
        "transforms/prompts/encode_prompts.py: _split",
        "transforms/scheduler/swap_scheduler.py: _alias_here",
        "transforms/weights/free_after_use.py: _and_more",
        "transforms/weights/quantize.py: Quantize.__post_init__",
    ),
    "a warning or a line of a log, as exceptions are": (
        "core/originals.py: log_made_anew",
        "models/adapters.py: _for_other_components",
        "transforms/prompts/truncate_prompts.py: _Limit._shorten",
    ),
    "--help is English": ("Typer", "Option", "Argument"),
    "the report of a batch is a file, and files are English": (
        "cli/batch.py: _FACTS",
        "cli/batch.py: _facts",
        "cli/batch.py: _note_run",
    ),
    "where a figure was published": (
        "core/hardware.py: Hardware(source)",
        "core/hardware.py: Rates",
        "core/hardware.py: _ADA",
        "core/hardware.py: _AMPERE",
        "core/hardware.py: _FROM_SHADERS",
        "core/hardware.py: _cuda",
        "core/hardware.py: _geforce",
        "core/hardware.py: _peaks",
        "families/ernie_image.py: CallSettings",
        "families/newbie.py: CallSettings",
        "families/published.py: Checkpoint",
        "families/published.py: Checkpoint(note)",
        "families/z_image.py: CallSettings",
    ),
    "only Python prints it, and that prints English": (
        "kernels/linear.py: Fp8Linear.extra_repr",
        "quantization/backend.py: Scheme",
        "quantization/bitsandbytes.py: FourBitLinear.extra_repr",
        "quantization/bitsandbytes.py: Int8Linear.extra_repr",
        "quantization/choose.py: Choice.__str__",
        "recipes/presets.py: _lines",
        "transforms/denoiser/set_attention.py: SetAttention.explain",
    ),
    "it says that the fast path of prompts is not taken, to the code that takes the other": (
        "models/ministral/weights.py: _decode_weight",
        "models/ministral/weights.py: _too_old",
        "models/ministral/weights.py: kernel_weights",
    ),
    "commands and code, the same in every language": (
        "cli/app.py: _show_version",
        "cli/app.py: demo_command",
        "transforms/denoiser/set_attention.py: AttentionBackend(package)",
        "transforms/scheduler/swap_scheduler.py: SwapScheduler._changes",
    ),
    "keys, which are translated where they are shown": (
        "core/plan.py: Plan.effect",
        "core/plan.py: _HEADER",
        "core/plan.py: keep_entries",
        "core/report.py: Entry.status",
        "core/report.py: _HEADER",
        "core/step.py: Step.verdict",
    ),
    "no text for a reader": (
        "kernels/ahead.py: start",
        "kernels/hopper/attention.py: source_of",
        "kernels/hopper/compiling.py: is_usable",
        "kernels/hopper/instructions.py: from_registers",
        "kernels/hopper/instructions.py: from_shared_memory",
        "kernels/hopper/product.py: source_of",
        "transforms/calls/explain_out_of_memory.py: compile",
        "transforms/calls/few_steps.py: _Reader",
        "transforms/calls/warm_up.py: PROMPT",
    ),
}
#: Calls whose arguments are messages, or the text of an exception or a warning.
SPOKEN = re.compile(r"\w*(Error|Warning)|say|said|joined|localized|leave|warn|Note|TypeVar")
WORDS = re.compile(r"[A-Za-z@]+[,:;]? [a-z]{2,}|[a-z]{2,} @")


def places_of_english(*folders):
    """Yield (place, text) of every string of words that is no message, no docstring, and in no exception."""
    for path, tree in parsed(*folders):
        templates, above = templates_of(tree), {}
        for node in ast.walk(tree):
            above |= dict.fromkeys(ast.iter_child_nodes(node), node)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "@" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if text in templates or not WORDS.search(text) or isinstance(above[node], (ast.JoinedStr, ast.Expr)):
                continue
            place = place_of(node, above)
            if place is not None:
                yield f"{path}: {place}" if place not in ENGLISH["--help is English"] else place, text


def place_of(node, above):
    """Return where a string is: functions and classes, else the call it is given to, else the name it gets."""
    definitions, call, name, below = [], None, None, node
    while node in above:
        below, node = node, above[node]
        if isinstance(node, ast.Raise):
            return None
        if isinstance(node, ast.Call) and node.func is not below:
            function = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if SPOKEN.fullmatch(function):
                return None
            if function in ENGLISH["--help is English"]:
                return function
            call = call or (f"{function}({below.arg})" if isinstance(below, ast.keyword) else function)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = getattr(target, "id", None)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions.insert(0, node.name)
    return ".".join(definitions) or call or name


def test_whatever_plans_and_commands_say_is_a_message_or_stays_english_for_a_reason():
    found = dict(places_of_english(*SAYING))
    known = {place for places in ENGLISH.values() for place in places}
    assert {place: text for place, text in found.items() if place not in known} == {}, "say it by `said`"
    assert sorted(known - found.keys()) == [], "nothing there is English any more"


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
    names = r"NVIDIA GeForce RTX|pip install \S+"
    return re.findall(r"[A-Za-z]+(?: [A-Za-z]+){2,}", re.sub(names, "", text))


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
    assert chinese.startswith("计划：预设 'turbo-bf16'，用于 ErnieImagePipeline（ERNIE-Image），设备 cuda（")
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


@pytest.mark.parametrize("device", ["rtx3060", "t4", "ascend910b", "rocm", "cpu", "cuda:12.0:24GiB"])
def test_a_recommendation_in_chinese_has_no_phrase_in_english(capsys, device):
    _, chinese, _ = run(capsys, "--lang", "zh", "recommend", "--device", device)
    assert re.match(r"关于 baidu/ERNIE-Image-Turbo：\n推荐用于 (cuda|npu|rocm|cpu).*：预设 '[a-z0-9-]+'\n", chinese)
    assert english_phrases(chinese) == []


def test_what_info_says_in_chinese_has_no_phrase_in_english(capsys):
    _, english, _ = run(capsys, "info")
    _, chinese, _ = run(capsys, "info", "--lang", "zh")
    assert len(chinese.splitlines()) == len(english.splitlines())
    assert "能在此运行。" in chinese
    assert english_phrases(chinese) == []


def test_a_refusal_in_chinese_has_no_phrase_in_english(capsys, tmp_path):
    asked = ("optimize", "a red circle", "--preset", "npu-bf16", "--out", tmp_path / "a.png")
    code, _, english = run(capsys, *asked)
    code_zh, _, chinese = run(capsys, *asked, "--lang", "zh")
    assert code == code_zh == 2
    english, chinese = english[english.index("error: ") :], chinese[chinese.index("错误：") :]  # after a loading bar
    assert english.startswith("error: Cannot apply preset 'npu-bf16':\n  MoveTo('npu')\n    - there is no 'npu' here")
    assert english.endswith("Fix these, choose another preset, or pass --skip-unsupported.\n")
    assert chinese.startswith("错误：无法应用预设 'npu-bf16'：\n  MoveTo('npu')\n    - 此处没有 'npu'")
    assert chinese.endswith("请解决这些问题，换一个预设，或使用 --skip-unsupported。\n")
    assert english_phrases(chinese) == []


#: Machines with nothing but torch, so that each reason why something cannot run is heard.
MACHINES = (
    Context("cpu", "cpu", no_compile=said("torch.compile on CUDA needs triton: pip install triton")),
    Context("cuda", "Tesla T4", (7, 5), 16 * 2**30),
    Context("cuda", "NVIDIA H200", (9, 0), 141 * 2**30, {"triton": "3", "torchao": "0.18"}),
    Context("npu", "Ascend 910B", None, 64 * 2**30),
    Context("rocm", "rocm"),
)
#: What else there is to say of requests that do not fit a pipe.
UNFIT = (
    BatchPromptEncoding(cache=4, folder="pictures"),
    CacheSteps(backend="cache-dit"),
    CallDefaults("quality"),
    CallDefaults("turbo", guidance_scale=9.0),
    CastDtype("bfloat16", components=("nothing",)),
    FewSteps("nowhere.safetensors", steps=4),
    FreeAfterUse("nowhere"),
    MakeContiguous(channels_last=("vae",), components=("transformer",)),
    Quantize("int4", backend="quanto"),
    Quantize("int8", correction_rank=4000),
    Quantize("nf4", exclude=("nothing",), components=("transformer", "pe")),
    Residency(1, device="npu"),
    SwapScheduler("dpmpp_sde", karras=True),
    TileVae(tile_px=33),
    TileVae(overlap=0.3),
    TruncatePrompts(10**6),
    TruncatePrompts(1),
    Warmup(sizes=((65, 64),), prompt_lengths=(10**7,)),
)


def said_of(pipe, transform, machine):
    """Return all that a plan could say of a transform."""
    before = CallDefaults(num_inference_steps=30) if transform.slot == "step-cache" else None
    context = machine if before is None else after(machine, pipe, before)
    reasons = [*transform.family_reasons(pipe), *transform.unsupported(pipe, context)]
    if reasons:
        return reasons
    preview = transform.preview(pipe, context)
    return [preview.note, *preview.changes, *preview.skipped.values()]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.device_name)
@pytest.mark.parametrize("made", [tiny_ernie, tiny_flux, tiny_sd, tiny_wan, tiny_lumina2], ids=lambda f: f.__name__)
def test_what_a_plan_says_of_any_transform_has_no_phrase_in_english(made, machine):
    pipe = made()
    transforms = (*EXAMPLES, *ELSEWHERE, *UNFIT)
    with speaking("zh"):
        texts = {(repr(each), localized(text)) for each in transforms for text in said_of(pipe, each, machine)}
    assert [(name, text) for name, text in sorted(texts) if english_phrases(text)] == []


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
    changed = [name for entry in found.entries if entry.applied is not None for name in entry.applied.changed]
    names = ("transformer.layers.*", "ErnieImagePipeline", "torch", "diffusers", *map(repr, (CastDtype("bfloat16"),)))
    versions = found.context.versions.values()
    assert (
        labels_of(
            chinese, "RewriteBlocks()", "restore()", "cpu", "CPU", "GiB", "text_encoder", *names, *changed, *versions
        )
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
