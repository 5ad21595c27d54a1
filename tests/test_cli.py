"""The commands do what they say, and what goes wrong is one clear message before anything is loaded."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest
from PIL import Image

import ernie_accel
from ernie_accel import cli, demo
from ernie_accel.batch.input.job import Job
from ernie_accel.cli.app import NOISY_WHEN_IMPORTED
from ernie_accel.core.timing import Race
from ernie_accel.demo import show
from ernie_accel.families.published import CHECKPOINTS
from ernie_accel.models.ministral.enhancer import PromptEnhancer
from tests.pipelines import tiny_ernie


def run(capsys, *arguments):
    """Return (exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(demo, "load", lambda **_: pytest.fail("a model was loaded"))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text(
        "sku,seed,width,height,prompt\n"
        "mug,1,128,128,a large red circle in the center on a grey background\n"
        "cup,2,160,128,a small blue square on the left on a cream background\n",
        encoding="utf-8-sig",
    )
    return path


def test_plan_prints_the_plan_and_its_exit_code_says_whether_it_can_run(capsys):
    code, out, _ = run(capsys, "plan", "--preset", "turbo-bf16", "--device", "h200")
    assert code == 0
    assert out.startswith("Plan: preset 'turbo-bf16' for ErnieImagePipeline (ERNIE-Image) on cuda (NVIDIA H200")
    code, out, _ = run(capsys, "plan", "--preset", "turbo-fp8", "--device", "rtx3060")
    assert code == 1
    assert "fp8 needs CUDA compute capability >= 8.9; this device has 8.6" in out


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda each: each.names[0])
def test_every_published_model_is_planned_with_a_preset_of_its_mode(capsys, monkeypatch, nothing_is_loaded, checkpoint):
    monkeypatch.setattr("ernie_accel.memory.planner.activations_of", lambda *args, **kwargs: {})  # it takes a second
    code, out, _ = run(capsys, "plan", "--model", checkpoint.names[0], "--device", "rtx4090", "--preset", "auto")
    assert code == 0
    assert out.startswith(f"Plan: preset '{checkpoint.mode}-fp8'")


def test_auto_is_the_preset_that_a_command_chooses_by_itself(capsys, tmp_path):
    outputs = [run(capsys, "plan", "--device", "cpu", *given)[:2] for given in ((), ("--preset", "auto"))]
    assert outputs[0] == outputs[1]
    job = {"input_file": tmp_path / "x.csv", "output_dir": tmp_path, "preset": "auto"}
    assert Job.model_validate(job).preset is None
    code, _, err = run(capsys, "evaluate", "--preset", "auto", "--prompts-file", str(tmp_path / "no.txt"))
    assert (code, "cannot read" in err) == (2, True)


def test_plan_as_json(capsys):
    code, out, _ = run(capsys, "plan", "--preset", "exact", "--json")
    assert code == 0
    assert json.loads(out)["plan"] == "exact"


def test_a_prompt_that_no_text_can_be_is_refused_before_anything_is_loaded(capsys, nothing_is_loaded):
    code, _, err = run(capsys, "optimize", "a mug \udcff")  # as a shell passes on a byte that is not UTF-8
    assert (code, err.startswith("error: the prompt has half of a surrogate pair, '\\udcff', at character 7")) == (
        2,
        True,
    )


def test_optimize_draws_a_picture_and_prints_the_report(capsys, tmp_path):
    picture = tmp_path / "new" / "red.png"
    code, out, err = run(capsys, "optimize", "a large red circle", "--preset", "exact", "--out", picture)
    assert code == 0
    assert "flat shapes" not in err
    assert out.startswith("Report: preset 'exact' on ErnieImagePipeline")
    with Image.open(picture) as image:
        assert image.size == (128, 128)
        assert image.text["prompt"] == "a large red circle"


