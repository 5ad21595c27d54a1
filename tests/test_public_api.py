"""The public surface, name by name: a name that comes or goes is a decision and not an accident."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

import ernie_accel
from ernie_accel.transforms import TRANSFORMS

VERBS = {
    "evaluate",
    "export_onnx",
    "load",
    "optimize",
    "plan",
    "recommend",
    "image_to_image",
    "inpaint",
    "refine",
    "register_family",
    "register_hardware",
    "register_package",
    "register_quantization_backend",
    "report",
    "restore",
    "save",
    "transform_from_json",
}
MODULES = {"batch", "demo", "fidelity", "testing"}
DATA = {"MACHINE_LOCAL", "presets"}
CLASSES = {
    "Applied",
    "Call",
    "CallablePipeline",
    "Context",
    "DeviceOutOfMemoryError",
    "Effect",
    "ErnieImageImg2ImgPipeline",
    "ErnieImageInpaintPipeline",
    "Evaluation",
    "Family",
    "Hardware",
    "LayerReceipt",
    "OnnxModel",
    "Phase",
    "Pipeline",
    "Plan",
    "PlannedPipe",
    "Preset",
    "Preview",
    "Rates",
    "Recommendation",
    "Report",
    "Thresholds",
    "Transform",
    "Undo",
}
ERRORS = {
    "ApplyError",
    "BatchChangedError",
    "BatchInputError",
    "BatchOutputError",
    "ConflictError",
    "ErnieAccelError",
    "MissingExtraError",
    "PictureError",
    "RestoreError",
    "RestoreWarning",
    "SavedPipelineError",
    "UnknownNameError",
    "UnsupportedError",
}


def test_all_is_exactly_this():
    expected = VERBS | MODULES | DATA | CLASSES | ERRORS | set(TRANSFORMS)
    assert set(ernie_accel.__all__) == expected
    assert len(ernie_accel.__all__) == len(expected)


@pytest.mark.parametrize("name", ernie_accel.__all__)
def test_every_name_is_there_and_listed(name):
    assert getattr(ernie_accel, name) is not None
    assert name in dir(ernie_accel)


def test_the_stub_for_type_checkers_is_what_the_list_says():
    spec = importlib.util.spec_from_file_location("generate_stub", "docs/generate_stub.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.STUB.read_text(encoding="utf-8") == generate.stub()


def test_functions_stay_functions_whatever_is_imported():
    for name in ("api", "core.plan", "core.report", "core.preset", "core.transform", "recipes.presets"):
        importlib.import_module(f"ernie_accel.{name}")
    assert callable(ernie_accel.optimize)
    assert callable(ernie_accel.plan)
    assert callable(ernie_accel.report)


def test_every_error_is_ours():
    for name in ERRORS - {"RestoreWarning"}:
        assert issubclass(getattr(ernie_accel, name), ernie_accel.ErnieAccelError)


def test_presets_list_themselves():
    assert set(ernie_accel.presets) == {
        "exact",
        "npu-bf16",
        *(f"turbo-{precision}" for precision in ("fp32", "bf16", "fp16", "fp8", "int8", "nvfp4", "q4")),
        *(f"quality-{precision}" for precision in ("bf16", "fp8", "int8")),
    }
    for name, preset in ernie_accel.presets.items():
        assert preset.name == name
        assert f"{name} " in repr(ernie_accel.presets)
        assert preset.summary in repr(ernie_accel.presets)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_loads_neither_torch_nor_diffusers_and_is_quick():
    code = (
        "import time, sys; start = time.process_time(); import ernie_accel; "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules); "
        "print(time.process_time() - start, *heavy)"
    )
    seconds, *heavy = min((run(code).split() for _ in range(3)), key=lambda out: float(out[0]))
    assert heavy == []
    assert float(seconds) < 0.2


def test_the_api_imports_no_compiler_and_no_diffusers():
    """Dynamo takes a second, diffusers several: they are imported by what uses them."""
    code = (
        "import sys, torch; before = set(sys.modules); import ernie_accel.api; "
        "new = set(sys.modules) - before; "
        "print(*sorted({name for name in new if name.startswith('torch.')} | "
        "{'diffusers', 'transformers', 'triton', 'sympy'} & new))"
    )
    assert run(code).split() == []


def test_the_command_line_and_the_batch_table_load_no_torch():
    code = "import sys, ernie_accel.cli, ernie_accel.batch, ernie_accel.demo; print('torch' in sys.modules)"
    assert run(code).strip() == "False"
