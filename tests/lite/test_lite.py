"""Without extras: nothing optional is installed, and each missing piece is named with the way to get it."""

from __future__ import annotations

import importlib.util

import pytest

import ernie_accel
from ernie_accel.batch.engines import LocalEngine, Request
from ernie_accel.batch.engines.base import AdapterFile
from ernie_accel.cli import main
from ernie_accel.core.context import OPTIONAL_PACKAGES, Context
from tests.pipelines import picture, tiny_ernie


@pytest.mark.parametrize("package", sorted(OPTIONAL_PACKAGES))
def test_this_environment_really_is_lite(package):
    assert package not in Context.detect().versions
    assert importlib.util.find_spec(package.split(".")[0]) is None


@pytest.mark.parametrize(("package", "extra"), sorted(OPTIONAL_PACKAGES.items()))
def test_a_missing_package_is_named_with_its_extra(package, extra):
    assert Context.detect().missing(package) == [f"{package} is not installed: pip install 'ernie-accel[{extra}]'"]


def test_quantizing_without_its_library_is_refused_with_the_extra():
    pipe = tiny_ernie()
    with pytest.raises(
        ernie_accel.UnsupportedError, match=r"torchao is not installed: pip install 'ernie-accel\[torchao\]'"
    ):
        ernie_accel.optimize(pipe, ernie_accel.Quantize("int8-weight-only"))


@pytest.mark.parametrize("preset", ["exact", "turbo-fp32", "turbo-bf16", "quality-bf16"])
def test_presets_that_need_no_extra_work(preset):
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, ernie_accel.SliceVae(), preset=preset)
    ernie_accel.restore(pipe)
    assert picture(pipe).isfinite().all()


def test_a_batch_needs_no_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("prompt\na large red circle in the center on a cream background\n")
    job = ["batch", "t.csv", "--out", "out", "--preset", "exact", "--steps", "1", "--guidance", "1", "--no-enhancer"]
    with pytest.raises(SystemExit) as caught:
        main(job)
    assert caught.value.code == 0
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_rows_with_a_lora_are_refused_before_anything_is_drawn():
    request = Request(prompt="a red circle", seed=7, lora=AdapterFile("a.safetensors", "a.safetensors", "0" * 64))
    assert LocalEngine(tiny_ernie()).signature.problems([(2, request)]) == [
        (2, "names a LoRA, and peft is not installed: pip install peft")
    ]


@pytest.mark.parametrize("arguments", [["--metrics-port", "0"], ["--prometheus", "job.prom"]])
def test_metrics_of_a_batch_are_refused_with_the_extra(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("prompt\na red circle\n")
    with pytest.raises(SystemExit) as caught:
        main(["batch", "t.csv", "--out", "out", *arguments])
    assert caught.value.code == 2
    assert "prometheus_client is not installed: pip install 'ernie-accel[metrics]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
