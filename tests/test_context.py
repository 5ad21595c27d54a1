"""Facts about machines: this one, and those one plans for."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import Context
from ernie_accel.core import context as module
from ernie_accel.core.context import DEVICES


def test_this_machine_is_seen(ernie):
    context = Context.detect(ernie)
    assert context.device == "cpu"
    assert context.capability is None
    assert context.versions["torch"] == torch.__version__


@pytest.mark.parametrize("name", DEVICES)
def test_every_named_device_can_be_planned_for(name, ernie):
    context = Context.named(name.upper())
    assert (context.device == "cuda") == (context.capability is not None)
    plan = ernie_accel.plan(ernie, preset="turbo-fp8", context=context)
    allowed = context.capability is not None and context.capability >= (8, 9)
    assert plan.ok == allowed, str(plan)
    assert str(context) in str(plan)


def test_a_named_cuda_device_has_what_cuda_builds_of_torch_bring(monkeypatch, ernie):
    """A laptop with a CPU build of torch plans for an H200 as the README shows it."""
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
