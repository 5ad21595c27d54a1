"""`export_onnx`: ONNX Runtime draws the same values, at other sizes too; what cannot be exported is refused."""

from __future__ import annotations

import sys

import pytest
import torch

import ernie_accel
from ernie_accel import RewriteBlocks
from ernie_accel.core.errors import ErnieAccelError, MissingExtraError
from tests.pipelines import tiny_ernie, tiny_flux, tiny_lumina2, tiny_z_image


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    pipe = tiny_ernie()
    folder = tmp_path_factory.mktemp("onnx")
    model = ernie_accel.export_onnx(pipe, folder / "t.onnx", check=True)
    return pipe, model


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "side", "lengths"), [(1, 4, (3,)), (3, 10, (20, 1, 7)), (2, 6, (9, 9))])
def test_onnx_runtime_gives_the_same_values(exported, rows, side, lengths):
    import onnxruntime

    pipe, model = exported
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "hidden_states": torch.randn(rows, 16, side, 2 * side, generator=generator),
        "timestep": torch.full((rows,), 300.0),
        "text_bth": torch.randn(rows, max(lengths), 64, generator=generator),
        "text_lens": torch.tensor(lengths),
    }
    assert list(arguments) == list(model.inputs)
    with torch.no_grad():
        expected = pipe.transformer(**arguments, return_dict=False)[0]
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in arguments.items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_it_says_what_it_takes_and_how_to_go_on(exported):
    _, model = exported
    assert model.inputs["hidden_states"] == ("pictures", 16, "height", "width")
    assert model.inputs["text_bth"] == ("pictures", "tokens", 64)
    assert sorted(path.name for path in model.path.parent.iterdir()) == ["t.onnx", "t.onnx.data"]
    command = model.tensorrt_command
    assert command.startswith(f"trtexec --onnx={model.path} --saveEngine={model.path.with_suffix('.plan')} ")
    assert "--minShapes=hidden_states:1x16x16x16,timestep:1,text_bth:1x1x64,text_lens:1 " in command
    assert "--optShapes=hidden_states:1x16x64x64," in command
    assert command in str(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_z_image, r"Z-Image's transformer takes \w+ as a list"),
        (tiny_flux, "what its transformer takes is not known"),
        (
            lambda: ernie_accel.optimize(tiny_ernie(), RewriteBlocks()),
            r"has RewriteBlocks.*; restore\(pipe\) first",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, make, message):
    with pytest.raises(ErnieAccelError, match=message):
        ernie_accel.export_onnx(make(), tmp_path / "t.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_torch_cannot_trace_is_one_error(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ErnieAccelError, match="cannot trace NewBie-image's transformer with sizes that differ"):
        ernie_accel.export_onnx(tiny_lumina2(), tmp_path / "t.onnx")
    assert not list(tmp_path.iterdir())


def test_a_check_needs_float32_and_a_file_its_suffix(tmp_path):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    with pytest.raises(ErnieAccelError, match=r"these weights are torch\.bfloat16"):
        ernie_accel.export_onnx(pipe, tmp_path / "t.onnx", check=True)
    with pytest.raises(ErnieAccelError, match=r"does not end in '\.onnx'"):
        ernie_accel.export_onnx(pipe, tmp_path / "t.bin")


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"onnxscript is not installed: pip install 'ernie-accel\[onnx\]'"):
        ernie_accel.export_onnx(tiny_ernie(), tmp_path / "t.onnx")
    assert not list(tmp_path.iterdir())
