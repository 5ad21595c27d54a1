"""A saved pipe comes back bit for bit, whatever quantized it; a folder that is not whole is refused by name."""

from __future__ import annotations

import pickletools
import threading
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import ernie_accel
from ernie_accel import (
    Applied,
    BatchPromptEncoding,
    CallDefaults,
    CastDtype,
    Compile,
    CompileVae,
    Effect,
    FreeAfterUse,
    FuseKernels,
    MakeContiguous,
    MoveTo,
    Phase,
    Preview,
    Quantize,
    RewriteBlocks,
    SliceVae,
    SwapScheduler,
    Transform,
)
from ernie_accel.core.components import modules_of
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import RECEIPT
from ernie_accel.storage.loading import load_pipeline
from ernie_accel.storage.manifest import MANIFEST, MOST_JSON_BYTES, WEIGHTS, SavedReceipt
from tests.pipelines import picture, randomize, tiny_ernie, tiny_flux
from tests.saved_folders import as_version_1, change
from tests.test_quantize_backends import every_pair


def bits(pipe):
    """Return every tensor of a pipe by name, quantized layers by the tensors they consist of."""
    found = {}
    for component, module in modules_of(pipe).items():
        inside = []
        for path, layer in module.named_modules():
            if RECEIPT.of(layer) is not None:
                inside.append(f"{path}.")
                backend = BACKENDS[RECEIPT.of(layer).backend]
                found |= {f"{component}.{path}/{n}": t for n, t in backend.tensors(layer).items()}
        named = [*module.named_parameters(), *module.named_buffers()]
        found |= {f"{component}.{n}": t for n, t in named if not n.startswith(tuple(inside))}
    return found


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (a[name], b[name]))), name


@every_pair
def test_reload_is_bit_equal_for_every_backend(backend, scheme, tmp_path):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    request = Quantize(scheme, backend=backend.name, components=("transformer", "text_encoder"))
    ernie_accel.optimize(pipe, request)
    assert ernie_accel.save(pipe, tmp_path / "saved") == tmp_path / "saved"
    expected = picture(pipe, steps=1)  # after saving, too: saving changes nothing
    again = ernie_accel.load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert_same_bits(bits(pipe), bits(again))
    assert torch.equal(picture(again, steps=1), expected)
    old, new = (ernie_accel.report(p).entries[0].applied for p in (pipe, again))
    assert new.details == old.details
    assert new.changed == old.changed
    assert new.skipped == old.skipped


def test_the_transforms_travel_and_those_after_quantization_are_applied_again(tmp_path):
    requests = CastDtype("bf16"), Quantize("int8-weight-only"), MakeContiguous(), SwapScheduler("euler", shift=5.0)
    requests += CallDefaults("turbo"), Compile()
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, *requests)
    before = str(ernie_accel.report(pipe).title)
    ernie_accel.save(pipe, tmp_path / "saved")
    assert pipe.scheduler.config.shift == 5.0
    assert pipe.transformer.layers[0]._compiled_call_impl is not None
    again = ernie_accel.load(tmp_path / "saved")
    assert again.scheduler.config.shift == 5.0
    assert again.transformer.layers[0]._compiled_call_impl is not None
    report = ernie_accel.report(again)
    assert report.title == before
    assert [e.step.transform for e in report.entries] == [e.step.transform for e in ernie_accel.report(pipe).entries]
    with pytest.raises(ernie_accel.RestoreError, match="the folder does not hold the originals"):
        ernie_accel.restore(again)
    with pytest.raises(ernie_accel.ErnieAccelError, match="its weights are quantized"):
        again.to(torch.float32)


def test_rewritten_blocks_are_quantized_saved_and_rewritten_again(tmp_path):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    original = bits(pipe)
    ernie_accel.optimize(pipe, RewriteBlocks(), Quantize("int8-weight-only"))
    changed = ernie_accel.report(pipe).entries[1].applied.changed
    assert any("to_qkv" in name for name in changed)
    again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"))
    again.set_progress_bar_config(disable=True)
    assert_same_bits(bits(pipe), bits(again))
    assert torch.equal(picture(again, steps=1), picture(pipe, steps=1))
    ernie_accel.restore(pipe)
    assert_same_bits(original, bits(pipe))


