"""A folder from a stranger is only data: whatever names code, another place or an address is refused by its place."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
from diffusers import DiffusionPipeline

import ernie_accel
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.storage.loading import load_pipeline
from ernie_accel.storage.manifest import INDEX, files_of
from ernie_accel.storage.vetting import vet, vet_index
from tests.pipelines import picture, tiny_ernie, tiny_flux
from tests.saved_folders import change, edit_json


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A pipe with all its components, as `save` and as diffusers writes it."""
    place, pipe = tmp_path_factory.mktemp("originals"), tiny_ernie(enhancer=True)
    ernie_accel.save(pipe, place / "saved")
    pipe.save_pretrained(place / "plain")
    return place


@pytest.fixture(params=["saved", "plain"])
def folder(request, originals, tmp_path):
    return shutil.copytree(originals / request.param, tmp_path / request.param)


def read(folder):
    if folder.name == "saved":
        change(folder)
    return load_pipeline(str(folder), device="cpu")


def test_both_load_as_they_are(folder):
    pipe, original = read(folder), tiny_ernie(enhancer=True)
    pipe.set_progress_bar_config(disable=True)
    assert torch.allclose(picture(pipe), picture(original), atol=1e-5)  # mapped weights are aligned otherwise
    for name, part in original.components.items():
        assert type(pipe.components[name]) is type(part)
        if isinstance(part, torch.nn.Module):
            mine, theirs = pipe.components[name].state_dict(), part.state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


def test_a_plain_folder_loads_as_diffusers_loads_it(originals):
    folder = originals / "plain"
    ours, stock = load_pipeline(str(folder), device="cpu"), DiffusionPipeline.from_pretrained(folder)
    assert dict(ours.config) == dict(stock.config) | {"_name_or_path": str(folder)}
    assert ours.components.keys() == stock.components.keys()
    for name, part in stock.components.items():
        mine = ours.components[name]
        assert type(mine) is type(part)
        if isinstance(part, torch.nn.Module):
            assert str(mine.config) == str(part.config)
            assert (mine.dtype, mine.training) == (part.dtype, part.training)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"vae": ["h2.evil2", "Evil"]}, r"vae: h2.evil2.Evil is not of diffusers or transformers, which is never run"),
        ({"vae": ["os", "system"]}, "vae: os.system is not of diffusers or transformers"),
        ({"vae": ["transformers", "pipeline"]}, "vae: transformers.pipeline is no model, scheduler, tokenizer"),
        ({"vae": ["diffusers", "DiffusionPipeline"]}, "is no model, scheduler, tokenizer or processor"),
        ({"vae": ["diffusers", "AutoModel"]}, "is no model, scheduler, tokenizer or processor"),
        ({"vae": ["diffusers", "OnnxRuntimeModel"]}, "is no model, scheduler, tokenizer or processor"),
        ({"vae": ["diffusers", "utils.logging"]}, "is no model, scheduler, tokenizer or processor"),
        ({"vae": ["diffusers", None]}, "diffusers.None is no model"),
        ({"vae": ["pipeline_utils", "DiffusionPipeline"]}, "is no model"),
        ({"vae": ["../../etc", "x"]}, "is not of diffusers or transformers"),
        ({"vae": ["cosmos", "CosmosSafetyChecker"]}, "is not of diffusers or transformers"),
        ({"text_encoder": ["transformers", "RagModel"]}, r"RagModel is not among the models.*known=\(RagModel,\)"),
        ({"text_encoder": ["transformers", "TimmWrapperModel"]}, "is not among the models"),
        ({"tokenizer": ["transformers", "AutoTokenizer"]}, "is no model, scheduler, tokenizer or processor"),
        ({"tokenizer": ["transformers", "BertJapaneseTokenizer"]}, "is not among the models"),
        ({"vae": [["diffusers"], "AutoencoderKL"]}, r"vae: expected \[library, class\]"),
        ({"vae": ["diffusers"]}, r"vae: expected \[library, class\]"),
        ({"vae": {"path": "/etc"}}, "vae: expected a plain value"),
        ({"../../etc": ["diffusers", "AutoencoderKL"]}, r"has no part '../../etc'"),
        ({"self": ["diffusers", "AutoencoderKL"]}, "has no part 'self'"),
        ({"safety_checker": ["diffusers", "AutoencoderKL"]}, "has no part 'safety_checker'"),
        ({"_class_name": ["pipeline", "Mine"]}, r"needs \['pipeline', 'Mine'\], which is not a pipeline"),
        (
            {"_class_name": "NewbiePipeline"},
            "the diffusers installed here: upgrade .* and pass it to optimize",
        ),
        ({"_class_name": "AutoencoderKL"}, "which is not a pipeline of the diffusers installed here"),
        ({"_class_name": "DiffusionPipeline"}, "needs DiffusionPipeline, which is not loaded from folders"),
        ({"_class_name": "CosmosTextToWorldPipeline"}, "is not loaded from folders"),
        ({"_class_name": "FluxPipeline"}, "a FluxPipeline has no part 'pe'"),
        ({"_class_name": None}, "needs None"),
    ],
)
def test_an_odd_index_is_refused(entry, says, folder):
    edit_json(folder / INDEX, **entry)
    with pytest.raises(SavedPipelineError, match=says) as caught:
        read(folder)
    assert caught.value.folder == str(folder)