def test_optimize_says_so_where_the_embedded_model_cannot_draw_the_prompt(capsys, tmp_path):
    code, _, err = run(capsys, "optimize", "a red mug", "--preset", "exact", "--out", tmp_path / "mug.png")
    assert code == 0
    assert "draws nothing but flat shapes (it does not know 'mug'); name one: --model baidu/ERNIE-Image-Turbo" in err


def test_batch_makes_a_picture_per_row(capsys, tmp_path, table):
    out_folder = tmp_path / "out"
    code, out, _ = run(capsys, "batch", table, "--out", out_folder, "--preset", "exact")
    assert code == 0
    assert re.search(r"^2 succeeded, 0 failed, in [\d.]+ s: ", out, flags=re.MULTILINE)
    sizes = {path.name: Image.open(path).size for path in out_folder.glob("*.png")}
    assert sizes == {"mug.png": (128, 128), "cup.png": (160, 128)}


@pytest.fixture
def saved(tmp_path):
    """A folder that `save` wrote of a pipe with prompt enhancer, in 8 bits."""
    pipe = ernie_accel.optimize(tiny_ernie(enhancer=True), ernie_accel.Quantize("int8-weight-only"))
    ernie_accel.save(pipe, tmp_path / "saved")
    return tmp_path / "saved"


def test_batch_draws_with_what_save_wrote_as_it_was_saved(capsys, tmp_path, table, saved):
    table.write_text("prompt,width,height\na red circle,64,64\n")
    call = ["batch", table, "--out", tmp_path / "out", "--model", saved, "--sampler", "unipc", "--no-enhancer"]
    code, out, err = run(capsys, *call)
    assert code == 0, err
    assert "Quantize('int8-weight-only')" in out
    assert "SwapScheduler('unipc')" in out
    (picture,) = (tmp_path / "out").glob("*.png")
    assert Image.open(picture).text["preset"].startswith("as saved (")
    code, out, _ = run(capsys, *call)
    assert "Nothing to do" in out

    other = ernie_accel.optimize(
        tiny_ernie(enhancer=True), ernie_accel.Quantize("int8-weight-only", exclude=(".*mlp",))
    )
    ernie_accel.save(other, saved)
    code, _, err = run(capsys, *call)  # other weights would make other pictures
    assert code != 0
    assert "as saved (" in err


def test_a_row_that_fails_is_told_and_the_exit_code_is_three(capsys, tmp_path, table, monkeypatch):
    enhance = PromptEnhancer.enhance

    def fail_on_blue(self, requests, **settings):
        if any("blue" in request.prompt for request in requests):
            raise RuntimeError("no blue today")
        return enhance(self, requests, **settings)

    monkeypatch.setattr(PromptEnhancer, "enhance", fail_on_blue)
    code, out, err = run(capsys, "batch", table, "--out", tmp_path / "out", "--preset", "exact")
    assert code == 3
    assert "1 succeeded, 1 failed" in out
    assert f"{table}:3: cup.png failed: RuntimeError: no blue today" in err
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["mug.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sku,text\nmug,a red circle\n", "has no 'prompt' column"),
        (b"", "is empty"),
        (b"sku,prompt\nmug,\xff\xfe\n", "is not UTF-8"),
        (b"sku,prompt\nmug,a\nmug,b\n", "line 3: file name 'mug.png' (from '{sku}.png') is taken by line 2"),
        (b"sku,prompt\n../../mug,a\n", "line 2: file name '../../mug.png'"),
        (b"sku,prompt\na/b,a\n", "line 2: file name 'a/b.png'"),
        (b"sku,width,height,prompt\nmug,1000,1024,a\n", "the nearest valid size is 1008x1024"),
    ],
)
def test_a_bad_table_is_told_before_anything_is_loaded(capsys, tmp_path, content, message, nothing_is_loaded):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    code, out, err = run(capsys, "batch", path, "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert str(path) in err
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in err + out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--preset", "turbo-bf61"), "error: Unknown preset 'turbo-bf61'. Did you mean 'turbo-bf16'?"),
        (("plan", "--device", "h2000"), "error: Unknown device 'h2000'"),
        (("plan", "--dtype", "fp8"), "error: Unknown dtype 'fp8'"),
        (("optimize", "a red circle", "--preset", "nope"), "error: Unknown preset 'nope'"),
        (("plan", "--model", "no/such/folder"), "error: there is no folder 'no/such/folder', and it is not a hub id"),
    ],
)
def test_unknown_names_are_told_before_anything_is_loaded(capsys, arguments, message, nothing_is_loaded):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith(message)


