"""Facts about machines: this one, and those one plans for."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ernie_accel
from ernie_accel import Context
from ernie_accel.core import context as module
from ernie_accel.core.hardware import HARDWARE, is_other_vendors
from ernie_accel.plugins import load_plugins
from ernie_accel.transforms import TRANSFORMS
from tests.examples import ELSEWHERE, EXAMPLES


def test_this_machine_is_seen(ernie):
    context = Context.detect(ernie)
    assert context.device == "cpu"
    assert context.capability is None
    assert context.versions["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize("name", list(HARDWARE))
def test_every_named_device_can_be_planned_for(name, ernie):
    context = Context.named(name.upper())
    assert (context.device == "cuda") == (context.capability is not None)
    plan = ernie_accel.plan(ernie, preset="turbo-fp8", context=context)
    allowed = context.capability is not None and context.capability >= (8, 9)
    assert plan.ok == allowed, str(plan)
    assert str(context) in str(plan)


def test_a_named_cuda_device_has_what_cuda_builds_of_torch_bring(monkeypatch, ernie):
    """A laptop with a CPU build of torch plans for an H200 as docs/concepts.md shows it."""
    real = module._importable
    monkeypatch.setattr(module, "_importable", lambda package: package != "triton" and real(package))
    assert "triton" in Context.named("h200").versions
    assert not {"triton"} & {*Context.named("cpu").versions, *Context.named("ascend910b").versions}
    assert "triton" not in Context.detect(ernie).versions
    assert ernie_accel.plan(ernie, preset="turbo-fp8", context=Context.named("h200")).ok


def test_a_missing_package_is_named_with_its_extra():
    assert Context("cpu", "cpu", versions={}).missing("optimum.quanto") == [
        "optimum.quanto is not installed: pip install 'ernie-accel[quanto]'"
    ]
    assert Context("cpu", "cpu", versions={"torchao": "1"}).missing("torchao") == []


def test_a_machine_without_a_compiler_is_told_so(monkeypatch, ernie):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    plan = ernie_accel.plan(ernie, ernie_accel.Compile())
    assert plan.problems[ernie_accel.Compile()] == (
        "torch.compile on the CPU needs a C++ compiler, and none of g++, clang++, c++ is on the PATH",
    )


def test_no_optional_package_is_imported_to_learn_its_version(monkeypatch):
    monkeypatch.setattr(module.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"), raising=False)
    assert "torch" in module.installed_versions()


def test_a_package_that_is_installed_upgraded_or_removed_meanwhile_is_noticed(monkeypatch, tmp_path):
    """In a notebook, for example: versions are read once, and again after that."""
    monkeypatch.setattr(module, "_REGISTERED", {"my_kernels": "pip install my-kernels"})
    monkeypatch.syspath_prepend(tmp_path)

    def installed():
        importlib.invalidate_caches()
        return Context.detect().versions.get("my_kernels")

    def install(version):
        info = tmp_path / f"my_kernels-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: my_kernels\nVersion: {version}\n")
        return info

    assert installed() is None
    (tmp_path / "my_kernels.py").touch()
    assert installed() == "unknown"
    old = install("1.0")
    assert installed() == "1.0"
    shutil.rmtree(old)
    install("2.0")
    assert installed() == "2.0"
    (tmp_path / "my_kernels.py").unlink()
    assert installed() is None


def test_nothing_is_read_of_packages_again_while_none_is_installed(monkeypatch):
    before = Context.detect().versions, load_plugins()
    for name in ("version", "entry_points", "distribution"):
        monkeypatch.setattr(importlib.metadata, name, lambda *_, **__: pytest.fail("read again"))
    assert (Context.detect().versions, load_plugins()) == before


@pytest.mark.parametrize(
    "name", ["RTX 4090", "rtx 4090", "rtx-4090", "NVIDIA GeForce RTX 4090", "GeForce RTX 4090", "RTX4090"]
)
def test_a_device_is_found_by_what_people_write_for_it(name):
    assert Context.named(name) == Context.named("rtx4090")


def test_every_device_is_found_by_its_own_full_name():
    for key, row in HARDWARE.items():
        named = Context.named(row.name)
        assert (named.device_name, named.capability) == (Context.named(key).device_name, row.capability)


@pytest.mark.parametrize(("name", "meant"), [("4090", "rtx4090"), ("RTX 4090 Ti", "rtx4090"), ("h2000", "h200")])
def test_an_unknown_device_gets_a_suggestion(name, meant):
    with pytest.raises(ernie_accel.UnknownNameError, match=f"Did you mean {meant!r}.*Not supported yet: AMD GPUs"):
        Context.named(name)


@pytest.mark.parametrize(
    "name",
    [
        *("MI300X", "Instinct MI250", "RX 7900", "RX 7900 XTX", "Radeon Pro W7900", "gfx1100"),
        *("M3 Max", "Apple M2", "Arc A770", "B580", "Intel Data Center GPU Max 1550"),
    ],
)
def test_a_card_that_is_not_supported_is_not_mistaken_for_one_that_is(name):
    with pytest.raises(ernie_accel.UnknownNameError, match="Not supported yet: AMD GPUs") as error:
        Context.named(name)
    assert error.value.suggestion is None
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        *(("rtx9999", "cuda:8.9:16GiB"), ("RTX 2070", "cuda:8.9:16GiB"), ("RX 7900 XTX", "rocm")),
        *(("MI300X", "rocm"), ("Apple M3", "mps"), ("M3 Max", "mps"), ("Arc A770", "xpu"), ("B580", "xpu")),
    ],
)
def test_an_unknown_device_is_told_how_to_name_it(name, instead):
    with pytest.raises(ernie_accel.UnknownNameError) as error:
        Context.named(name)
    assert f"(--device {instead})" in str(error.value)
    assert Context.named(instead).device in ("cuda", instead)


@pytest.mark.parametrize("name", ["rocm", "mps", "xpu", "MPS"])
def test_a_type_of_device_that_is_not_supported_can_be_planned_for_and_says_so(name):
    context = Context.named(name)
    assert context.device == name.lower()
    assert "not supported yet" in str(context)
    assert ernie_accel.recommend(context).preset.name == "exact"


def test_no_card_of_the_table_is_mistaken_for_another_vendors():
    assert [key for key, row in HARDWARE.items() if is_other_vendors(key) or is_other_vendors(row.name)] == []


@pytest.fixture
def amd(monkeypatch):
    """Let torch find an AMD card, as its ROCm builds do: under the name of CUDA."""
    facts = SimpleNamespace(name="AMD Instinct MI300X", major=9, minor=4, total_memory=192 * 2**30)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)


def test_an_amd_card_is_no_cuda_device(amd, ernie):
    context = Context.detect()
    assert (context.device, context.torch_device, context.capability) == ("rocm", "cuda", None)
    assert str(context) == "rocm (AMD Instinct MI300X, 192 GiB), which is not supported yet"
    plan = ernie_accel.plan(ernie, preset="turbo-fp8", context=context)
    assert not plan.ok
    assert "not supported yet" in str(plan)
    assert Context.detect(ernie, "cuda") == context


@pytest.mark.parametrize("device", ["rocm", "mps", "xpu", "hpu"])
def test_what_is_not_supported_is_recommended_nothing_for_cpus_or_cuda(device, ernie):
    found = ernie_accel.recommend(Context(device, device), ernie)
    assert found.preset.name == "exact"
    assert "not supported yet" in str(found)


@pytest.mark.parametrize(
    ("backend", "text"), [("mps", "Apple GPUs (mps) are not supported yet"), ("xpu", "Intel GPUs (xpu) are not")]
)
def test_a_gpu_that_stays_idle_is_named_beside_the_cpu(monkeypatch, ernie, backend, text):
    assert Context.detect(ernie).idle is None
    monkeypatch.setattr(torch.backends.mps if backend == "mps" else torch.xpu, "is_available", lambda: True)
    context = Context.detect()
    assert (context.device, context.idle) == ("cpu", backend)
    assert text in str(context)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps", "nvidia", "xpu:1"])
def test_a_move_to_a_device_that_is_not_here_is_refused_by_the_plan(ernie, device):
    plan = ernie_accel.plan(ernie, ernie_accel.MoveTo(device))
    assert plan.problems[ernie_accel.MoveTo(device)] == (f"there is no {device!r} here: the device is {plan.context}",)


@pytest.mark.parametrize(("column", "device"), [(1, "mps"), (2, "rocm"), (3, "xpu")])
def test_the_docs_say_what_is_refused_on_devices_that_are_not_supported_yet(column, device, ernie):
    page = (Path(__file__).parents[1] / "docs" / "installation.md").read_text(encoding="utf-8")
    table = page.partition("| transform | Apple (mps) |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    said = {row[0].strip("`").partition("(")[0]: row[column].partition(":")[0] for row in cells}
    here, there = Context.named(device), Context.named("h200")
    refused = {
        type(transform).__name__
        for transform in EXAMPLES + ELSEWHERE
        if set(transform.unsupported(ernie, here)) - set(transform.unsupported(ernie, there))
    }
    refused.discard("MoveTo")  # it names the device that it moves to
    names = {name for name in said if name in TRANSFORMS}
    assert {name for name in names if said[name] == "refused"} == refused
    assert said["all others"] == "accepted"