def test_an_index_without_a_part_is_refused(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["vae"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(SavedPipelineError, match="a ErnieImagePipeline needs vae as well"):
        read(folder)


@pytest.mark.parametrize(
    ("file", "settings", "says"),
    [
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map: names code of the checkp"),
        ("text_encoder/config.json", {"text_config": {"auto_map": {"AutoModel": "a--b.C"}}}, "text_config.auto_map"),
        ("text_encoder/config.json", {"attn_implementation": "kernels-community/x"}, "attn_implementation: names"),
        ("text_encoder/config.json", {"_attn_implementation": "flash_attention_2"}, "expected eager or sdpa"),
        ("text_encoder/config.json", {"vision_config": {"attn_implementation": {"": "a/b"}}}, "expected eager or sdpa"),
        ("text_encoder/config.json", {"vision_config": {"model_type": "timm_wrapper"}}, "names 'timm_wrapper'"),
        ("text_encoder/config.json", {"vision_config": [{"model_type": "rag"}]}, "vision_config.0.model_type"),
        ("text_encoder/config.json", {"backbone": "resnet50"}, "backbone: names another model"),
        ("text_encoder/config.json", {"use_timm_backbone": True}, "fetches a model of timm"),
        ("text_encoder/config.json", {"pretrained_cfg": {}}, "names a model of timm"),
        ("text_encoder/config.json", {"configuration_files": ["config.4.0.0.json"]}, "names another file"),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "fp8"}}, "asks for 'fp8'"),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "x", "load_in_4bit": True}}, "asks for"),
        ("text_encoder/config.json", {"quantization_config": "fp8"}, "asks for 'fp8'"),
        ("transformer/config.json", {"quantization_config": {"quant_method": "nunchaku"}}, "asks for 'nunchaku'"),
        ("transformer/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "names code"),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["e.E", None]}}, "names code"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}, "tokenizer_file: names '/etc/passwd'"),
        ("tokenizer/tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/x"}}, "sp_model_kwargs.model_file"),
        ("tokenizer/tokenizer_config.json", {"vocab": "/etc/passwd"}, "vocab: names"),
        ("tokenizer/special_tokens_map.json", {"tokenizer_file": "/etc/passwd"}, "tokenizer_file: names"),
        ("tokenizer/special_tokens_map.json", {"auto_map": {"AutoTokenizer": ["e.E", None]}}, "names code"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_path": "/x/tekken.json"}, "tokenizer_path: names"),
        ("text_encoder/config.json", {"text_config": {"index_path": "/x"}}, "text_config.index_path: names"),
        ("tokenizer/tokenizer_config.json", {"gguf_file": "x.gguf"}, "gguf_file: names another file"),
        ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["../t.1.json"]}, "names another file"),
        ("pe/generation_config.json", {"custom_generate": "a/b"}, "names code"),
    ],
)
def test_settings_that_are_more_than_data_are_refused_by_their_place(file, settings, says, folder):
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit_json(folder / file, **settings)
    with pytest.raises(SavedPipelineError, match=f"{file}: .*{says}|{file}: {says}"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("text_encoder/custom_generate/generate.py", "holds text_encoder/custom_generate, which is never run"),
        ("text_encoder/adapter_config.json", "holds text_encoder/adapter_config.json"),
        ("vae/diffusers.py", "holds vae/diffusers.py"),
        ("vae/sub/config.json", "holds vae/sub"),
    ],
)
def test_files_that_a_library_would_run_are_refused(name, says, originals, tmp_path):
    folder = shutil.copytree(originals / "plain", tmp_path / "plain")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(SavedPipelineError, match=says):
        read(folder)