H200 = ernie_accel.Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6"})


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_blocks_on_fused_kernels_are_saved_and_loaded_bit_equal(precision, tmp_path, monkeypatch):
    """As an H200 would; the kernels' plain-torch twins draw the pictures here."""
    pipe = tiny_ernie(dtype=torch.bfloat16)
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels(precision), context=H200)
    folder = ernie_accel.save(pipe, tmp_path / "saved")
    expected = picture(pipe, steps=1)
    monkeypatch.setattr(ernie_accel.Context, "detect", lambda *args, **kwargs: H200)
    again = ernie_accel.load(folder)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer.layers[1]) is type(pipe.transformer.layers[1])
    assert_same_bits(bits(pipe), bits(again))
    assert torch.equal(picture(again, steps=1), expected)
    requests = [[entry.step.transform for entry in ernie_accel.report(p).entries] for p in (pipe, again)]
    assert requests[0] == requests[1]
    if precision == "fp8":
        with pytest.raises(ernie_accel.ErnieAccelError, match="its weights are quantized"):
            again.to(torch.float16)
    with pytest.raises(ernie_accel.RestoreError, match="the folder does not hold the originals"):
        ernie_accel.restore(again)


def test_fp8_kernels_that_cannot_run_here_are_refused_on_loading(tmp_path):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels("fp8"), context=H200)
    folder = ernie_accel.save(pipe, tmp_path / "saved")
    with pytest.raises(ernie_accel.UnsupportedError, match=r"fp8 needs CUDA compute capability >= 8\.9"):
        ernie_accel.load(folder, device="cpu")


@dataclass(frozen=True, repr=False)
class RoundWeights(Transform):
    """A quantization of one's own, of which the library knows only that it is one."""

    phase: ClassVar[Phase] = Phase.QUANTIZE
    slot: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.EXACT

    def unsupported(self, pipe, context):
        return []

    def preview(self, pipe, context):
        return Preview(("transformer",))

    def apply(self, pipe, context):
        return Applied(("transformer",), no_undo="a test")


def test_two_components_with_schemes_of_their_own_travel(tmp_path):
    pipe = tiny_ernie(enhancer=True)
    ernie_accel.optimize(pipe, Quantize("int8-weight-only"), Quantize("fp8-weight-only", components=("pe",)))
    ernie_accel.save(pipe, tmp_path / "saved")
    loaded = ernie_accel.load(tmp_path / "saved")
    assert_same_bits(bits(loaded), bits(pipe))
    assert [entry.step.transform for entry in ernie_accel.report(loaded).entries] == [
        entry.step.transform for entry in ernie_accel.report(pipe).entries
    ]


def test_what_other_quantizing_transforms_made_is_refused_with_the_fix(ernie, tmp_path):
    ernie_accel.optimize(ernie, RoundWeights())
    fix = r"cannot save what RoundWeights\(\) made, whose weights only it knows: restore\(pipe\), then optimize"
    with pytest.raises(SavedPipelineError, match=fix):
        ernie_accel.save(ernie, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_without_any_transform_travels_too(tmp_path):
    for make in (tiny_ernie, tiny_flux):
        pipe = make()
        ernie_accel.save(pipe, tmp_path / "saved")
        again = ernie_accel.load(tmp_path / "saved")
        again.set_progress_bar_config(disable=True)
        assert_same_bits(bits(pipe), bits(again))
        assert torch.equal(picture(again), picture(pipe))
        assert ernie_accel.report(again).entries == ()


def test_what_is_loaded_can_be_optimized_further_and_saved_again(tmp_path):
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, Quantize("nf4"))
    ernie_accel.save(pipe, tmp_path / "one")
    again = ernie_accel.load(tmp_path / "one")
    ernie_accel.optimize(again, Quantize("nf4"), CallDefaults("turbo"))
    ernie_accel.save(again, tmp_path / "two")
    assert_same_bits(bits(pipe), bits(ernie_accel.load(tmp_path / "two")))
    with pytest.raises(ernie_accel.RestoreError):
        ernie_accel.optimize(again, Quantize("int8"))


