"""`load(folder, transformer=file)`: single files in ComfyUI's layout give the pictures of their model."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ernie_accel
from ernie_accel import Quantize, cli
from ernie_accel.core.errors import ErnieAccelError, SavedPipelineError
from ernie_accel.embedded import MODEL_FOLDER
from ernie_accel.quantization.layers import sqnr_db
from ernie_accel.storage.loading import load_pipeline
from ernie_accel.storage.single_file.tensor_files import BLOCKS, open_tensors
from tests import single_files
from tests.pipelines import picture, tiny_ernie, tiny_lumina2, tiny_z_image
from tests.single_files import LAYOUTS, comfy_names, format_of, write, write_gguf

PIPES = {"ernie": tiny_ernie, "z_image": tiny_z_image, "lumina2": tiny_lumina2}
#: Least SQNR of a weight, in dB: values with rounding errors of 2^-8 (bf16), 2^-4 (fp8), and 1/254 of a row's largest.
FLOORS_DB = {"plain": math.inf, "bf16": 45, "int8 by rows": 35} | dict.fromkeys(
    ("fp8_scaled", "fp8 in the header", "fp8 beside"), 28
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pipes by name, each with the folder it was saved to."""
    found = {}

    def make(name):
        if name not in found:
            pipe = PIPES[name]()
            folder = tmp_path_factory.mktemp(name)
            pipe.save_pretrained(folder)
            found[name] = pipe, folder
        return found[name]

    return make


def weights_differ_by(loaded, pipe):
    """Return the least SQNR of a matrix, in dB."""
    original = dict(pipe.transformer.state_dict())
    found = dict(loaded.transformer.state_dict())
    assert found.keys() == original.keys()
    assert all(found[name].shape == tensor.shape for name, tensor in original.items())
    return min(sqnr_db(tensor, found[name]) for name, tensor in original.items() if tensor.ndim > 1)


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_gives_the_weights_it_was_made_of(made, tmp_path, name, layout):
    pipe, folder = made(name)
    file = write(pipe.transformer, tmp_path / "model.safetensors", layout)
    loaded = load_pipeline(str(folder), device="cpu", transformer=file)
    assert weights_differ_by(loaded, pipe) >= FLOORS_DB[layout]
    if layout == "plain":
        assert torch.equal(picture(loaded), picture(pipe))


def test_names_are_those_that_diffusers_converts(made):
    """diffusers' converters for single files know the same names, and are not used for what they do with scales."""
    from diffusers.loaders import single_file_utils

    pipe, _ = made("z_image")
    convert = single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers
    assert convert(comfy_names(pipe.transformer)).keys() == pipe.transformer.state_dict().keys()


def test_pictures_are_as_close_as_the_scheme(made, tmp_path):
    pipe, folder = made("ernie")
    file = write(pipe.transformer, tmp_path / "model.safetensors", "fp8_scaled")
    drawn, expected = picture(ernie_accel.load(folder, transformer=file, device="cpu")), picture(pipe)
    assert 40 < sqnr_db(expected, drawn) < math.inf
    stored = ernie_accel.load(folder, transformer=file, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in stored.transformer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_gguf_gives_the_weights_it_was_made_of(made, tmp_path, kind):
    pytest.importorskip("gguf")
    pipe, folder = made("z_image")
    file = write_gguf(pipe.transformer, tmp_path / "model.gguf", kind)
    loaded = load_pipeline(str(folder), device="cpu", transformer=file)
    assert weights_differ_by(loaded, pipe) > {"Q8_0": 40, "Q5_1": 27, "Q4_0": 17}[kind]


def test_the_table_of_blocks_is_that_of_gguf():
    gguf = pytest.importorskip("gguf")
    for number, (name, values, size) in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, values, size)


@pytest.mark.parametrize("kind", [name for name, values, _ in BLOCKS.values() if values > 1])
def test_every_block_format_is_decoded_as_gguf_does(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    code = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[code]
    blocks = numpy.random.default_rng(0).integers(0, 256, (3, 2 * size), dtype=numpy.uint8)
    # Their float16 scales are wherever the format has them: make every byte that could be an exponent a modest one.
    blocks &= 0b00111011
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "lumina2")
    writer.add_tensor("w", blocks, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_tensors(tmp_path / "w.gguf") as file:
        assert file.tensors["w"].shape == (3, 2 * values)
        found = file.floats("w", file.get("w")).numpy()
    expected = gguf.quants.dequantize(blocks, code)
    numpy.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * abs(expected).max())


