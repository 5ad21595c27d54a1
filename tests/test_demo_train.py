"""The trainer runs every stage at toy size, is repeatable, and takes up what an earlier run has finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tools.embedded_model import architecture, train
from tools.embedded_model.corpus import CaptionedScenes, captioned_scenes, dialogues
from tools.embedded_model.train import TOY, Recipe, main, train_enhancer

from ernie_accel.demo.judge import unseen_prompts
from ernie_accel.embedded.scenes import CANVASES, all_backgrounds
from ernie_accel.storage.embedded import load_folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("toy")
    main(["--toy", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return architecture.build_tokenizer(architecture.corpus(0, 500))


def test_a_toy_run_leaves_a_pipeline_that_draws(out: Path) -> None:
    pipe = load_folder(out / "model")
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe("red circle", height=128, width=128, num_inference_steps=2, guidance_scale=1.0, use_pe=False)
    assert pictures.images[0].size == (128, 128)
    assert (out / "sheet.png").exists()


def test_a_toy_run_leaves_a_config_that_every_supported_transformers_reads(out: Path) -> None:
    config = json.loads((out / "model" / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert config["vision_config"]["rope_parameters"]["rope_type"] == "default"


def test_a_toy_run_leaves_its_figures(out: Path) -> None:
    record = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    assert record["recipe"]["dit_steps"] == TOY.dit_steps
    assert {"hardware", "versions", "parameters", "stored_bytes", "stage_seconds"} <= record.keys()
    assert record["figures"]["adherence_8_steps"]["pictures"] == TOY.eval_prompts


def test_resuming_trains_nothing_again(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("evaluate", "save_sheet", "_write_figures"):  # as at the end of the first run
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    monkeypatch.delattr(train, "captioned_scenes")
    stages = {f: f.read_bytes() for f in (out / "stages").iterdir() if f.is_file()}
    assert len(stages) == 3 + len(CANVASES)
    main(["--toy", "--resume", "--out", str(out)])
    assert capsys.readouterr().out.count("from an earlier run") == 3
    assert all(f.read_bytes() == before for f, before in stages.items())


@pytest.mark.slow
def test_the_data_do_not_depend_on_the_workers(tokenizer: Any) -> None:
    def flat(data: CaptionedScenes) -> list[torch.Tensor]:
        return [data.scenes.objects, data.scenes.background, data.tokens, data.lengths]

    here, there = (captioned_scenes(tokenizer, (128, 128), 6, 2, workers) for workers in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(flat(here), flat(there), strict=True))


def test_training_captions_are_of_the_scenes_beside_them(tokenizer: Any) -> None:
    data = captioned_scenes(tokenizer, (160, 128), 40, 2, 0)
    for row, background in enumerate(data.scenes.background.tolist()):
        text = tokenizer.decode(data.tokens[row, 0, : data.lengths[row, 0]], skip_special_tokens=True).lower()
        colours = [list(architecture_colours())[c] for c in data.scenes.objects[row, :, 0].tolist() if c >= 0]
        if len(text.split()) > 8:  # a full English caption, not a short prompt
            assert all(any(word in text for word in architecture_colours()[c]) for c in colours), text
            tint = all_backgrounds()[background].tint.replace("pale ", "")
            assert tint in text


def architecture_colours() -> dict[str, tuple[str, ...]]:
    from ernie_accel.embedded.scenes import COLOURS

    return {c: {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}.get(c, (c,)) for c in COLOURS}


def test_the_enhancer_learns(tokenizer: Any) -> None:
    """A few steps on a handful of dialogues lower the loss, the same way each time."""
    tokenizer.chat_template = architecture.CHAT_TEMPLATE
    lessons = dialogues(tokenizer, 8, 0)
    assert lessons.is_answer.any(1).all()
    recipe = replace(TOY, pe_steps=15, pe_batch=8)

    def trained() -> Any:
        torch.manual_seed(0)
        enhancer = architecture.build_prompt_enhancer()
        train_enhancer(enhancer, lessons, recipe)
        return enhancer.eval()

    def loss(enhancer: Any) -> float:
        ids = lessons.tokens.long()
        with torch.no_grad():
            errors = torch.nn.functional.cross_entropy(
                enhancer(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
            )
        return float(errors[lessons.is_answer[:, 1:]].mean())

    torch.manual_seed(0)
    untrained = loss(architecture.build_prompt_enhancer().eval())
    first = trained()
    assert loss(first) < untrained - 1
    again = trained()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_the_full_recipe_never_measures_what_it_trained_on() -> None:
    assert Recipe().eval_prompts == 1000
    assert len(unseen_prompts(50)) == 50