def test_the_command_lines_loader_takes_a_saved_folder_too(ernie, tmp_path):
    """Stock loading would look for other files, or find tensors of names it does not know."""
    ernie_accel.optimize(ernie, Quantize("nf4"))
    folder = ernie_accel.save(ernie, tmp_path / "saved")
    assert_same_bits(bits(ernie), bits(load_pipeline(str(folder), device="cpu")))
    with pytest.raises(ernie_accel.ErnieAccelError, match="keeps its dtypes; found dtype='bfloat16'"):
        load_pipeline(str(folder), dtype="bfloat16", device="cpu")


def test_weights_are_safetensors_and_the_rest_json(ernie, tmp_path):
    ernie_accel.optimize(ernie, Quantize("int8-weight-only", backend="quanto"))
    folder = ernie_accel.save(ernie, tmp_path / "saved")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".model", ".jinja"}
    for path in files:
        with pytest.raises(ValueError, match=r".+"):
            list(pickletools.genops(path.read_bytes()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_loaded_tensors_start_where_kernels_can_read_them(ernie, tmp_path):
    """Files are mapped at any offset; quanto's int8 on the CPU would crash on a weight off a 16-byte boundary."""
    ernie_accel.optimize(ernie, Quantize("int8-weight-only", backend="quanto"))
    again = ernie_accel.load(ernie_accel.save(ernie, tmp_path / "saved"))
    assert all(tensor.data_ptr() % 16 == 0 for tensor in bits(again).values())


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(ernie, tmp_path):
    ernie_accel.optimize(ernie, Quantize("int8-weight-only"))
    return ernie_accel.save(ernie, tmp_path / "saved")


def truncate(folder):
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def edit(**changes):
    return lambda folder: change(folder, lambda manifest: manifest.update(changes))


def edit_model(component, **changes):
    return lambda folder: change(folder, lambda manifest: manifest["components"][component].update(changes))


def flip_a_bit(name):
    def do(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) * 2 // 3] ^= 1
        (folder / name).write_bytes(content)

    return do


def overwrite_header(folder):
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(b"\xff" * file.stat().st_size)
    change(folder)


def other_shape(folder):
    """Write a weight of another shape than the model's."""
    from safetensors.torch import load_file, save_file

    file = folder / "vae" / WEIGHTS
    tensors = load_file(file)
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :, :1, :1].contiguous()
    save_file(tensors, file)
    change(folder)


def drop_a_tensor(folder):
    """Write the transformer's file without one of its tensors, and the sizes to match."""
    from safetensors.torch import load_file, save_file

    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    del tensors["layers.0.self_attention.norm_q.weight"]
    save_file(tensors, file)
    change(folder)


def other_layers(folder):
    """Let the receipt of one layer tell another shape."""
    change(folder, lambda manifest: manifest["components"]["transformer"]["layers"][0].update(shape=[64, 64]))


def list_a_layer_twice(folder):
    """Let two receipts be of one layer."""

    def twice(manifest):
        paths = manifest["components"]["transformer"]["paths"]
        paths[1] = paths[0]

    change(folder, twice)


def drop_a_checksum(folder):
    change(folder, lambda manifest: manifest["files"][f"vae/{WEIGHTS}"].update(sha256=None))


def swell(folder):
    """Make the manifest larger than any can be, without writing so much."""
    with (folder / MANIFEST).open("rb+") as file:
        file.truncate(MOST_JSON_BYTES + 1)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, r"is damaged: transformer/model.safetensors has \d+ bytes, expected \d+"),
        (lambda folder: (folder / "vae" / WEIGHTS).unlink(), "is incomplete: vae/model.safetensors is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "is incomplete: ernie_accel.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "is not JSON"),
        (edit(format="something else"), "is not of the format 'ernie_accel pipeline'"),
        (edit(format_version=99), "is of format version 99; this library reads 1, 2 and 3"),
        (edit(pipeline="FluxPipeline"), "names a FluxPipeline, model_index.json another pipeline"),
        (edit(components={}), r"lists the models \{\}, model_index.json lists \{'text_encoder'"),
        (edit(surprise=1), "ernie_accel.json: surprise: Extra inputs are not permitted"),
        (edit(transforms=[1]), r"ernie_accel.json: transforms.0: Input should be"),
        (edit_model("vae", library="os"), "ernie_accel.json: components.vae.library: Input should be 'diffusers' or"),
        (edit_model("vae", dtype="nn"), "ernie_accel.json: components.vae.dtype: Value error, not a dtype of torch"),
        (edit_model("vae", paths=["a"]), "components.vae: Value error, 0 layers have 1 paths"),
        (list_a_layer_twice, r"components.transformer: Value error, (\d+) layers have (?!\1)\d+ paths"),
        (drop_a_checksum, "ernie_accel.json: files: every file needs a checksum"),
        (swell, f"ernie_accel.json is not a file of at most {MOST_JSON_BYTES} bytes"),
        (edit_model("transformer", aliases={"a": "b"}), "transformer/model.safetensors lacks b, which is a as well"),
        (edit_model("vae", **{"class": "AutoencoderKL"}), "lists the models"),
        (
            flip_a_bit(f"vae/{WEIGHTS}"),
            "is damaged: vae/model.safetensors has other bytes than were saved; copy it again",
        ),
        (flip_a_bit("tokenizer/tokenizer.json"), "is damaged: tokenizer/tokenizer.json has other bytes"),
        (
            lambda folder: (folder / "vae" / "extra.json").write_text("{}"),
            "holds vae/extra.json, which .* does not list",
        ),
        (other_shape, r"has encoder.conv_in.weight as \(16, 3, 1, 1\), and the model as \(16, 3, 3, 3\)"),
        (overwrite_header, "cannot be read"),
        (drop_a_tensor, "transformer/model.safetensors lacks layers.0.self_attention.norm_q.weight"),
        (other_layers, r"has layers.0\S+ as \(64, 64\), and the model as"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_by_name(damage, says, saved):
    damage(saved)
    with pytest.raises(SavedPipelineError, match=says) as caught:
        ernie_accel.load(saved)
    assert caught.value.folder == str(saved)
    assert str(saved) in str(caught.value)


def test_what_file_managers_leave_in_folders_is_no_damage(saved):
    (saved / "vae" / ".DS_Store").write_bytes(b"\0")
    (saved / "notes.txt").write_text("in the folder itself no library looks")
    assert ernie_accel.load(saved) is not None


def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ernie_accel.ErnieAccelError, match="there is no folder"):
        ernie_accel.load(tmp_path / "nothing")