@pytest.mark.parametrize("name", ["None.py", "pipeline.py", "ErnieImagePipeline.py", "README.md", "modeling.py"])
def test_scripts_beside_the_index_are_not_read(name, originals, tmp_path):
    folder = shutil.copytree(originals / "plain", tmp_path / "plain")
    (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    read(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../../x.safetensors", "/etc/passwd", "a/b.safetensors", None])
def test_shards_elsewhere_are_refused(shard, originals, tmp_path):
    folder = shutil.copytree(originals / "plain", tmp_path / "plain")
    (folder / "vae" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(SavedPipelineError, match=r"vae/x.safetensors.index.json: weight_map: expected names of files"):
        read(folder)


def test_weights_are_read_from_safetensors_only(originals, tmp_path):
    folder = shutil.copytree(originals / "plain", tmp_path / "plain")
    for name, file in (("vae", "diffusion_pytorch_model.bin"), ("pe", "pytorch_model.bin")):
        (folder / name / file).write_bytes(b"\x80\x04cos\nsystem\n")
        for weights in (folder / name).glob("*.safetensors"):
            weights.unlink()
        with pytest.raises(SavedPipelineError, match=f"{name} cannot be made from its files.*safetensors"):
            read(folder)
        shutil.copytree(originals / "plain" / name, folder / name, dirs_exist_ok=True)


def test_links_out_of_a_folder_are_refused_and_others_work(folder):
    secret = folder.parent / "secret.json"
    shutil.copy(folder / "vae" / "config.json", secret)
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to(secret)
    with pytest.raises(SavedPipelineError, match=r"vae/config.json is a link out of the folder; put a copy"):
        load_pipeline(str(folder), device="cpu")
    secret.rename(folder / "inside.json")
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to("../inside.json")
    load_pipeline(str(folder), device="cpu")


def test_a_linked_component_is_a_link_too(folder):
    shutil.move(folder / "vae", folder.parent / "vae")
    (folder / "vae").symlink_to(folder.parent / "vae")
    with pytest.raises(SavedPipelineError, match="vae is a link out of the folder"):
        load_pipeline(str(folder), device="cpu")


def test_the_hubs_cache_is_made_of_links_and_loads(folder, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = shutil.copytree(folder, cache / "snapshots" / "0123" / "below")
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(cache / "blobs" / str(number))
        path.symlink_to(cache / "blobs" / str(number))
    assert load_pipeline(str(snapshot), device="cpu").vae is not None


def test_a_pipe_without_some_parts_and_with_settings_loads(tmp_path):
    pipe = tiny_flux()
    pipe.save_pretrained(tmp_path / "plain")
    index = vet(tmp_path / "plain")
    assert index.parts["text_encoder"] is None and index.parts["vae"].__name__ == "AutoencoderKL"
    again = load_pipeline(str(tmp_path / "plain"), device="cpu")
    assert {name for name, part in again.components.items() if part is None} == {
        name for name, part in pipe.components.items() if part is None
    }
    assert again.config["_name_or_path"] == str(tmp_path / "plain")


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b'{"a":' * 100_000, b"", None])
def test_a_broken_file_of_settings_is_one_error(content, folder):
    file = folder / "vae" / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SavedPipelineError, match="vae"):
        read(folder)


DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
FLOW, KL = [DIFFUSERS, "FlowMatchEulerDiscreteScheduler"], [DIFFUSERS, "AutoencoderKL"]
#: What published checkpoints say of themselves.
PUBLISHED = {
    "FluxPipeline": {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": FLOW,
        "text_encoder": [TRANSFORMERS, "CLIPTextModel"],
        "text_encoder_2": [TRANSFORMERS, "T5EncoderModel"],
        "tokenizer": [TRANSFORMERS, "CLIPTokenizer"],
        "tokenizer_2": [TRANSFORMERS, "T5TokenizerFast"],
        "transformer": [DIFFUSERS, "FluxTransformer2DModel"],
        "vae": KL,
    },
    "StableDiffusionPipeline": {
        "feature_extractor": [TRANSFORMERS, "CLIPFeatureExtractor"],
        "requires_safety_checker": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": [DIFFUSERS, "PNDMScheduler"],
        "text_encoder": [TRANSFORMERS, "CLIPTextModel"],
        "tokenizer": [TRANSFORMERS, "CLIPTokenizer"],
        "unet": [DIFFUSERS, "UNet2DConditionModel"],
        "vae": KL,
    },
    "ZImagePipeline": {
        "scheduler": FLOW,
        "text_encoder": [TRANSFORMERS, "Qwen3Model"],
        "tokenizer": [TRANSFORMERS, "Qwen2Tokenizer"],
        "transformer": [DIFFUSERS, "ZImageTransformer2DModel"],
        "vae": KL,
    },
    "Lumina2Pipeline": {
        "scheduler": FLOW,
        "text_encoder": [TRANSFORMERS, "Gemma2Model"],
        "tokenizer": [TRANSFORMERS, "GemmaTokenizerFast"],
        "transformer": [DIFFUSERS, "Lumina2Transformer2DModel"],
        "vae": KL,
    },
    "QwenImagePipeline": {
        "scheduler": FLOW,
        "text_encoder": [TRANSFORMERS, "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": [TRANSFORMERS, "Qwen2Tokenizer"],
        "transformer": [DIFFUSERS, "QwenImageTransformer2DModel"],
        "vae": [DIFFUSERS, "AutoencoderKLQwenImage"],
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_pass(name, tmp_path):
    index = {"_class_name": name, "_diffusers_version": "0.30.0", "_name_or_path": "someone/something"}
    (tmp_path / INDEX).write_text(json.dumps(index | PUBLISHED[name]))
    found = vet_index(tmp_path)
    assert found.pipeline_class.__name__ == name
    assert found.parts.keys() | found.settings.keys() == PUBLISHED[name].keys()


def test_of_a_hub_id_only_the_index_and_its_parts_are_fetched(originals, tmp_path, monkeypatch):
    """Neither scripts nor pickles, nor copies in other precisions, nor anything that a refused index names."""
    import huggingface_hub

    repository = shutil.copytree(originals / "plain", tmp_path / "repository")
    others = "None.py", "vae/diffusers.py", "vae/x.bin", "vae/x.fp16.safetensors", "unused/config.json", "x.safetensors"
    for name in others:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    fetched = tmp_path / "models--a--b" / "snapshots" / "0123"

    def snapshot_download(model, *, allow_patterns, ignore_patterns=()):
        assert model == "a/b"
        for path in repository.rglob("*"):
            name = path.relative_to(repository).as_posix()
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_file() and wanted and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, fetched / name)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_pipeline("a/b", device="cpu")
    assert files_of(fetched).keys() == files_of(originals / "plain").keys()
    shutil.rmtree(fetched)
    edit_json(repository / INDEX, vae=["evil_module", "Evil"])
    with pytest.raises(ernie_accel.ErnieAccelError, match=r"evil_module\.Evil is not of diffusers"):
        load_pipeline("a/b", device="cpu")
    assert [path.name for path in fetched.iterdir()] == [INDEX]
