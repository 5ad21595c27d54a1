"""Rows that name a LoRA: loaded once, switched rarely, removed at the end; what does not fit fails its own rows."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from ernie_accel import RewriteBlocks, optimize
from ernie_accel.batch import BatchInputError, produce, read_rows, read_table
from ernie_accel.batch.engines import adapters
from ernie_accel.batch.errors import BatchChangedError
from tests.pipelines import tiny_ernie, tiny_z_image
from tests.stub_engine import StubEngine

CALL = {"width": 32, "height": 32, "steps": 2, "guidance_scale": 1.0}


def write_lora(path, seed, pipe=None):
    pipe = pipe or tiny_ernie()
    torch.manual_seed(seed)
    targets = ["to_q", "to_v"]
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name="x")
    state = get_peft_model_state_dict(pipe.transformer, adapter_name="x")
    save_file({f"transformer.{name}": 4 * value for name, value in state.items()}, path)


@pytest.fixture
def folder(tmp_path):
    write_lora(tmp_path / "a.safetensors", 1)
    write_lora(tmp_path / "b.safetensors", 2)
    return tmp_path


def rows_of(folder, *lines):
    (folder / "t.csv").write_text("\n".join(["prompt,seed,lora,lora_scale", *lines]) + "\n")
    return read_table(folder / "t.csv", defaults=CALL)


def drawn(results):
    assert [result.error for result in results] == [None] * len(results)
    return {result.row.index: np.asarray(Image.open(result.path)) for result in results}


@pytest.mark.parametrize("transforms", [(), (RewriteBlocks(),)])
def test_a_row_is_what_the_pipe_draws_with_its_lora(folder, transforms):
    rows = rows_of(
        folder, "red,1,,", "red,1,a.safetensors,", "red,1,b.safetensors,0.5", "red,1,a.safetensors,0", "red,1,,"
    )
    pipe = tiny_ernie()
    if transforms:
        optimize(pipe, *transforms)
    out = drawn(list(produce(pipe, rows, folder / "out")))
    expected = tiny_ernie()

    def draw():
        call = {"num_inference_steps": 2, "guidance_scale": 1.0, "width": 32, "height": 32, "use_pe": False}
        return np.asarray(expected("red", generator=torch.Generator().manual_seed(1), **call).images[0]).astype(int)

    def close(picture, other):
        return np.abs(picture.astype(int) - other).max() <= 1

    stock = draw()
    assert close(out[0], stock)
    assert close(out[3], stock)
    assert close(out[4], stock)
    expected.load_lora_weights(folder / "a.safetensors", adapter_name="a")
    assert close(out[1], draw())
    assert not close(out[1], stock)
    expected.load_lora_weights(folder / "b.safetensors", adapter_name="b")
    expected.set_adapters(["b"], [0.5])
    assert close(out[2], draw())
    assert not any(pipe.get_list_adapters().values())  # removed at the end
    settings = json.loads(Image.open(folder / "out" / "00003.png").text["settings"])
    assert settings["lora_scale"] == 0
    assert len(settings["lora_sha256"]) == 64


def test_an_alpha_that_a_file_tells_apart_from_the_rank_counts(tmp_path):
    """Diffusers saves it in the file's metadata; without it, this LoRA would have a quarter of its strength."""
    pipe = tiny_ernie()
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="x")
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="x")
    told = {**config.to_dict(), "target_modules": ["to_q", "to_v"]}
    pipe.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, weight_name="a.safetensors", transformer_lora_adapter_metadata=told
    )
    out = drawn(list(produce(tiny_ernie(), rows_of(tmp_path, "red,1,a.safetensors,"), tmp_path / "out")))
    expected = tiny_ernie()
    expected.load_lora_weights(tmp_path, weight_name="a.safetensors")
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "width": 32, "height": 32, "use_pe": False}
    picture = np.asarray(expected("red", generator=torch.Generator().manual_seed(1), **call).images[0]).astype(int)
    assert np.abs(out[0].astype(int) - picture).max() <= 1
    expected.set_adapters(expected.get_active_adapters(), [0.25])
    weaker = np.asarray(expected("red", generator=torch.Generator().manual_seed(1), **call).images[0]).astype(int)
    assert np.abs(picture - weaker).max() > 1


def test_rows_are_grouped_so_that_adapters_are_swapped_rarely(folder, monkeypatch):
    lines = [f"p{i},{i},{lora},{scale}" for i in range(4) for lora, scale in (("a.safetensors", ""), ("", ""),
             ("b.safetensors", ""))]  # fmt: skip
    pipe, swaps, loads = tiny_ernie(), [], []
    set_adapters, load = pipe.set_adapters, pipe.load_lora_weights
    monkeypatch.setattr(pipe, "set_adapters", lambda *a: swaps.append(a) or set_adapters(*a))
    monkeypatch.setattr(pipe, "load_lora_weights", lambda *a, **k: loads.append(k) or load(*a, **k))
    drawn(list(produce(pipe, rows_of(folder, *lines), folder / "out")))
    assert len(swaps) == len(loads) == 2


def test_few_adapters_stay_loaded(folder, monkeypatch):
    monkeypatch.setattr(adapters, "KEPT", 1)
    pipe, most = tiny_ernie(), []
    set_adapters = pipe.set_adapters

    def watched(*arguments):
        set_adapters(*arguments)
        most.append(len(pipe.get_list_adapters().get("transformer", ())))

    monkeypatch.setattr(pipe, "set_adapters", watched)
    drawn(list(produce(pipe, rows_of(folder, "p,1,a.safetensors,", "p,1,b.safetensors,"), folder / "out")))
    assert most == [1, 1]