def test_layers_that_cannot_run_here_are_refused_before_anything_large_is_read(saved):
    def all_in_fp8(manifest):
        for receipt in manifest["components"]["transformer"]["layers"]:
            receipt["scheme"] = "fp8"

    change(saved, all_in_fp8)
    with pytest.raises(SavedPipelineError, match=r"cannot run on cpu.*fp8 needs CUDA compute capability >= 8.9"):
        ernie_accel.load(saved)


@pytest.mark.parametrize("place", [".", "..", ""])
def test_the_folder_that_one_works_in_is_not_replaced(place, ernie, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path if place != ".." else tmp_path / "inner")
    (tmp_path / "inner" / "ernie_accel.json").touch()
    (tmp_path / "ernie_accel.json").touch()
    with pytest.raises(SavedPipelineError, match="give a name"):
        ernie_accel.save(ernie, place)


def test_nothing_foreign_is_overwritten(ernie, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SavedPipelineError, match=r"was not written by ernie_accel\.save; choose another"):
        ernie_accel.save(ernie, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_write_that_fails_leaves_the_old_folder_whole(saved, ernie, monkeypatch):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    monkeypatch.setattr(type(ernie.vae), "save_config", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ernie_accel.save(ernie, saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_lora_layers_are_refused_with_the_fix(ernie, tmp_path):
    from peft import LoraConfig

    ernie.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(SavedPipelineError, match=r"a LoRA layer: pipe.fuse_lora\(\)"):
        ernie_accel.save(ernie, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_layers_that_others_quantized_are_refused(ernie, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(ernie.transformer.layers[1].mlp.up_proj, Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    with pytest.raises(SavedPipelineError, match="quantized by torchao without ernie_accel"):
        ernie_accel.save(ernie, tmp_path / "saved")


def test_what_stock_tools_reload_as_garbage_is_why_this_exists(tmp_path):
    """quanto's qint8 through plain ``save_pretrained``: it loads without an error and is another model."""
    from diffusers import ErnieImageTransformer2DModel

    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, Quantize("int8-weight-only", backend="quanto"))
    expected = picture(pipe, output_type="latent")
    type(pipe.transformer).save_pretrained(pipe.transformer, tmp_path / "plain")  # its own is refused
    ernie_accel.save(pipe, tmp_path / "saved")
    again = ernie_accel.load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again, output_type="latent"), expected)
    again.transformer = ErnieImageTransformer2DModel.from_pretrained(tmp_path / "plain", low_cpu_mem_usage=False)
    assert not torch.allclose(picture(again, output_type="latent"), expected, atol=1e-2)


# ---- what belongs to one machine ------------------------------------------------------------------------------------


@pytest.fixture
def with_places(tmp_path):
    """A pipe whose transforms name folders of this machine, saved."""
    pipe = tiny_ernie()
    places = Compile(cache=str(tmp_path / "code")), FreeAfterUse(folder=str(tmp_path / "weights")), MoveTo("cpu")
    prompts = BatchPromptEncoding(cache=3, folder=str(tmp_path / "prompts"))
    ernie_accel.optimize(pipe, *places, prompts, CallDefaults("turbo"))
    return ernie_accel.save(pipe, tmp_path / "saved")


def transforms_of(pipe):
    return {entry.step.transform for entry in ernie_accel.report(pipe).entries}


def test_what_belongs_to_this_machine_is_not_saved(with_places, tmp_path):
    assert str(tmp_path) not in (with_places / MANIFEST).read_text()
    expected = {Compile(), FreeAfterUse(), BatchPromptEncoding(cache=3), CallDefaults("turbo")}
    assert transforms_of(ernie_accel.load(with_places)) == expected


def test_what_belongs_to_this_machine_is_given_to_load(with_places, tmp_path):
    given = Compile(cache=str(tmp_path / "mine")), BatchPromptEncoding(cache=3, folder=str(tmp_path / "words"))
    again = ernie_accel.load(with_places, *given, SliceVae())
    assert transforms_of(again) == {*given, SliceVae(), FreeAfterUse(), CallDefaults("turbo")}
    assert transforms_of(ernie_accel.optimize(again, *transforms_of(again))) == transforms_of(again)


def test_embeddings_kept_in_a_folder_are_those_of_the_loaded_weights(tmp_path):
    """Two checkpoints share the folder: what tells them apart must be asked when the weights are there."""
    for seed in (0, 1):
        pipe = tiny_ernie()
        randomize(pipe.text_encoder, seed)
        ernie_accel.optimize(pipe, BatchPromptEncoding(cache=8))
        folder = ernie_accel.save(pipe, tmp_path / str(seed))
        kept = BatchPromptEncoding(cache=8, folder=str(tmp_path / "words"))
        again = ernie_accel.load(folder, kept)
        for _ in range(2):
            (found,) = again.encode_prompt("red circle", "cpu")
            assert torch.equal(found, pipe.encode_prompt("red circle", "cpu")[0])


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (
            {"transform": "Compile", "cache": "code"},
            r"Compile has cache='code'; .*load\(folder, Compile\(cache=\.\.\.\)\)",
        ),
        ({"transform": "CompileVae", "cache": "/tmp/x"}, "CompileVae has cache='/tmp/x'; nobody but you may choose it"),
        ({"transform": "FreeAfterUse", "folder": ""}, "FreeAfterUse has folder=''"),
        ({"transform": "BatchPromptEncoding", "cache": 1, "folder": "x"}, "BatchPromptEncoding has folder='x'"),
        ({"transform": "Compile", "cahce": 1}, "Unknown field of Compile 'cahce'. Did you mean 'cache'"),
        ({"transform": "Warmup", "batch_sizes": 7}, "Warmup"),
        ({"transform": "CastDtype", "dtype": {"a": 1}}, "CastDtype"),
        ({"transform": "CheckFinite", "rerun": "yes"}, "rerun takes bool, got 'yes'"),
        ({"transform": "os.system"}, "Unknown transform 'os.system'"),
        ({"transform": ["Compile"]}, "transforms"),
        ({}, "transforms"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_folder_that_chooses_a_place_is_refused(transform, says, version, ernie, tmp_path):
    folder = ernie_accel.save(ernie, tmp_path / "saved")
    if version == 1:
        as_version_1(folder)
    entry = {"transform": transform, "changed": [], "skipped": {}}
    change(folder, lambda manifest: manifest.update(transforms=[entry]))
    with pytest.raises(ernie_accel.ErnieAccelError, match=says):
        ernie_accel.load(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_a_place_in_a_folder_of_version_0_1_can_be_given_anew(with_places, tmp_path):
    as_version_1(with_places)

    def older(manifest):
        for saved in manifest["transforms"]:
            if saved["transform"]["transform"] == "Compile":
                saved["transform"]["cache"] = "cache"
        manifest["transforms"].append(
            {"transform": {"transform": "MoveTo", "device": "cuda:7"}, "changed": [], "skipped": {}}
        )

    change(with_places, older)
    again = ernie_accel.load(with_places, Compile(cache=str(tmp_path / "mine")))  # on the CPU, as load is told
    assert transforms_of(again) >= {Compile(cache=str(tmp_path / "mine")), FreeAfterUse()}
    assert not any(isinstance(transform, MoveTo) for transform in transforms_of(again))


def test_what_the_weights_are_made_of_cannot_be_replaced(tmp_path):
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, RewriteBlocks(), Quantize("int8-weight-only"))
    folder = ernie_accel.save(pipe, tmp_path / "saved")
    why = r"was saved with Quantize\('int8-weight-only'\); Quantize\('nf4'\) cannot take its place"
    with pytest.raises(SavedPipelineError, match=why):
        ernie_accel.load(folder, Quantize("nf4"))
    with pytest.raises(SavedPipelineError, match=r"was saved without CastDtype.*; load it, then optimize it"):
        ernie_accel.load(folder, CastDtype("bf16"))
    with pytest.raises(ernie_accel.ConflictError):
        ernie_accel.load(folder, SwapScheduler("unipc"), SwapScheduler("euler"))


@dataclass(frozen=True, repr=False)
class Watermark(Transform):
    """A transform of one's own that reads a file."""

    phase: ClassVar[Phase] = Phase.CALL
    slot: ClassVar[str] = "watermark"
    effect: ClassVar[Effect] = Effect.EXACT

    logo_file: str | None = None

    def unsupported(self, pipe, context):
        return []

    def preview(self, pipe, context):
        return Preview((), note="a test")

    def apply(self, pipe, context):
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class DeclaredWatermark(Watermark):
    """The same, as it should be."""

    logo_file: str | None = field(default=None, metadata=ernie_accel.MACHINE_LOCAL)


def test_a_transform_of_ones_own_that_takes_a_path_must_declare_it(ernie, tmp_path):
    folder = ernie_accel.save(ernie, tmp_path / "saved")
    with pytest.raises(ernie_accel.ErnieAccelError, match=r"Watermark.logo_file looks like a path.*MACHINE_LOCAL"):
        ernie_accel.load(folder, known=[Watermark])
    ernie_accel.optimize(ernie, DeclaredWatermark("logo.png"))
    ernie_accel.save(ernie, folder)
    assert transforms_of(ernie_accel.load(folder, known=[DeclaredWatermark])) == {DeclaredWatermark()}
    again = ernie_accel.load(folder, DeclaredWatermark("mine.png"), known=[DeclaredWatermark])
    assert transforms_of(again) == {DeclaredWatermark("mine.png")}


def test_folders_of_version_0_1_still_load(tmp_path):
    pipe = tiny_ernie(enhancer=True)
    ernie_accel.optimize(pipe, RewriteBlocks(), Quantize("int8-weight-only"), CompileVae(), SwapScheduler("unipc"))
    folder = ernie_accel.save(pipe, tmp_path / "saved")
    as_version_1(folder)
    again = ernie_accel.load(folder)
    assert_same_bits(bits(pipe), bits(again))
    assert transforms_of(again) == transforms_of(pipe)


def test_a_model_that_pipelines_are_not_known_to_use_must_be_named(ernie, tmp_path):
    from transformers import DebertaConfig, DebertaModel

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    ernie.text_encoder = DebertaModel(DebertaConfig(vocab_size=32, **tiny)).eval()
    folder = ernie_accel.save(ernie, tmp_path / "saved")
    with pytest.raises(SavedPipelineError, match=r"text_encoder: transformers.DebertaModel .* known=\(DebertaModel,\)"):
        ernie_accel.load(folder)
    assert_same_bits(bits(ernie), bits(ernie_accel.load(folder, known=(DebertaModel,))))


def test_a_checksum_is_that_of_the_checksums_of_the_pieces(tmp_path, monkeypatch):
    """As the documentation says, so that others can check a folder."""
    from hashlib import sha256

    from ernie_accel.storage import checksums

    monkeypatch.setattr(checksums, "PIECE_BYTES", 1000)
    for size in (0, 1, 999, 1000, 1001, 3500):
        content = bytes(number % 251 for number in range(size))
        (tmp_path / "file").write_bytes(content)
        pieces = [content[start : start + 1000] for start in range(0, max(size, 1), 1000)]
        expected = sha256(b"".join(sha256(piece).digest() for piece in pieces)).hexdigest()
        assert checksums.checksums([tmp_path / "file"]) == [expected]


def test_the_pieces_of_one_file_are_checked_at_the_same_time(tmp_path, monkeypatch):
    from ernie_accel.storage import checksums

    monkeypatch.setattr(checksums, "PIECE_BYTES", 1000)
    monkeypatch.setattr(checksums, "cores", lambda: 2)
    both, digest = threading.Barrier(2), checksums._digest

    def together(path, start):
        both.wait(timeout=10)  # a single thread would wait here alone, and break it
        return digest(path, start)

    (tmp_path / "file").write_bytes(b"x" * 4000)
    expected = checksums.checksums([tmp_path / "file"], threads=1)
    monkeypatch.setattr(checksums, "_digest", together)
    assert checksums.checksums([tmp_path / "file"]) == expected


def test_what_waits_for_a_thread_is_done_by_more_of_them_once_the_caller_waits(tmp_path, monkeypatch):
    from ernie_accel.storage import checksums

    monkeypatch.setattr(checksums, "PIECE_BYTES", 1000)
    monkeypatch.setattr(checksums, "cores", lambda: 3)
    (tmp_path / "file").write_bytes(bytes(number % 251 for number in range(6500)))
    expected = checksums.checksums([tmp_path / "file"])
    four, begun, digest = threading.Barrier(4), threading.Semaphore(0), checksums._digest

    def together(path, start):
        begun.release()
        if start < 4000:
            four.wait(timeout=10)  # the first thread alone would wait here, and break it
        return digest(path, start)

    monkeypatch.setattr(checksums, "_digest", together)
    with checksums.Checking([tmp_path / "file"], threads=1) as checking:
        assert begun.acquire(timeout=10)
        assert not begun.acquire(timeout=0.2)
        checking.use_all_cores()
        assert checking.of(tmp_path / "file") == expected[0]


def test_each_thread_has_one_block_of_memory_for_all_its_pieces(tmp_path, monkeypatch):
    from ernie_accel.storage import checksums

    made, new = [], checksums.mmap.mmap
    monkeypatch.setattr(checksums, "mmap", SimpleNamespace(mmap=lambda *args: made.append(args) or new(*args)))
    monkeypatch.setattr(checksums, "PIECE_BYTES", 1000)
    (tmp_path / "file").write_bytes(b"x" * 4000)
    checksums.checksums([tmp_path / "file"], threads=1)
    assert len(made) == 1


def test_every_field_of_a_receipt_is_saved():
    assert set(SavedReceipt.model_fields) == {f.name for f in fields(ernie_accel.LayerReceipt)}
