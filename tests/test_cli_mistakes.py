"""Whatever a new user types: no traceback, exit code 2, a message that names the fix, and nothing loaded or written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import ernie_accel
from ernie_accel import cli
from ernie_accel.storage import embedded, loading

VERBS = ("demo", "plan", "optimize", "batch", "evaluate", "recommend", "info")

#: Arguments -> what the message must say: what was found, and the fix.
MISTAKES = [
    # No such thing, with what was probably meant
    ("pln", "No such command 'pln'"),
    ("demo --preset turbo-fp61", "Unknown preset 'turbo-fp61'. Did you mean 'turbo-fp16'?"),
    ("demo --preset Turbo_FP16", "Did you mean 'turbo-fp16'?"),
    ("demo --preset RTX~4090", "Did you mean 'rtx4090'?"),  # ~ is a blank within an argument
    ("demo --presett exact", "No such option"),
    ("plan --device h2000", "Unknown device 'h2000'. Did you mean 'h200'?"),
    ("plan --device mi300x", "Not supported yet: AMD GPUs (ROCm)"),
    ("plan --device cuda", "Unknown device 'cuda'"),
    ("plan --device rtx9999", "(--device cuda:8.9:16GiB)"),
    ("plan --device Arc~A770", "(--device xpu)"),
    ("plan --dtype bf61", "Unknown dtype 'bf61'. Did you mean 'bf16'?"),
    ("plan --model no/such/folder", "there is no folder 'no/such/folder'"),
    ("plan --model folder", "holds no pipeline: there is no model_index.json"),
    ("plan --preset", "requires an argument"),
    ("recommend --device rtx4099", "Did you mean 'rtx4090'?"),
    ("recommend --mode fast", "Unknown mode 'fast'"),
    ("recommend --model no/such/folder", "there is no folder"),
    ("info extra", "unexpected extra argument"),
    # optimize
    ("optimize", "missing argument 'prompt'"),
    ("optimize a --preset nope", "Unknown preset 'nope'"),
    ("optimize a --dtype half", "Unknown dtype 'half'"),
    ("optimize a --width 100", "size 100x128 is not made of multiples of 16"),
    ("optimize a --width 8", "Invalid value for '--width'"),
    ("optimize a --width wide", "Invalid value for '--width'"),
    ("optimize a --seed -1", "Invalid value for '--seed'"),
    ("optimize a --out x.jpg", "does not end in '.png'; name it x.png"),
    ("optimize a --out x", "does not end in '.png'; name it x.png"),
    ("optimize a --out folder", "--out folder is a folder; name a file in it: folder/picture.png"),
    ("optimize a --out folder.png", "--out folder.png is a folder"),
    ("optimize a --out file.txt/x.png", "is a file, and a folder is needed there"),
    # demo
    ("demo --out folder", "--out folder is a folder; name a file in it: folder/picture.png"),
    ("demo --out folder/", "is a folder"),
    ("demo --out sheet.jpg", "does not end in '.png'; name it sheet.png"),
    ("demo --out file.txt/sheet.png", "is a file, and a folder is needed there; name another place"),
    # evaluate
    ("evaluate", "there is nothing to compare: give --preset, --candidate-dtype or --classic"),
    ("evaluate --classic --prompts-file no.txt", "cannot read no.txt"),
    ("evaluate --classic --prompts-file folder", "cannot read folder"),
    ("evaluate --classic --prompts-file empty.txt", "empty.txt holds no prompt: write one a line"),
    ("evaluate --classic --prompts-file latin.txt", "cannot read latin.txt"),
    ("evaluate --classic --width 100", "the nearest valid width is 96"),
    ("evaluate --classic --dtype fp16", "--classic is bf16 against fp32: leave out --dtype"),
    ("evaluate --classic --out file.txt", "is a file, and a folder is needed there"),
    ("evaluate --classic --guidance-scale nan", "--guidance-scale is nan; expected a number"),
    ("evaluate --classic --repeats 0", "Invalid value for '--repeats'"),
    ("evaluate --classic --pe on", "Unknown pe 'on'"),
    ("evaluate --candidate-dtype fp8", "Unknown dtype 'fp8'"),
    ("evaluate --preset turbo-bf61", "Did you mean 'turbo-bf16'"),
    ("evaluate --classic --steps 0", "Invalid value for '--steps'"),
    # batch
    ("batch", "missing argument 'table'"),
    ("batch no.csv --out out", "no.csv"),
    ("batch folder --out out", "folder"),
    ("batch empty.txt --out out", "empty.txt"),
    ("batch good.csv", "add --out"),
    ("batch good.csv --out file.txt", "file.txt"),
    ("batch good.csv --out out --preset nope", "Unknown preset 'nope'"),
    ("batch good.csv --out out --dtype nope", "Unknown dtype 'nope'"),
    ("batch good.csv --out out --model no/such/folder", "there is no folder"),
    ("batch good.csv --out out --log-json folder", "'folder' is a folder; choose another name"),
    ("batch good.csv --out out --log-json file.txt/log.json", "file.txt"),
    ("batch good.csv --out out --prometheus folder", "'folder' is a folder; choose another name"),
    ("batch good.csv --out out --metrics-port 99999", "Invalid value for '--metrics-port'"),
    ("batch good.csv --out out --server vllm", "has no effect without endpoint"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what a new user might have lying about."""
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "folder.png"):
        (tmp_path / name).mkdir()
    for name, content in (("file.txt", b"x"), ("empty.txt", b"\n\n"), ("latin.txt", b"caf\xe9\n")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.csv").write_text("sku,prompt\nmug,a large red circle\n", encoding="utf-8")
    return tmp_path


def run(capsys, *arguments):
    """Return (exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_message_with_the_fix(capsys, place, monkeypatch, line, message):
    for module in (embedded, loading):
        monkeypatch.setattr(module, "load_embedded", lambda *_, **__: pytest.fail("a model was loaded"), raising=False)
    before = sorted(place.rglob("*"))
    code, out, err = run(capsys, *(word.replace("~", " ") for word in line.split()))
    assert code == 2
    assert message.lower() in " ".join(err.lower().split())
    assert "Traceback" not in out + err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(capsys, verb, flag):
    code, out, _ = run(capsys, verb, flag)
    assert code == 0
    assert f"{verb} [OPTIONS]" in out


def test_the_help_lists_the_commands_and_the_exit_codes(capsys):
    code, out, _ = run(capsys, "-h")
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)
    assert "Exit codes: 0 done; 1 a plan cannot run" in " ".join(out.split())


def test_the_version(capsys):
    assert run(capsys, "--version") == (0, f"ernie-accel {ernie_accel.__version__}\n", "")


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ernie_accel", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ernie-accel {ernie_accel.__version__}\n")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_cannot_be_written_to(capsys, place):
    (place / "folder").chmod(0o500)
    code, _, err = run(capsys, "demo", "--out", "folder/sheet.png")
    assert code == 2
    assert "cannot be written to; name another place" in err


def test_recommend_needs_no_model(capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    code, out, _ = run(capsys, "recommend", "--device", "RTX 3060")
    assert code == 0
    assert out.startswith("For baidu/ERNIE-Image-Turbo:\nRecommended on cuda (NVIDIA GeForce RTX 3060")
    assert "Memory for a picture of 1024x1024" in out


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_dtypes_go_by_their_short_names(capsys, name):
    code, out, _ = run(capsys, "plan", "--preset", "exact", "--dtype", name)
    assert code == 0
    assert "Plan: preset 'exact'" in out
