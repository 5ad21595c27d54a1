"""Pipelines that make videos are refused before they are loaded or called, where pictures are wanted."""

from __future__ import annotations

import diffusers
import pytest

import ernie_accel
from ernie_accel.batch.engines.local import LocalEngine
from ernie_accel.core.outputs import require_pictures
from ernie_accel.storage.loading import load_pipeline
from tests.pipelines import tiny_ernie, tiny_wan

REFUSAL = "WanPipeline makes no pictures: its call takes num_frames"


def forbidden(*args, **kwargs):
    raise AssertionError("it was loaded or called")


@pytest.mark.parametrize("kind", ["plain", "saved"])
def test_a_folder_is_refused_before_its_weights_are_read(kind, tmp_path, monkeypatch):
    pipe = tiny_wan()
    if kind == "plain":
        pipe.save_pretrained(tmp_path / "wan")
    else:
        ernie_accel.save(pipe, tmp_path / "wan")
    for cls in (diffusers.WanTransformer3DModel, diffusers.AutoencoderKLWan):
        monkeypatch.setattr(cls, "from_pretrained", forbidden)
        monkeypatch.setattr(cls, "from_config", forbidden)
    with pytest.raises(ernie_accel.ErnieAccelError, match=REFUSAL):
        load_pipeline(str(tmp_path / "wan"), pictures=True)


def test_evaluate_and_batches_refuse_a_pipe_that_is_loaded(monkeypatch):
    pipe = tiny_wan()
    monkeypatch.setattr(diffusers.WanPipeline, "check_inputs", forbidden)
    for use in (lambda: ernie_accel.evaluate(pipe, "exact", prompts="a"), lambda: LocalEngine(pipe)):
        with pytest.raises(ernie_accel.ErnieAccelError, match=REFUSAL):
            use()
    with pytest.raises(ernie_accel.ErnieAccelError, match=REFUSAL):
        ernie_accel.evaluate(
            tiny_ernie, lambda: pipe, prompts="a red circle", num_inference_steps=1, height=64, width=64
        )


@pytest.mark.parametrize("name", ["StableVideoDiffusionPipeline", "LTXPipeline", "CogVideoXPipeline"])
def test_pipelines_for_videos_and_sound_are_told_apart(name):
    with pytest.raises(ernie_accel.ErnieAccelError, match=f"{name} makes no pictures"):
        require_pictures(getattr(diffusers, name))


@pytest.mark.parametrize("name", ["ErnieImagePipeline", "ZImagePipeline", "FluxPipeline", "QwenImageEditPipeline"])
def test_pipelines_for_pictures_pass(name):
    assert require_pictures(getattr(diffusers, name)) is None  # of others it raises an error