def test_a_folder_that_is_no_pipeline(capsys, tmp_path):
    code, _, err = run(capsys, "plan", "--model", tmp_path)
    assert code == 2
    assert err == f"error: {tmp_path} holds no pipeline: there is no model_index.json, as save_pretrained writes it\n"


def test_a_hub_id_without_a_network(capsys):
    code, _, err = run(capsys, "plan", "--model", "nobody/nothing")
    assert code == 2
    assert "error: cannot load 'nobody/nothing': " in err


def test_a_saved_pipeline_can_be_named(capsys, tmp_path):
    demo.load().save_pretrained(tmp_path / "saved")
    code, out, _ = run(capsys, "plan", "--preset", "exact", "--model", tmp_path / "saved")
    assert code == 0
    assert "ERNIE-Image" in out


def test_info_says_what_is_installed_and_what_can_run_here(capsys, nothing_is_loaded):
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert re.search(r"^Presets for baidu/ERNIE-Image-Turbo:$", out, flags=re.MULTILINE)
    for checkpoint in CHECKPOINTS:
        assert f"\n  {checkpoint.names[0]}\n" in out
    assert f"ernie-accel {ernie_accel.__version__}" in out
    for name in ernie_accel.presets:
        assert re.search(rf"^  {name} +can(not)? run here: ", out, flags=re.MULTILINE)
    assert re.search(r"turbo-fp8 +cannot run here", out)
    assert "fp8 needs CUDA compute capability >= 8.9" in out
    assert re.search(r"torch_npu +- torch_npu is not installed: pip install 'ernie-accel\[npu\]'", out)


def test_recommend_speaks_of_the_model_that_is_named(capsys, nothing_is_loaded):
    code, out, _ = run(capsys, "recommend", "--device", "h200", "--model", "NewBie-AI/NewBie-image-Exp0.1")
    assert (code, out.splitlines()[0]) == (0, "For NewBie-AI/NewBie-image-Exp0.1:")
    assert "preset 'quality-fp8'" in out


def test_the_warnings_that_packages_give_when_imported_are_not_printed(capsys):
    run(capsys, "--version")
    assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in NOISY_WHEN_IMPORTED)


