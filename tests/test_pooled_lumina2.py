"""NewBie-image as diffusers' open pull request 12803 runs it: Lumina 2's transformer with a pooled prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import ernie_accel
from ernie_accel import BatchGuidance, BatchPromptEncoding, CaptureGraphs, Context, FuseKernels, RewriteBlocks
from ernie_accel.families import family_of
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.models.rewritten import inputs_of, rewritten_blocks, rewritten_model
from tests.examples import EXAMPLES
from tests.pipelines import picture, tiny_lumina2
from tests.pooled_lumina2 import as_in_the_request, tiny_pooled_lumina2
from tests.test_batch_guidance import rows_of
from tests.test_families import check_contract
from tests.test_fuse_kernels import sqnr_db
from tests.test_graphs import Recorder

H200 = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})
LONG = "a red circle on a blue square on " * 5
GUIDED: dict[str, Any] = {"guidance_scale": 4.0, "negative_prompt": LONG}


@pytest.fixture(autouse=True)
def request_12803(monkeypatch: pytest.MonkeyPatch) -> None:
    as_in_the_request(monkeypatch)


def latents(pipe: Any, **call: Any) -> torch.Tensor:
    return picture(pipe, output_type="latent", **call)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"prompt": ["a red circle on blue", LONG]},
        GUIDED,
        GUIDED | {"cfg_trunc_ratio": 0.5},
        {"num_images_per_prompt": 2, "height": 96, "width": 32},
    ],
)
def test_pictures_are_bitwise_those_of_stock(call: dict[str, Any]) -> None:
    pipe = tiny_pooled_lumina2()
    expected = latents(pipe, **call)
    ernie_accel.optimize(pipe, RewriteBlocks())
    assert rewritten_blocks(pipe).is_rewritten(pipe.transformer)
    assert torch.equal(latents(pipe, **call), expected)
    assert torch.equal(latents(ernie_accel.restore(pipe), **call), expected)


def test_the_pooled_prompt_counts() -> None:
    pipe = tiny_pooled_lumina2()
    expected = latents(pipe)
    pipe.text_encoder_2.embedding.weight.data += 1
    assert not torch.allclose(latents(pipe), expected)


def test_arguments_by_place_are_taken_in_the_order_of_the_class() -> None:
    pipe, generator = tiny_pooled_lumina2(), torch.Generator().manual_seed(0)
    noise, text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (4, 32), (16,)))
    given = (noise, torch.full((2,), 0.3), text, pooled, torch.ones(2, 4, dtype=torch.long))
    with torch.no_grad():
        expected = pipe.transformer(*given).sample
        ernie_accel.optimize(pipe, RewriteBlocks())
        assert torch.equal(pipe.transformer(*given).sample, expected)
        pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, Recorder())
        for _ in range(3):
            torch.testing.assert_close(pipe.transformer(*given).sample, expected, atol=2e-5, rtol=0)


def test_a_lumina_2_pipeline_without_a_pooled_prompt_is_rewritten_as_before() -> None:
    """Its transformer's forward takes one, and its embedding does not."""
    pipe = tiny_lumina2()
    assert rewritten_model(pipe) is None


def test_graphs_notice_another_pooled_prompt() -> None:
    pipe, stock, recorder = tiny_pooled_lumina2(), tiny_pooled_lumina2(), Recorder()
    ernie_accel.optimize(pipe, RewriteBlocks())
    pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, recorder)
    for call in ({}, GUIDED, {"prompt": "a"}):
        got, want = (latents(each, steps=4, **call) for each in (pipe, stock))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.full((1,), 0.3),
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.long),
    }
    with torch.no_grad():
        for value in (0.0, 1.0, 2.0):
            given["pooled_projections"] = torch.full((1, 16), value)
            got, want = (each.transformer(**given).sample for each in (pipe, stock))
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert recorder.replays > recorder.captures > 0


@pytest.mark.parametrize("graphs", [False, True])
def test_both_halves_of_guidance_are_one_batch(graphs: bool) -> None:
    pipe, stock = tiny_pooled_lumina2(), tiny_pooled_lumina2()
    expected = latents(stock, **GUIDED)
    with mock.patch("ernie_accel.models.replays.capture_cuda", Recorder()):
        more = (CaptureGraphs(),) if graphs else ()
        ernie_accel.optimize(pipe, RewriteBlocks(), *more, BatchGuidance(), context=H200 if graphs else None)
        if graphs:
            got = latents(pipe, **GUIDED)
        else:
            with rows_of(pipe) as seen:
                got = latents(pipe, **GUIDED)
            assert seen == [2, 2, 2]
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_on_the_kernels_it_keeps_the_floor_and_one_batch() -> None:
    pipe = tiny_pooled_lumina2()
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.to(torch.bfloat16)
    expected = latents(pipe, **GUIDED)
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels("fp8"), BatchGuidance(), context=H200)
    with rows_of(pipe) as seen:
        got = latents(pipe, **GUIDED)
    assert seen == [2, 2, 2]
    assert sqnr_db(got, expected) > 10


def test_what_a_step_needs_has_the_pooled_prompt() -> None:
    pipe = tiny_pooled_lumina2()
    make = inputs_of(family_of(pipe))
    assert make is not None
    given = make(pipe.transformer, 2, 64, 64, 5)
    assert given["pooled_projections"].shape == (2, 16)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert pipe.transformer(**given)[0].shape == (2, 4, 8, 8)


@pytest.mark.parametrize("folder", [False, True])
def test_each_text_is_encoded_once_by_both_encoders(folder: bool, tmp_path: Path) -> None:
    pipe = tiny_pooled_lumina2()
    prompts, seen = ["a red circle", "a", "a red circle"], []
    call: dict[str, Any] = {"prompt": prompts, "negative_prompt": "big", "guidance_scale": 4.0}
    expected = latents(pipe, **call)
    where = {"folder": str(tmp_path)} if folder else {}
    ernie_accel.optimize(pipe, BatchPromptEncoding(cache=8, **where))
    (entry,) = ernie_accel.report(pipe).entries
    assert entry.applied.changed[:2] == (
        "_get_gemma_prompt_embeds all texts -> each once",
        "_get_clip_prompt_embeds all texts -> each once",
    )
    features = type(pipe.text_encoder_2).get_text_features

    def counted(self: Any, input_ids: Any) -> torch.Tensor:
        seen.append(len(input_ids["input_ids"]))
        return features(self, input_ids)

    with mock.patch.object(type(pipe.text_encoder_2), "get_text_features", counted):
        for _ in range(2):
            got = latents(pipe, **call)
            assert (got - expected).norm() < 1e-5 * expected.norm()
        assert seen == [3]  # each of the two prompts and the negative one
        more = latents(pipe, **call | {"num_images_per_prompt": 2})
        assert seen == [3, 3, 3]  # several rows of each text are left to the pipeline
    assert more.isfinite().all()
    pipe.text_encoder_2.embedding.weight.data += 1
    assert not torch.allclose(latents(pipe, **call), got)
    ernie_accel.restore(pipe)
    pipe.text_encoder_2.embedding.weight.data -= 1
    torch.testing.assert_close(latents(pipe, **call), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform", EXAMPLES, ids=repr)
def test_every_transform_is_undone_bit_for_bit_or_refuses(transform: Any) -> None:
    check_contract(tiny_pooled_lumina2(), transform)
