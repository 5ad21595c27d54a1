"""``ernie-accel evaluate`` says what it compares, sets the exit code, and writes what it is asked to."""

from __future__ import annotations

import json

import pytest

from ernie_accel import cli, demo
from tests.pipelines import tiny_ernie

TINY = ("--width", 64, "--height", 64, "--steps", 2)


def run(capsys, *arguments):
    """Return (exit code, stdout, stderr) of the command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture
def tiny(monkeypatch):
    """Let the command load a tiny random pipe for the embedded one."""
    monkeypatch.setattr(demo, "load", lambda dtype, **_: tiny_ernie(dtype=dtype))


def test_the_classic_check_is_one_flag(capsys, tiny):
    code, out, _ = run(capsys, "a red circle", "--classic", "--max-nmse", 0.01, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["settings"] == {
        "width": 256,
        "height": 256,
        "num_inference_steps": 8,
        "guidance_scale": 1.0,
        "seed": 42,
        "pe": "off",
    }
    assert document["baseline"]["pipe"] == "ErnieImagePipeline in float32"
    assert document["candidate"]["pipe"] == "ErnieImagePipeline in bfloat16"
    assert document["thresholds"]["max_nmse"] == 0.01


def test_a_broken_threshold_is_exit_code_1(capsys, tiny):
    code, out, _ = run(capsys, "a red circle", "--candidate-dtype", "bfloat16", "--min-sqnr-db", 200, *TINY)
    assert code == 1
    assert out.startswith("# Evaluation: FAILED\n\n- picture 1: sqnr_db")


def test_a_preset_is_compared_at_its_own_steps_on_both_sides(capsys, tiny, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\na big blue square\n", encoding="utf-8-sig")
    arguments = ("--prompts-file", file, "--preset", "exact", "--out", tmp_path / "out", *TINY)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "| 2 | a big blue square | 43 | 0.00e+00 |" in out
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert "| steps | 2 | 2 |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to compare"),
        (("--candidate-dtype", "fp8"), "Unknown dtype 'fp8'"),
        (("--preset", "turbo-bf61"), "Did you mean 'turbo-bf16'"),
        (("--classic", "--prompts-file", "no/such/file"), "cannot read no/such/file"),
        (("--classic", "--pe", "on"), "Unknown pe 'on'"),
    ],
)
def test_mistakes_are_one_message_before_anything_is_loaded(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(demo, "load", lambda **_: pytest.fail("a model was loaded"))
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err


def test_a_preset_that_cannot_run_here_is_refused_before_a_picture_is_drawn(capsys, tiny, monkeypatch):
    monkeypatch.setattr("ernie_accel.fidelity.compare.render", lambda *_: pytest.fail("a picture was drawn"))
    code, _, err = run(capsys, "a red circle", "--preset", "turbo-fp8", *TINY)
    assert code == 2
    assert "FuseKernels('fp8')" in err
    assert err.rstrip().endswith("or pass --skip-unsupported.")


def test_what_cannot_run_here_can_be_left_out_and_the_page_says_what_ran(capsys, tiny):
    code, out, _ = run(capsys, "a red circle", "--preset", "turbo-fp8", "--skip-unsupported", *TINY)
    assert code == 0
    (candidate,) = (line for line in out.splitlines() if line.startswith("Candidate: "))
    assert "CastDtype('bfloat16')" in candidate
    assert "FuseKernels" not in candidate
