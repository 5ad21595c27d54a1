"""What shows only in a process that has done nothing else; or would end the one that runs the tests."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest

from tests.forked import Forked


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    """Fork from a process that has drawn by stock diffusers."""
    forked = Forked("tests.loaded_ernie")
    yield forked
    forked.close()


def test_optional_packages_are_not_imported_by_planning(forked):
    """Stock diffusers may import some of them itself; planning adds none."""
    code = (
        "import sys; from tests.pipelines import tiny_ernie; import ernie_accel; pipe = tiny_ernie()\n"
        "before = set(sys.modules)\n"
        "print(ernie_accel.plan(pipe, preset='turbo-fp8', context=ernie_accel.Context.named('ascend910b')))\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'torch_npu', 'optimum', 'bitsandbytes', 'gguf', 'ray', 'httpcore', 'cudnn', 'cache_dit', "
        "'prometheus_client'}))"
    )
    assert forked.lines(code)[-1] == "[]"


def test_without_ascend_drivers_nothing_imports_torch_npu(forked):
    """The wheel breaks ``import torch`` itself on such a machine."""
    code = (
        "import sys; from tests.pipelines import picture, tiny_ernie; import ernie_accel\n"
        "pipe = tiny_ernie(); npu = ernie_accel.Context.named('ascend910b')\n"
        "plan = ernie_accel.plan(pipe, ernie_accel.SetAttention('npu'), preset='npu-bf16', context=npu)\n"
        "print(ernie_accel.SetAttention().explain(pipe, npu))\n"
        "ernie_accel.optimize(pipe, preset='npu-bf16', on_unsupported='skip'); picture(pipe)\n"
        "print(plan.problems, 'torch_npu' in sys.modules)"
    )
    assert forked.lines(code)[-1].endswith('on a machine with Ascend drivers",)} False')


def test_an_installed_plugin_is_found_and_a_broken_one_named(forked, tmp_path):
    for name, code in (("good", "import examples.plugin as p; register = p.register"), ("broken", "register = 3")):
        (tmp_path / f"{name}_plugin.py").write_text(code)
        info = tmp_path / f"{name}_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ernie_accel.plugins]\n{name} = {name}_plugin:register\n")
    assert importlib.metadata.entry_points(group="ernie_accel.plugins") == ()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import ernie_accel; from tests.pipelines import tiny_flux\n"
        "print(ernie_accel.plan(tiny_flux(), ernie_accel.SliceVae()).family)\n"
    )
    done = forked.run(code, str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, "FLUX.1"), done.stderr
    assert "broken_plugin:register of broken-plugin 1.0 is left out: TypeError" in done.stderr


def test_quanto_int8_from_a_weight_off_a_16_byte_boundary_does_not_crash(forked):
    """Mapped files start anywhere. In a process of its own: a segmentation fault would end the test run."""
    script = """
import torch
from ernie_accel.quantization.choose import BACKENDS
layer = torch.nn.Linear(512, 256).to(torch.bfloat16).requires_grad_(False)
memory = torch.empty(layer.weight.numel() + 1, dtype=torch.bfloat16)
memory[1:] = layer.weight.flatten()
layer.weight.data = memory[1:].view(256, 512)
assert layer.weight.data_ptr() % 16
quantized = BACKENDS["quanto"].quantize("int8-weight-only", layer)
assert quantized.weight._data.data_ptr() % 16 == 0
for rows in (1, 2, 7, 33):
    assert quantized(torch.randn(rows, 512).to(torch.bfloat16)).isfinite().all()
"""
    assert forked.lines(f"{script}print('ran')")[-1] == "ran"
