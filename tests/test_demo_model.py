"""The embedded model is a true ERNIE-Image pipeline, small, offline, and does what it is asked."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tools.embedded_model.evaluate import enhancer_success, expand

import ernie_accel.demo
from ernie_accel.core.outputs import images_of
from ernie_accel.demo.judge import adherence, judge
from ernie_accel.embedded import MODEL_FOLDER
from ernie_accel.embedded.captions import RequestedObject, SceneRequest, language_of, parse

LEAST_ADHERENCE = 0.95
MOST_BYTES = 16_000_000
COMPONENTS = {
    "transformer": "ErnieImageTransformer2DModel",
    "vae": "AutoencoderKLFlux2",
    "text_encoder": "Mistral3Model",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "pe": "Ministral3ForCausalLM",
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = ernie_accel.demo.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_component_is_of_its_true_class_in_float32(pipe: Any) -> None:
    assert type(pipe).__name__ == "ErnieImagePipeline"
    assert {name: type(getattr(pipe, name)).__name__ for name in COMPONENTS} == COMPONENTS
    parts = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.pe]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_another_dtype_and_no_enhancer() -> None:
    pipe = ernie_accel.demo.load(torch.bfloat16, prompt_enhancer=False)
    assert pipe.pe is None and pipe.pe_tokenizer is None
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_loading_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert ernie_accel.demo.load().transformer is not None


def test_the_folder_is_small_and_holds_safetensors_and_text_only() -> None:
    files = [f for f in MODEL_FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= MOST_BYTES
    assert {f.suffix for f in files} == {".safetensors", ".json", ".jinja"}


def test_every_supported_transformers_reads_the_text_encoders_config() -> None:
    """transformers before 5.17 refuses the RoPE type "axial", which 5.17 began to write; "default" is read by all."""
    config = json.loads((MODEL_FOLDER / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert config["vision_config"]["rope_parameters"]["rope_type"] == "default"


def test_weights_are_finite_and_widths_suit_groups_of_32() -> None:
    for file in MODEL_FOLDER.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert all(torch.isfinite(tensors.get_tensor(name)).all() for name in tensors.keys())  # noqa: SIM118
    config = json.loads((MODEL_FOLDER / "transformer/config.json").read_text(encoding="utf-8"))
    widths = [config[k] for k in ("hidden_size", "ffn_hidden_size", "text_in_dim", "in_channels")]
    assert all(w % 32 == 0 for w in widths)
    assert sum(config["rope_axes_dim"]) == config["hidden_size"] // config["num_attention_heads"]


def test_pictures_hold_what_unseen_prompts_ask_for(pipe: Any) -> None:
    found = adherence(pipe, n=24, steps=8)
    assert found.object_fraction >= LEAST_ADHERENCE, found
    assert found.by_attribute["background"] >= LEAST_ADHERENCE


@pytest.mark.parametrize(
    ("prompt", "use_guidance"),
    [
        (
            "a large red circle at the top left and a small blue square at the right on a cream background",
            True,
        ),
        ("左上角有一个红色的大圆形，右边有一个蓝色的小正方形，浅粉色背景", False),
    ],
)
def test_both_languages_and_guidance(pipe: Any, prompt: str, use_guidance: bool) -> None:
    scene = parse(prompt, (128, 160))
    assert scene is not None
    made = pipe(
        prompt,
        height=128,
        width=160,
        num_inference_steps=8,
        guidance_scale=2.0 if use_guidance else 1.0,
        generator=torch.Generator().manual_seed(0),
        use_pe=False,
    )
    assert judge(made.images, [scene])[0].is_right


def test_a_prompts_picture_does_not_depend_on_its_neighbours(pipe: Any) -> None:
    """Padding must not leak: alone, or beside a much longer prompt, the picture is the same."""
    short = "a small red ring in the center on a plain white background"
    long = "there is a large blue cross at the top left. there is a small green circle at the right. " * 1
    long += "there is a large black square at the bottom. there is a checked grey background."
    options = {"height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 1.0, "use_pe": False}
    noise = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    alone = images_of(pipe([short], generator=noise[:1], output_type="pt", **options))[0]
    noise = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    together = images_of(pipe([short, long], generator=noise, output_type="pt", **options))[0]
    torch.testing.assert_close(alone, together, atol=2e-3, rtol=0)


@pytest.mark.parametrize("prompt", ["red circle", "红色圆形"])
def test_the_default_path_expands_a_short_prompt(pipe: Any, prompt: str) -> None:
    request = SceneRequest(prompt, (RequestedObject(colour="red", shape="circle"),))
    torch.manual_seed(0)
    made = pipe(prompt, height=128, width=128, num_inference_steps=8, guidance_scale=1.0)
    revised = made.revised_prompts[0]
    scene = parse(revised)
    assert request.is_kept_by(scene), revised
    assert language_of(revised) == language_of(prompt)
    assert scene is not None and judge(made.images, [scene])[0].objects[0].is_right


def test_the_enhancer_expands_and_keeps(pipe: Any) -> None:
    figures = enhancer_success(pipe, 40, seed=1)
    for language in ("en", "zh"):
        assert figures["expanded"][language] >= 0.95, figures["failures"]
        assert figures["kept"][language] >= 0.95, figures["failures"]


def test_expanding_leaves_the_global_random_state(pipe: Any) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert expand(pipe, ["two circles"], seed=3) == expand(pipe, ["two circles"], seed=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["tokenizer", "pe_tokenizer"])
@pytest.mark.parametrize(
    "text",
    ["a small red circle", "左上角有一个红色的大圆形", '{"prompt": "x", "width": 128}', "🎉 ünï\n\tçødé", ""],
)
def test_tokenizers_lose_nothing(pipe: Any, name: str, text: str) -> None:
    tokenizer = getattr(pipe, name)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) > 1 or text == ""
