"""The benchmark runs on a CPU, too: a tiny model, a process for everything, tables and files at the end."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def measured(stem: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Run a section on the tiny model, as users do; return the result, and its rows by name."""
    command = [sys.executable, str(BENCHMARKS / "ladder.py"), "--size", "tiny", *arguments, "--save", str(stem)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return saved(stem, done.stdout, done.stderr)


def saved(stem: Path, out: str, err: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the saved result, and its rows by name."""
    result = json.loads(stem.with_suffix(".json").read_text())
    assert out.strip() in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".svg").exists() or "no plot: matplotlib is not installed" in err
    return result, {row["rung"]: row for row in result["rungs"]}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("ladder")


@pytest.fixture
def here(script, monkeypatch, capsys):
    """Return arguments -> (exit code or last words, output, errors) of the script in this process, where torch is."""

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["ladder.py", *map(str, arguments)])
        code: object = 0
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def without_processes(script, monkeypatch):
    """Measure in this process, where torch is imported already; what a row says comes as JSON all the same."""

    def run(arguments: list[str], compiled: Path, timeout: float) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["ladder.py", *arguments])
            return json.loads(json.dumps(script.work(script.parse())))

    monkeypatch.setattr(script, "run", run)


@pytest.mark.parametrize(("family", "preset"), [("z-image", "turbo-fp8"), ("newbie", "quality-fp8")])
def test_other_families_are_measured_against_what_they_must_reach(
    tmp_path, here, without_processes, script, family, preset
):
    stem = tmp_path / family
    code, *printed = here("--family", family, "--size", "tiny", "--only", "stock", "--save", stem)
    assert code == 0
    result, rows = saved(stem, *printed)
    assert result["command"].startswith(f"python benchmarks/ladder.py --family {family} ")
    assert rows["stock"]["sqnr_db"] > 30
    assert rows["stock"]["ms_512"] > 0
    assert len(rows["stock"]["new_lengths_ms"]) == 5
    assert preset in script.MEASURED[family].rungs
    ladder_families = importlib.import_module("ladder_families")
    reached = ladder_families.verdicts(family, {preset: {"new_length_ms": 3.0, "picture_ms": 2.0}})
    assert [(each["rung"], each["reached"], each["target"]) for each in reached] == [(preset, 1.5, 1.15)]


def test_the_ladder_measures_and_saves(tmp_path, here, without_processes):
    stem = tmp_path / "ladder"
    code, *printed = here("--size", "tiny", "--only", "stock,rewrite", "--commit", "abc1234", "--save", stem)
    assert code == 0
    result, rows = saved(stem, *printed)
    assert set(rows) == {"stock", "rewrite"}
    assert rows["rewrite"]["sqnr_db"] > 30
    assert rows["rewrite"]["ms_64"] > 0
    assert rows["rewrite"]["other_lengths_ms"] > 0
    assert 0 < rows["rewrite"]["first_decode_s"] < rows["rewrite"]["first_picture_s"]
    assert result["commit"] == "abc1234" and result["versions"]["torch"] == importlib.metadata.version("torch")
    assert result["command"] == "python benchmarks/ladder.py --size tiny --only stock,rewrite --seconds 240"
    text = (tmp_path / "ladder.md").read_text()
    assert "| rewrite |" in text and "commit abc1234" in text
    assert here("--tables", tmp_path / "ladder.json")[1].strip() in text


@pytest.mark.parametrize(
    ("process", "row"),
    [
        ('echo some warning; echo "$@" >&2; echo \'{"ms": 1}\'', {"ms": 1}),
        ("echo no memory >&2; exit 3", {"error": "exit status 3: no memory"}),
        ("exit 3", {"error": "exit status 3: no message"}),
        ("true", {"error": "exit status 0: no message"}),
        ("exec sleep 60", {"error": "stopped after 1 s"}),
        (
            'echo "{\\"compiled\\": [\\"$TORCHINDUCTOR_CACHE_DIR\\", \\"$TRITON_CACHE_DIR\\", \\"$2 $3\\"]}"',
            {"compiled": ["here/inductor", "here/triton", "--worker stock"]},
        ),
    ],
)
def test_what_a_process_says_last_is_its_row(script, monkeypatch, tmp_path, process, row):
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{process}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    assert script.run(["--worker", "stock"], Path("here"), timeout=1 if "sleep" in process else 60) == row


@pytest.mark.slow
def test_the_sweep_measures_batches_sizes_and_recompiles(tmp_path):
    _, rows = measured(tmp_path / "sweep", "--sweep", "--only", "stock")
    cells = rows["stock"]["cells"]
    assert [(cell["width"], cell["height"], cell["batch"]) for cell in cells] == [(64, 64, 1), (64, 64, 2), (96, 64, 1)]
    assert all(cell["ms_per_image"] == cell["ms"] / cell["batch"] > 0 for cell in cells)
    assert (rows["stock"]["graphs"], rows["stock"]["graphs_for_prompt_lengths"]) == (0, 0)
    assert "| 64 x 64 | 2 |" in (tmp_path / "sweep.md").read_text()


@pytest.mark.slow
def test_a_peer_that_fails_gets_a_row_with_its_error(tmp_path):
    _, rows = measured(tmp_path / "peers", "--peers", "--only", "stock,torchao-fp8")
    assert rows["stock"]["sqnr_db"] > 30 and rows["stock"]["latents_db"] > 20
    assert rows["stock"]["ms"] > 0 and rows["stock"]["picture_step_ms"] > 0 and rows["stock"]["compiled"] is False
    assert rows["torchao-fp8"] == {"rung": "torchao-fp8", "error": rows["torchao-fp8"]["error"]}
    assert rows["torchao-fp8"]["error"].startswith("UnsupportedError: Cannot apply")
    text = (tmp_path / "peers.md").read_text()
    assert "| stock | diffusers as it is, bf16 | no |" in text and "- torchao-fp8: UnsupportedError" in text


@pytest.mark.slow
def test_the_parts_are_measured_alone_and_compared_to_stock(tmp_path):
    _, rows = measured(
        tmp_path / "parts", "--parts",
        "--only", "vae: stock,vae: channels_last,prompts: stock,prompts: BatchPromptEncoding,enhancer: stock",
    )  # fmt: skip
    assert all(row["ms"] > 0 for row in rows.values())
    batched = rows["prompts: BatchPromptEncoding"]
    assert batched["is_stock"] or batched["sqnr_to_stock_db"] > 25
    assert all(25 < rows[f"vae: {way}"]["sqnr_db"] < 80 for way in ("stock", "channels_last"))
    assert "sqnr_db" not in batched
    assert "| SQNR dB to stock | to float32 |" in (tmp_path / "parts.md").read_text()
    assert rows["enhancer: stock"]["ms_per_token"] == rows["enhancer: stock"]["ms"] / 8


def test_nothing_starts_when_the_time_is_over(tmp_path, here):
    code, _, _ = here("--size", "tiny", "--parts", "--seconds", "0", "--save", tmp_path / "parts")
    assert code == 0
    rows = json.loads((tmp_path / "parts.json").read_text())["rungs"]
    assert len(rows) >= 6 and {row["error"] for row in rows} == {"not started: 0 s were over"}


def test_an_unknown_name_is_refused_with_the_known_ones(here):
    code, _, _ = here("--peers", "--only", "stock,sdnq-int9")
    assert str(code).startswith("unknown in peers: sdnq-int9. Known: stock, ")


def test_the_enhancer_is_timed_for_exactly_the_asked_tokens(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from ladder_parts import add_enhancer, enhance_ms
    from random_pipeline import random_pipeline

    pipe = random_pipeline("tiny", "cpu", torch.bfloat16)
    add_enhancer(pipe, "tiny")
    lengths = []
    generate = pipe.pe.generate
    pipe.pe.generate = lambda **how: (
        lengths.append(generate(**how).shape[1] - how["input_ids"].shape[1])
        or torch.ones(1, how["input_ids"].shape[1] + lengths[-1], dtype=torch.long)
    )
    row = enhance_ms(pipe, 5)
    assert set(lengths) == {5} and row["ms_per_token"] == row["ms"] / 5
    pipe.pe.generate = lambda **how: torch.cat([how["input_ids"], how["input_ids"][:, :3]], dim=1)
    with pytest.raises(RuntimeError, match=r"asked for 5 new tokens, got \[3\]"):
        enhance_ms(pipe, 5)


def test_what_could_not_be_compiled_is_measured_eager_and_says_why(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from ladder_peers import _compile

    def refuse(**_: Any) -> None:
        raise RuntimeError("no graph\nfor this layer")

    transformer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    transformer[0]._compiled_call_impl = lambda *_: None
    transformer.compile_repeated_blocks = refuse
    assert _compile(SimpleNamespace(transformer=transformer), lambda: None) == {
        "not_compiled": "RuntimeError: no graph"
    }
    assert transformer[0]._compiled_call_impl is None


LADDERS = ("ladder_products", "ladder_presets", "ladder_bf16", "ladder_by_lengths")


@pytest.mark.parametrize("name", [*LADDERS, "parts", "peers", "peers_int8", "sweep_bf16", "sweep_fp8"])
def test_the_pages_of_saved_results_are_what_their_figures_say(monkeypatch, name):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from ladder_tables import text_of

    saved = BENCHMARKS / "results" / f"{name}_h200_202611.json"
    assert saved.with_suffix(".md").read_text() == text_of(json.loads(saved.read_text()))


@pytest.mark.parametrize(
    ("recipe", "limit"),
    [
        ("sdnq-fp8 SDNQ float8, quantized products", 70.0),
        ("bnb-nf4 bitsandbytes nf4, weights only", 117.0),
        ("quanto-qint8 quanto qint8, weights only", 117.0),
        ("sdnq-int8 SDNQ int8, quantized products", None),  # not below a limit that is another number format's
        ("sdnq-uint4 SDNQ uint4, quantized products", None),
    ],
)
def test_a_recipe_is_held_against_the_limit_of_its_own_products(monkeypatch, recipe, limit):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from ladder_tables import _roofline

    assert _roofline({"ceilings": {"roofline_fp8_ms": 70.0, "roofline_bf16_ms": 117.0}}, recipe) == limit