def test_a_lora_of_which_layers_would_be_left_out_fails_its_row(folder):
    """diffusers loads what it knows, and logs the rest: the picture would be another than was asked for."""
    tensors = load_file(folder / "a.safetensors")
    more = {name.replace("layers.0.", "layers.9."): tensor.clone() for name, tensor in tensors.items()}
    assert len(more.keys() - tensors.keys()) > 0
    save_file(tensors | more, folder / "more.safetensors")
    rows = rows_of(folder, "p,1,a.safetensors,", "p,1,more.safetensors,", "q,1,a.safetensors,")
    results = {result.row.index: result for result in produce(tiny_ernie(), rows, folder / "out")}
    assert results[0].error is results[2].error is None
    missing = len({name.rpartition(".lora_")[0] for name in more.keys() - tensors.keys()})
    assert f"more.safetensors does not fit ErnieImagePipeline: {missing} of its " in results[1].error
    assert "(the first is transformer.layers.9." in results[1].error


def test_a_lora_of_another_architecture_fails_its_rows_and_no_others(folder):
    z_image = tiny_z_image()
    write_lora(folder / "z.safetensors", 3, z_image)
    save_file({"x": torch.zeros(2)}, folder / "no_lora.safetensors")
    lines = "p,1,z.safetensors,", "p,1,,", "p,1,a.safetensors,", "p,1,no_lora.safetensors,"
    pipe = tiny_ernie()
    results = {result.row.index: result for result in produce(pipe, rows_of(folder, *lines), folder / "out")}
    assert results[1].error is results[2].error is None
    counted = "8 of its 8 layers are not in this ErnieImagePipeline (the first is transformer."
    assert results[0].error.startswith(f"z.safetensors does not fit ErnieImagePipeline: {counted}")
    assert results[3].error.startswith("no_lora.safetensors does not fit ErnieImagePipeline: ")
    alone = drawn(list(produce(tiny_ernie(), rows_of(folder, *lines[1:2]), folder / "alone")))
    assert np.array_equal(np.asarray(Image.open(results[1].path)), alone[0])


def test_what_an_optimized_pipe_refuses_is_in_the_reason(folder):
    tensors = load_file(folder / "a.safetensors")
    first = next(name for name in tensors if ".lora_B." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / "half.safetensors")
    rows = rows_of(folder, "p,1,half.safetensors,", "p,1,a.safetensors,", "q,1,,")
    pipe = optimize(tiny_ernie(), RewriteBlocks())
    results = {result.row.index: result for result in produce(pipe, rows, folder / "out")}
    assert results[1].error is results[2].error is None
    path = first.removeprefix("transformer.").partition(".lora_")[0]
    assert results[0].error == f"half.safetensors does not fit ErnieImagePipeline: {path} has lora_A, and no lora_B"


def test_mistakes_are_named_with_their_lines(folder):
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (folder / "deep.safetensors").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    inside = folder / "in"
    inside.mkdir()
    lines = (
        "p,1,none.safetensors,",
        "p,1,../a.safetensors,",
        "p,1,pickle.safetensors,",
        "p,1,,0.5",
        "p,1,a.safetensors,99",
    )
    (inside / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    (inside / "pickle.safetensors").write_bytes((folder / "pickle.safetensors").read_bytes())
    (inside / "deep.safetensors").write_bytes((folder / "deep.safetensors").read_bytes())
    with pytest.raises(BatchInputError) as caught:
        rows_of(inside, *lines, "p,1,deep.safetensors,")
    found = dict(caught.value.problems)
    assert found[2].startswith("lora 'none.safetensors' cannot be read (No such file")
    assert "is outside of the folder for LoRAs" in found[3]
    assert "--lora-root" in found[3]
    assert found[4] == "lora 'pickle.safetensors' is no safetensors file with weights; only those are read"
    assert found[5] == "lora_scale has no effect without lora; name the file, or leave it empty"
    assert found[6].startswith("lora_scale 99 is not within 0 to 10")
    assert "is no safetensors file" in found[7]
    (row,) = read_rows([{"prompt": "p", "lora": "a.safetensors"}], lora_root=folder)
    assert row.lora.path == str((folder / "a.safetensors").resolve())


def test_pipes_and_engines_that_cannot_are_refused(folder):
    rows = rows_of(folder, "p,1,a.safetensors,")
    with pytest.raises(BatchInputError, match="names a LoRA, and StubEngine does not draw with LoRAs"):
        produce(StubEngine(), rows, folder / "out")
    pipe = tiny_ernie()
    pipe.load_lora_weights(folder / "b.safetensors")
    with pytest.raises(BatchInputError, match="names a LoRA, and ErnieImagePipeline has adapters of its own"):
        produce(pipe, rows, folder / "out")


def test_resuming_notices_another_lora(folder):
    list(produce(tiny_ernie(), rows_of(folder, "p,1,a.safetensors,"), folder / "out"))
    assert list(produce(tiny_ernie(), rows_of(folder, "p,1,a.safetensors,"), folder / "out")) == []
    with pytest.raises(BatchChangedError, match="lora"):
        produce(tiny_ernie(), rows_of(folder, "p,1,b.safetensors,"), folder / "out")
    rows = rows_of(folder, "p,1,a.safetensors,")
    (folder / "a.safetensors").write_bytes((folder / "b.safetensors").read_bytes())
    (result,) = produce(tiny_ernie(), rows, folder / "out2")
    assert "it was changed after the table was checked" in result.error
