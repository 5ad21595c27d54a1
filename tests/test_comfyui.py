"""The ComfyUI nodes, imported, checked and run as ComfyUI does it (`comfyui_stand_in`), with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tools.comfyui.workflows import FOLDER, PROMPTS, as_prompt, as_workflow, for_small

import ernie_accel
from ernie_accel.batch import BatchInputError
from ernie_accel.core.errors import ErnieAccelError
from tests import single_files
from tests.comfyui_stand_in import Executor, InterruptProcessingException, OwnNodes, RefusedError, running
from tests.pipelines import tiny_ernie
from tests.test_batch_lora import write_lora

TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "IMAGE", "MASK", "ERNIE_ACCEL_PIPE", "ERNIE_ACCEL_LORAS"}


@pytest.fixture(scope="module")
def tiny():
    return tiny_ernie()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("diffusers") / "tiny"
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def comfyui(tmp_path, saved):
    with running(tmp_path) as (host, module):
        (tmp_path / "models" / "diffusers" / "tiny").symlink_to(saved)
        executor = Executor({**OwnNodes, **module.NODE_CLASS_MAPPINGS})
        yield host, executor, module


@pytest.fixture
def files(comfyui, tiny):
    """What the examples name: a picture, a table, a LoRA, a single file."""
    host, _, _ = comfyui
    fill(host.root, tiny)
    return host.root


def fill(root: Path, pipe) -> None:
    red = np.zeros((64, 64, 3), dtype=np.uint8)
    red[16:48, 16:48, 0] = 255
    Image.fromarray(red).save(root / "input" / "example.png")
    rows = ["sku,prompt", "mug,a large red circle in the center", "cup,a small blue square in the center"]
    (root / "input" / "products.csv").write_text("\n".join(rows) + "\n")
    folder = root / "models" / "diffusion_models"
    single_files.write(pipe.transformer, folder / "ernie-image-turbo-fp8_scaled.safetensors", "fp8_scaled")


def graph(name: str, **inputs):
    """Return an example as the executor takes it, with a tiny model and other values of some inputs."""
    prompt = for_small(PROMPTS[name], "tiny", 64)
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in inputs.items() if key in node["inputs"]}
    return prompt


def pictures(shown) -> torch.Tensor:
    (images,) = [value for output in shown.values() for value in output.get("images", ())]
    return images


# The contract ------------------------------------------------------------------------------------------------------


def test_nodes_declare_what_comfyui_asks_for(comfyui):
    _, _, module = comfyui
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for name, cls in module.NODE_CLASS_MAPPINGS.items():
        assert name.startswith("ErnieAccel") and cls.CATEGORY and cls.DESCRIPTION
        assert callable(getattr(cls, cls.FUNCTION))
        assert len(getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)) == len(cls.RETURN_TYPES)
        assert set(cls.RETURN_TYPES) <= TYPES
        for kind in cls.INPUT_TYPES().values():
            for spec in kind.values():
                assert isinstance(spec[0], list) or spec[0] in TYPES
                settings = spec[1] if len(spec) > 1 else {}
                if "default" in settings and isinstance(spec[0], list):
                    assert settings["default"] in spec[0]


def test_every_node_has_an_example_that_loads(comfyui):
    """The page's form and the executor's are one graph, and the files are what the graphs say."""
    _, executor, module = comfyui
    used = set()
    for name, prompt in PROMPTS.items():
        workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert workflow == as_workflow(prompt, executor.classes), "run python -m tools.comfyui.workflows"
        assert as_prompt(workflow, executor.classes) == prompt
        used |= {node["class_type"] for node in prompt.values()}
    assert {path.stem for path in FOLDER.glob("*.json")} == PROMPTS.keys()
    assert used >= module.NODE_CLASS_MAPPINGS.keys()


# Pictures ----------------------------------------------------------------------------------------------------------


def test_text_to_image_draws_what_the_pipe_draws(comfyui, tiny):
    host, executor, _ = comfyui
    drawn = pictures(executor.run(graph("text_to_image", pictures=2)))
    assert drawn.shape == (2, 64, 64, 3) and drawn.dtype == torch.float32
    assert not drawn.is_inference() and drawn.min() >= 0 and drawn.max() <= 1
    expected = tiny(
        "a large red circle in the center",
        negative_prompt="",
        generator=torch.Generator().manual_seed(43),
        num_inference_steps=2,
        guidance_scale=1.0,
        height=64,
        width=64,
        use_pe=False,
        output_type="pt",
    ).images
    torch.testing.assert_close(drawn[1], expected[0].permute(1, 2, 0), atol=1e-4, rtol=0)
    assert host.bars == [(1, 2), (2, 2)]


def test_the_embedded_model_draws_without_any_download(comfyui):
    _, executor, _ = comfyui
    drawn = pictures(executor.run(for_small(PROMPTS["text_to_image"])))
    assert drawn.shape == (1, 128, 128, 3)
    red, green, blue = drawn[0, 64, 64]
    assert red > green + 0.2 and red > blue + 0.2  # the circle that the prompt asks for


def test_only_what_changed_is_run_again(comfyui):
    _, executor, _ = comfyui
    executor.run(graph("text_to_image"))
    assert executor.ran == ["1", "2", "3"]
    executor.run(graph("text_to_image", seed=7))
    assert executor.ran == ["2", "3"]
    executor.run(graph("text_to_image", seed=7))
    assert executor.ran == []


def test_a_single_file_draws_and_is_loaded_again_when_it_changes(comfyui, files):
    _, executor, _ = comfyui
    assert pictures(executor.run(graph("load_single_file"))).shape == (1, 64, 64, 3)
    file = files / "models" / "diffusion_models" / "ernie-image-turbo-fp8_scaled.safetensors"
    os.utime(file, (1, 1))
    executor.run(graph("load_single_file"))
    assert executor.ran == ["1", "2", "3"]


def test_a_lora_is_in_the_picture(comfyui, files):
    _, executor, _ = comfyui
    write_lora(files / "models" / "loras" / "style.safetensors", 1)
    plain = pictures(executor.run(graph("text_to_image")))
    with_lora = pictures(executor.run(graph("lora")))
    without = pictures(executor.run(graph("lora", scale=0.0)))
    assert (with_lora - plain).abs().max() > 1e-3
    torch.testing.assert_close(without, plain, atol=1e-4, rtol=0)


def test_the_alpha_in_a_loras_metadata_counts(comfyui, files):
    from safetensors.torch import load_file, save_file

    _, executor, _ = comfyui
    file = files / "models" / "loras" / "style.safetensors"
    write_lora(file, 1)
    plain = pictures(executor.run(graph("lora")))
    told = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.target_modules": ["to_q", "to_v"]}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    save_file(load_file(file), file, metadata=metadata)
    weaker = pictures(executor.run(graph("lora")))
    assert (weaker - plain).abs().max() > 1e-3


@pytest.mark.parametrize("named", ["kohya", "ComfyUI"])
def test_a_lora_by_other_names_is_the_same(comfyui, files, named):
    from safetensors.torch import load_file, save_file

    _, executor, _ = comfyui
    file = files / "models" / "loras" / "style.safetensors"
    write_lora(file, 1)
    expected = pictures(executor.run(graph("lora")))
    halves = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for name, tensor in load_file(file).items():
        path, half = name.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
        if named == "ComfyUI":
            renamed[f"diffusion_model.{path}.{half}.weight"] = tensor
        else:
            renamed[f"lora_unet_{path.replace('.', '_')}.{halves[half]}.weight"] = tensor
            renamed[f"lora_unet_{path.replace('.', '_')}.alpha"] = torch.tensor(4.0)  # its rank
    save_file(renamed, file)
    os.utime(file, (1, 1))
    torch.testing.assert_close(pictures(executor.run(graph("lora"))), expected, atol=1e-4, rtol=0)
    assert "2" in executor.ran


def test_a_lora_is_fused_before_what_the_preset_does(comfyui, files, monkeypatch):
    host, executor, _ = comfyui
    write_lora(files / "models" / "loras" / "style.safetensors", 1)
    seen = []

    def optimize(pipe, *transforms, **settings):
        assert not any(pipe.get_list_adapters().values())
        seen.append((transforms, settings))
        return pipe

    monkeypatch.setattr(ernie_accel, "optimize", optimize)
    executor.run(graph("lora", preset="turbo-int8", memory="12GiB"))
    ((transforms, settings),) = seen
    assert transforms == (
        ernie_accel.CastDtype("bfloat16", keep_originals=False),
        ernie_accel.Quantize("int8", keep_originals=False),
    )
    assert settings == {"preset": "turbo-int8", "memory": None}  # ComfyUI runs on the CPU here
    monkeypatch.setattr(host.modules["comfy.model_management"], "get_torch_device", lambda: torch.device("meta"))
    executor.forget()
    monkeypatch.setattr(ernie_accel, "load", lambda *_, **__: tiny_ernie())
    executor.run(graph("lora", preset="turbo-int8", memory="12GiB"))
    executor.run(graph("lora", preset="none", memory="12GiB"))
    assert [settings for _, settings in seen[1:]] == [
        {"preset": "turbo-int8", "memory": "12GiB"},
        {"memory": "12GiB"},
    ]


def test_image_to_image_keeps_more_of_the_picture_the_less_strong(comfyui, files):
    _, executor, _ = comfyui
    original = OwnNodes["LoadImage"]().load("example.png")[0]
    near, far = (
        (pictures(executor.run(graph("image_to_image", strength=strength, steps=4))) - original).square().mean()
        for strength in (0.25, 1.0)
    )
    assert near < far


def test_a_mask_says_where_to_draw(comfyui, files):
    _, executor, _ = comfyui
    prompt = graph("image_to_image", strength=1.0)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1

    class Mask:
        RETURN_TYPES = ("MASK",)
        FUNCTION = "run"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def run(self):
            return (mask,)

    executor.classes["Mask"] = Mask
    prompt["3"]["inputs"]["mask"] = ["9", 0]
    prompt["9"] = {"class_type": "Mask", "inputs": {}}
    drawn = pictures(executor.run(prompt))
    original = OwnNodes["LoadImage"]().load("example.png")[0]
    assert torch.equal(drawn[:, :, :32], original[:, :, :32])
    assert not torch.equal(drawn[:, :, 32:], original[:, :, 32:])


# Batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_makes_its_pictures_and_goes_on_where_it_was(comfyui, files):
    _, executor, _ = comfyui
    shown = executor.run(graph("batch"))["2"]
    assert [each["filename"] for each in shown["images"]] == ["mug_0.png", "cup_1.png"]
    assert {each["subfolder"] for each in shown["images"]} == {"products"}
    assert (files / "output" / "products" / "report.html").is_file()
    assert shown["text"][0].startswith("max_concurrent has no effect without endpoint")
    assert "2 pictures made, 0 failed or rejected, 0 done before" in shown["text"][0]
    again = executor.run(graph("batch"))["2"]
    assert "0 pictures made, 0 failed or rejected, 2 done before" in again["text"][0]


def job(**changes):
    return json.dumps(json.loads(for_small(PROMPTS["batch"], "tiny", 64)["2"]["inputs"]["job"]) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_file": "../products.csv"}, "does not name a place in ComfyUI's the input folder"),
        ({"input_file": "/etc/passwd.csv"}, "does not name a place"),
        ({"output_dir": "a/../../b"}, "does not name a place"),
        ({"output_dir": "c:\\b"}, "does not name a place"),
        ({"image_root": "/"}, "does not name a place"),
        ({"model": "baidu/ERNIE-Image"}, "cannot have model: remove it"),
        ({"endpoint": "http://127.0.0.1:1"}, "cannot have endpoint"),
        ({"log_json": "/tmp/log"}, "cannot have log_json"),
        ({"batch_mode": "xml"}, "batch_mode is 'xml'; expected one of csv"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
    ],
)
def test_a_job_stays_in_comfyuis_folders(comfyui, files, changes, message):
    _, executor, _ = comfyui
    with pytest.raises(ValueError, match=message):
        executor.run(graph("batch", job=job(**changes)))
    assert not list((files / "output").iterdir())


def test_a_job_that_is_no_json_is_one_error(comfyui, files):
    _, executor, _ = comfyui
    for text in ("", "[]", "{", '{"input_file": 3}', "{" * 100_000):
        with pytest.raises(BatchInputError):
            executor.run(graph("batch", job=text))


# Evaluate ----------------------------------------------------------------------------------------------------------


def test_evaluate_compares_and_says_whether_it_passes(comfyui):
    _, executor, _ = comfyui
    executor.run(graph("evaluate", min_psnr_db=60.0))
    (pairs, report, passed) = executor._kept["2"][1]
    assert pairs.shape == (2, 64, 64, 3) and torch.equal(pairs[0], pairs[1])  # "exact" changes no bit
    assert passed is True and report.startswith("# Evaluation: passed")
    with pytest.raises(ValueError, match="there is no prompt"):
        executor.run(graph("evaluate", prompts=" \n"))


# Memory and interrupts ---------------------------------------------------------------------------------------------


def test_comfyui_knows_who_holds_the_card_and_takes_it_back(comfyui):
    host, executor, _ = comfyui
    executor.run(graph("text_to_image"))
    held = executor._kept["1"][1][0]
    assert host.unloads == 1 and [each.model.loaded_size() for each in host.loaded] == [1]
    host.unload_all_models()
    assert not held.is_loaded and host.loaded == []
    drawn = pictures(executor.run(graph("text_to_image", seed=5)))
    assert executor.ran == ["2", "3"] and held.loads == 2 and held.is_loaded
    assert drawn.isfinite().all()


def test_two_pipes_do_not_hold_the_card_together(comfyui):
    host, executor, _ = comfyui
    executor.run(graph("text_to_image"))
    first = executor._kept["1"][1][0]
    executor.run(graph("text_to_image", prompt_enhancer=False))
    assert not first.is_loaded and len(host.loaded) == 1


def test_what_the_graph_no_longer_has_is_let_go(comfyui):
    import gc
    import weakref

    _, executor, _ = comfyui
    executor.run(graph("text_to_image"))
    transformer = weakref.ref(executor._kept["1"][1][0].pipe().transformer)
    executor.forget()
    gc.collect()
    assert transformer() is None


def test_an_interrupt_ends_a_picture_within_a_step(comfyui):
    host, executor, _ = comfyui
    host.interrupt_after = 1
    with pytest.raises(InterruptProcessingException):
        executor.run(graph("text_to_image"))
    assert host.bars == [(1, 2)]
    assert pictures(executor.run(graph("text_to_image"))).isfinite().all()


def test_an_interrupt_ends_a_batch_in_order(comfyui, files):
    host, executor, _ = comfyui
    host.interrupt_after = 1
    with pytest.raises(InterruptProcessingException):
        executor.run(graph("batch", job=job(batch_size=1)))
    shown = executor.run(graph("batch", job=job(batch_size=1)))["2"]
    made, before = (int(shown["text"][0].splitlines()[-1].split()[place]) for place in (0, 7))
    assert made + before == 2 and before >= 1


# Mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"model": "/home/me/model"}, "does not name a place in ComfyUI's models/diffusers"),
        ({"model": "a/../../b"}, "without '..'"),
        ({"model": "nothing"}, "there is no 'nothing' in ComfyUI's models/diffusers.* a hub id, such as baidu"),
        ({"preset": "fastest"}, "'fastest' not in list"),
        ({"width": 4}, "out of range"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(comfyui, inputs, message):
    _, executor, _ = comfyui
    with pytest.raises(RefusedError, match=message):
        executor.run(graph("text_to_image", **inputs))
    assert executor.ran == []


def test_a_lora_that_does_not_fit_says_so(comfyui, files):
    from safetensors.torch import save_file

    _, executor, _ = comfyui
    save_file({"transformer.other.lora_A.weight": torch.ones(4, 4)}, files / "models" / "loras" / "style.safetensors")
    with pytest.raises(ErnieAccelError, match=r"style\.safetensors does not fit ErnieImagePipeline"):
        executor.run(graph("lora"))


@pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI names no checkout of ComfyUI")
def test_comfyui_itself_runs_the_examples():
    """COMFYUI is its folder; COMFYUI_PYTHON a Python that has its requirements and this library."""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    subprocess.run([python, "-m", "tools.comfyui.run", os.environ["COMFYUI"]], check=True)