def test_what_was_loaded_is_quantized_on_request(made, tmp_path):
    pipe, folder = made("ernie")
    file = write(pipe.transformer, tmp_path / "model.safetensors", "fp8_scaled")
    loaded = ernie_accel.load(folder, Quantize("int8-weight-only"), transformer=file, device="cpu")
    assert ernie_accel.report(loaded).entries[-1].applied.details
    assert picture(loaded).isfinite().all()


def test_a_checkpoint_with_other_models_gives_its_transformer(made, tmp_path):
    pipe, folder = made("ernie")
    file = write(
        pipe.transformer,
        tmp_path / "all.safetensors",
        "bf16",
        lambda t: t.update({"vae.decoder.weight": torch.ones(2)}),
    )
    assert weights_differ_by(load_pipeline(str(folder), device="cpu", transformer=file), pipe) > 45


# What does not fit -------------------------------------------------------------------------------------------------

MLP = "layers.0.mlp.up_proj"


def renamed(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


WRONG = {
    "missing": (lambda t: t.pop(f"{MLP}.weight"), f"lacks 1 of the model's 35 tensors: {MLP}.weight"),
    "extra": (lambda t: t.update({"lora.up": torch.ones(2)}), "has 1 of 36 tensors that the model has not: 'lora.up'"),
    "both": (renamed(f"{MLP}.weight", "layers.0.mlp.w1.weight"), "(?s)lacks 1 of .*has 1 of 35 tensors"),
    "shape": (
        lambda t: t.update({f"{MLP}.weight": torch.ones(256, 64)}),
        f"has 1 of other shapes: '{MLP}.weight' is 256x64, and the model's 256x128",
    ),
    "int8 alone": (lambda t: t.update({f"{MLP}.weight": torch.ones(256, 128).char()}), "is int8 without a scale"),
    "float64": (lambda t: t.update({f"{MLP}.weight": torch.ones(256, 128).double()}), "is F64; read are F32, F16"),
    "scale of nothing": (lambda t: t.update({"a.weight_scale": torch.ones(())}), "that the model has not: 'a.weight_s"),
    "odd scale": (
        lambda t: t.update({f"{MLP}.weight_scale": torch.ones(7)}),
        "is F32 7; expected one number, or one for each of 256 rows",
    ),
    "two scales": (
        lambda t: t.update({f"{MLP}.weight_scale": torch.ones(()), f"{MLP}.scale_weight": torch.ones(())}),
        "beside",
    ),
    "nvfp4": (
        lambda t: t.update({f"{MLP}.comfy_quant": format_of({"format": "nvfp4"})}),
        "is 'nvfp4'; read are float8_e4m3fn, float8_e5m2, int8_tensorwise, and GGUF",
    ),
    "rotated": (
        lambda t: t.update({f"{MLP}.comfy_quant": format_of({"format": "int8_tensorwise", "convrot": True})}),
        "with rotated columns",
    ),
    "no format": (lambda t: t.update({f"{MLP}.comfy_quant": torch.zeros(3).byte()}), "is ''; read are"),
    "long format": (lambda t: t.update({f"{MLP}.comfy_quant": torch.zeros(5000).byte()}), "not a line of JSON"),
    "lies": (
        lambda t: t.update({f"{MLP}.comfy_quant": format_of({"format": "float8_e4m3fn"})}),
        "is F32, and said to be 'float8_e4m3fn'",
    ),
    "several": (lambda t: [t.pop(name) for name in list(t)[:9]], "lacks 9 of the model's 35 tensors: .*, ...$"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_error_says_all_that_does_not_fit(made, tmp_path, case):
    change, message = WRONG[case]
    pipe, folder = made("ernie")
    file = write(pipe.transformer, tmp_path / "model.safetensors", "plain", change)
    with pytest.raises(SavedPipelineError, match=message) as caught:
        load_pipeline(str(folder), device="cpu", transformer=file)
    assert "does not hold the weights of this ErnieImageTransformer2DModel" in str(caught.value)


def test_fused_layers_of_another_width_are_refused(made, tmp_path):
    pipe, folder = made("z_image")
    qkv = "layers.0.attention.qkv.weight"
    file = write(
        pipe.transformer, tmp_path / "model.safetensors", "plain", lambda t: t.update({qkv: torch.ones(300, 96)})
    )
    with pytest.raises(SavedPipelineError, match="is 300x96, and the layers it holds have 288 rows together"):
        load_pipeline(str(folder), device="cpu", transformer=file)


def test_a_file_of_another_architecture_is_refused(made, tmp_path):
    (_, folder), (other, _) = made("ernie"), made("lumina2")
    file = write(other.transformer, tmp_path / "model.safetensors", "plain")
    with pytest.raises(SavedPipelineError, match=r"(?s)lacks 35 of the model's 35 tensors.*that the model has not"):
        load_pipeline(str(folder), device="cpu", transformer=file)


def test_metadata_that_is_no_table_of_layers_is_refused(made, tmp_path):
    pipe, folder = made("ernie")
    tensors = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors", {"_quantization_metadata": json.dumps(["layers"])})
    with pytest.raises(SavedPipelineError, match="not an object with 'layers'"):
        load_pipeline(str(folder), device="cpu", transformer=tmp_path / "m.safetensors")


def test_files_that_are_none(made, tmp_path):
    _, folder = made("ernie")
    (tmp_path / "a.ckpt").touch()
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    for name, message in {
        "a.ckpt": "read from .safetensors or .gguf, not from '.ckpt'",
        "b.safetensors": "there is no such file",
        "a.safetensors": "cannot be read",
    }.items():
        with pytest.raises(SavedPipelineError, match=message):
            ernie_accel.load(folder, transformer=tmp_path / name)


def test_a_folder_of_ours_keeps_its_own_transformer(made, tmp_path):
    pipe, _ = made("ernie")
    file = write(pipe.transformer, tmp_path / "model.safetensors", "plain")
    ernie_accel.save(tiny_ernie(), tmp_path / "ours")
    with pytest.raises(ErnieAccelError, match="keeps its own transformer; found transformer="):
        ernie_accel.load(tmp_path / "ours", transformer=file)


# GGUF files of strangers -------------------------------------------------------------------------------------------


def gguf_bytes(*, version=3, tensors=0, entries=b"", count=0, infos=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + entries + infos


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name=b"w", shape=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


HOSTILE = {
    "nothing": (b"", "ends at byte 0, and 4 more"),
    "other": (b"PK\x03\x04" + b"\0" * 40, "does not begin as a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648; expected 2 or 3"),
    "many tensors": (gguf_bytes(tensors=2**63), "tensors; expected at most 65,536"),
    "many entries": (gguf_bytes(count=2**40), "entries; expected at most 65,536"),
    "long key": (gguf_bytes(count=1, entries=struct.pack("<Q", 2**62)), "a name of"),
    "long text": (gguf_bytes(count=1, entries=text(b"k") + struct.pack("<IQ", 8, 2**62)), "more were announced"),
    "long array": (gguf_bytes(count=1, entries=text(b"k") + struct.pack("<IIQ", 9, 4, 2**61)), "more were announced"),
    "texts": (gguf_bytes(count=1, entries=text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)), "more were announced"),
    "nested": (gguf_bytes(count=1, entries=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "type 9, which is not known"),
    "alignment": (
        gguf_bytes(count=1, entries=text(b"general.alignment") + struct.pack("<II", 4, 3)),
        "general.alignment is 3; expected a power of two",
    ),
    "unknown format": (gguf_bytes(tensors=1, infos=info(kind=99)), "is of format 99, which is not read; known: F32"),
    "many dimensions": (gguf_bytes(tensors=1, infos=text(b"w") + struct.pack("<I", 2**31)), "dimensions"),
    "beyond the end": (gguf_bytes(tensors=1, infos=info(shape=(2**40, 2**20))), "ends at byte"),
    "offset beyond": (gguf_bytes(tensors=1, infos=info(offset=2**62)), "ends at byte"),
    "odd offset": (gguf_bytes(tensors=1, infos=info(offset=7)), "which is no multiple of 32"),
    "odd rows": (gguf_bytes(tensors=1, infos=info(shape=(33,), kind=8)), "rows of 33 are not made of blocks of 32"),
    "no text": (gguf_bytes(tensors=1, infos=info(name=b"\xff\xfe")), "a tensor's name is no text"),
    "twice": (gguf_bytes(tensors=2, infos=info(shape=(1,)) * 2) + b"\0" * 256, "'w' is there twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_no_length_in_a_gguf_file_is_believed(tmp_path: Path, case):
    data, message = HOSTILE[case]
    (tmp_path / "w.gguf").write_bytes(data)
    with pytest.raises(SavedPipelineError, match=message):
        open_tensors(tmp_path / "w.gguf")


def test_a_gguf_file_that_was_cut_anywhere_is_one_error(made, tmp_path):
    pytest.importorskip("gguf")
    pipe, _ = made("ernie")
    whole = write_gguf(pipe.transformer, tmp_path / "whole.gguf", "Q8_0").read_bytes()
    for end in (*range(0, 200, 7), len(whole) // 2, len(whole) - 300):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(SavedPipelineError, match="cannot be read"):
            open_tensors(tmp_path / "cut.gguf")


def test_layouts_are_written_as_they_should_be(made):
    """The files above hold what ComfyUI's do: a test that writes one tensor too few would prove nothing."""
    names = comfy_names(made("z_image")[0].transformer)
    assert {"x_embedder.weight", "final_layer.linear.weight", "layers.0.attention.qkv.weight"} <= names.keys()
    tensors, _ = single_files.as_fp8_scaled(names)
    qkv = f"{single_files.PREFIX}layers.0.attention.qkv"
    assert tensors[f"{qkv}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{qkv}.scale_weight"].shape == ()


@pytest.fixture(scope="module")
def embedded_file(tmp_path_factory):
    """Return the embedded model's transformer as ComfyUI would keep it."""
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    return write(pipe.transformer, tmp_path_factory.mktemp("files") / "embedded.safetensors", "plain")


def command(capsys, *arguments):
    """Return (exit code, what the command line printed)."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return ended.value.code or 0, "".join(capsys.readouterr())


def test_the_batch_command_draws_with_a_single_file(tmp_path, capsys, embedded_file):
    (tmp_path / "t.csv").write_text("prompt\na large red circle in the center on a white background\n")
    batch = ("batch", tmp_path / "t.csv", "--steps", 1, "--preset", "exact", "--no-enhancer", "--no-report", "--out")
    assert command(capsys, *batch, tmp_path / "a")[0] == 0
    assert command(capsys, *batch, tmp_path / "b", "--transformer", embedded_file)[0] == 0
    without, with_file = (Image.open(tmp_path / name / "00000.png") for name in "ab")
    assert without.tobytes() == with_file.tobytes()
    assert with_file.text["transformer"] == "embedded.safetensors" and "transformer" not in without.text
    code, said = command(capsys, *batch, tmp_path / "b")
    assert code == 2 and "setting 'transformer' was 'embedded.safetensors' and is now None" in said
    code, said = command(capsys, *batch, tmp_path / "c", "--transformer", tmp_path / "none.safetensors")
    assert code == 2 and "there is no such file" in said and not (tmp_path / "c").exists()


def test_other_commands_take_a_single_file_too(made, tmp_path, capsys, embedded_file):
    small = ("--width", 64, "--height", 64, "--steps", 1)
    prompt = "a large red circle in the center on a white background"
    compared = ("evaluate", prompt, "--candidate-dtype", "bfloat16", *small)
    assert command(capsys, *compared, "--transformer", embedded_file)[0] == 0
    draw = ("optimize", prompt, "--preset", "exact", "--width", 64, "--height", 64, "--out", tmp_path / "a.png")
    assert command(capsys, *draw, "--transformer", embedded_file)[0] == 0
    plan = ("plan", "--model", MODEL_FOLDER, "--preset", "exact", "--device", "cpu")
    assert command(capsys, *plan, "--transformer", embedded_file)[0] == 0
    other = write(made("lumina2")[0].transformer, tmp_path / "other.safetensors", "plain")
    for asked in (compared, plan, draw):
        model = () if asked is plan else ("--model", MODEL_FOLDER)
        code, said = command(capsys, *asked, *model, "--transformer", other)
        assert code == 2 and "does not hold the weights of this ErnieImageTransformer2DModel" in said
    ernie_accel.save(tiny_ernie(), tmp_path / "ours")
    code, said = command(capsys, *plan[:2], tmp_path / "ours", *plan[3:], "--transformer", embedded_file)
    assert code == 2 and "keeps its own transformer; found transformer=" in said