@pytest.mark.slow
def test_a_plan_prints_nothing_but_the_plan():
    done = subprocess.run([sys.executable, "-m", "ernie_accel", "plan", "--device", "rtx3060"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_demo_measures_and_never_flatters(capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    code, out, _ = run(capsys, "demo", "--out", sheet, "--preset", "exact")
    assert code == 0
    assert re.search(r"^  stock +[\d.]+ ms", out, re.MULTILINE)
    assert re.search(r"^  optimized +[\d.]+ ms", out, re.MULTILINE)
    (found,) = re.findall(r"^  ratio +(.*)", out, re.MULTILINE)
    shape = r"[\d.]+ x  ([a-z ]+) \(of the medians; quartiles of the pairs ([\d.]+) to ([\d.]+)\)"
    if measured := re.fullmatch(shape, found):
        verdict, low, high = measured.groups()
        assert verdict == "no measurable difference" or not float(low) < 1 < float(high)
    else:
        assert found.startswith("this machine is too busy to tell")
    assert "the first optimized picture took" in out
    assert str(sheet) in out
    assert "docs/performance.md" in out
    with Image.open(sheet) as image:
        assert image.width > 800


@pytest.fixture
def shown(monkeypatch):
    """Let `demo` render nothing; the times are stubs. Yields what was asked for."""
    asked = {}

    def race_dtypes():
        return Race(asked.get("float32", (200.0, 201.0, 202.0)), (100.0, 101.0, 102.0))

    def fake(sheet, preset, *transforms, device, announce):
        pipe = tiny_ernie()
        the_plan = ernie_accel.plan(pipe, *transforms, preset=preset)
        announce(show.describe_run(the_plan))
        asked.update(preset=preset, transforms=transforms, device=device)
        asked.setdefault("times", Race((200.0,) * 8, (100.0,) * 8))
        return show.DemoRun(sheet, the_plan, ernie_accel.report(pipe), asked["times"], 1.0)

    monkeypatch.setattr(show, "race_dtypes", race_dtypes)
    monkeypatch.setattr(show, "show", fake)
    return asked


def test_demo_runs_in_the_dtype_that_it_measured_to_be_faster_and_says_so(capsys, tmp_path, shown):
    code, out, _ = run(capsys, "demo", "--out", tmp_path / "x.png")
    assert code == 0
    assert "bfloat16 against float32 on this CPU, stock: 1.99 x  faster" in out
    assert "optimize(pipe, CastDtype('bfloat16'), preset='turbo-fp32')" in out
    assert shown["transforms"] == (ernie_accel.CastDtype("bfloat16"),)
    assert "  ratio         2.00 x  faster" in out


def test_demo_stays_in_float32_where_bfloat16_is_slower(capsys, tmp_path, shown):
    shown["float32"] = (80.0, 81.0, 82.0)
    _, out, _ = run(capsys, "demo", "--out", tmp_path / "x.png")
    assert "slower on this machine" in out
    assert shown["transforms"] == ()


def test_demo_takes_a_preset_that_was_named_as_it_is(capsys, tmp_path, shown):
    _, out, _ = run(capsys, "demo", "--out", tmp_path / "x.png", "--preset", "turbo-fp32")
    assert shown["transforms"] == () and "against float32" not in out


def test_demo_on_a_busy_machine_says_that_nothing_can_be_said(capsys, tmp_path, shown):
    shown["times"] = Race((100.0, *(7800.0,) * 7), (100.0, *(6500.0,) * 7))
    _, out, _ = run(capsys, "demo", "--out", tmp_path / "x.png")
    assert "  ratio         this machine is too busy to tell: the median picture took 78.0 times" in out
    assert "1.20" not in out


def test_demo_says_what_really_runs_before_it_runs(capsys, tmp_path, shown):
    _, out, _ = run(capsys, "demo", "--out", tmp_path / "x.png", "--preset", "turbo-fp8")
    first = out.splitlines()[0]
    assert "with preset 'turbo-fp8' without FuseKernels('fp8')" in first
    assert "which cannot run here" in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a red circle", "--out", "x.jpg"), "error: --out x.jpg: file name 'x.jpg' does not end in '.png'"),
        (("a red circle", "--width", "100"), "error: size 100x128 is not made of multiples of 16"),
        (("  ",), "error: the prompt is empty; write what to draw"),
    ],
)
def test_a_picture_that_cannot_be_made_is_told_before_anything_is_loaded(
    capsys, arguments, message, nothing_is_loaded, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "optimize", *arguments)
    assert code == 2
    assert err.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_the_default_preset_leaves_compiling_out_and_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("ernie_accel.core.context._no_cpu_compile_reason", lambda: "no compiler here")
    code, out, _ = run(capsys, "optimize", "a large red circle", "--out", tmp_path / "red.png")
    assert code == 0
    assert re.search(r"Compile\(\) +- +skipped +no compiler here", out)
    code, _, err = run(capsys, "optimize", "a red circle", "--preset", "turbo-fp32", "--out", tmp_path / "x.png")
    assert code == 2
    assert err.rstrip().endswith("or pass --skip-unsupported.")
