"""diffusers' pipelines of Z-Image and Lumina 2, and NewBie-image by its shape: presets draw what stock draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

import ernie_accel
from ernie_accel import Context
from ernie_accel.core.transform import ROUNDING_REL
from ernie_accel.kernels.linear import Fp8Linear
from tests.examples import EXAMPLES
from tests.own_newbie import tiny_own_newbie
from tests.pipelines import PIPELINES, picture, tiny_lumina2, tiny_newbie
from tests.test_captured import Frozen
from tests.test_families import check_contract
from tests.test_fuse_kernels import sqnr_db
from tests.z_image_pipes import Z_IMAGE_PIPES, in_dtype

H200 = Context("cuda", "NVIDIA H200", (9, 0))
WITH_CUDNN = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})


PIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    **Z_IMAGE_PIPES,
    "Lumina2Pipeline": (tiny_lumina2, {}),
    "NewBie-image": (tiny_newbie, {}),
    "NewbiePipeline": (tiny_own_newbie, {}),
}


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    return picture(pipe, steps=2, guidance_scale=3.0, output_type="latent", **call)


def requests() -> Iterator[tuple[str, str]]:
    for name in PIPES:
        yield from ((name, "exact"), (name, "turbo-fp32"))
        yield name, "turbo-bf16" if name.startswith("ZImage") else "quality-bf16"


@pytest.mark.parametrize(("name", "preset"), requests())
def test_a_preset_draws_what_stock_draws(name: str, preset: str) -> None:
    make, call = PIPES[name]
    pipe = make()
    dtype = torch.bfloat16 if preset.endswith("bf16") else pipe.transformer.dtype
    before, expected = latents(pipe, call), latents(in_dtype(make(), dtype), call)
    with torch.compiler.set_stance("force_eager"):  # what is compiled is tested elsewhere, and takes long
        ernie_accel.optimize(
            pipe, preset=preset, context=H200 if preset == "exact" else None, on_unsupported="skip", memory=None
        )
        got = latents(pipe, call)
    statuses = {entry.step.transform.slot: entry.applied for entry in ernie_accel.report(pipe).entries}
    if preset != "exact" and name != "NewBie-image":
        assert statuses["blocks"] is not None
    if preset == "exact":
        assert torch.equal(got, expected)
    assert (got - expected).norm() <= ROUNDING_REL[str(dtype).removeprefix("torch.")] * expected.norm()
    assert torch.equal(latents(ernie_accel.restore(pipe), call), before)


@pytest.mark.parametrize("name", [name for name in PIPES if name != "NewBie-image"])
def test_fp8_on_the_kernels_keeps_its_floor(name: str) -> None:
    """By the kernels' twins; the guided ones draw both halves."""
    make, call = PIPES[name]
    pipe = in_dtype(make(), torch.bfloat16)
    expected, fuse = latents(pipe, call), ernie_accel.FuseKernels("fp8")
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), fuse, context=WITH_CUDNN)
    assert any(isinstance(part, Fp8Linear) for part in pipe.transformer.modules())
    got = latents(pipe, call)
    assert fuse.floor_db is not None
    assert sqnr_db(got, expected) > fuse.floor_db
    assert torch.equal(latents(ernie_accel.restore(pipe), call), expected)


@pytest.mark.parametrize("transform", EXAMPLES, ids=repr)
@pytest.mark.parametrize("name", [name for name, (make, _) in PIPES.items() if make not in PIPELINES.values()])
def test_every_transform_on_every_pipeline_is_undone_bit_for_bit_or_refuses(name: str, transform: Any) -> None:
    make, call = PIPES[name]
    check_contract(make(), transform, found=("a ControlNet", "weights are bfloat16"), **call)


@pytest.mark.parametrize("name", [name for name in PIPES if name != "NewBie-image"])
def test_a_plan_says_whose_calls_are_not_captured(name: str) -> None:
    """Graphs by a stand-in for CUDA."""
    make, call = PIPES[name]
    pipe, record, capture = make(), Frozen(), ernie_accel.CaptureGraphs()
    plan = ernie_accel.plan(pipe, ernie_accel.RewriteBlocks(), capture, context=H200)
    with mock.patch("ernie_accel.models.replays.capture_cuda", record):
        ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), capture, context=H200)
        picture(pipe, steps=6, output_type="latent", **call)
    assert (record.captures == 0) == ("are not captured" in str(plan))


@pytest.mark.parametrize("name", [name for name in PIPES if "ControlNet" in name])
def test_graphs_replay_what_a_controlnet_computed(name: str) -> None:
    """One serves other prompts, pictures and strengths of control; what is for other blocks gets another."""
    make, call = PIPES[name]
    stock, pipe, record = make(), make(), Frozen()
    other = call["control_image"].transpose(Image.Transpose.ROTATE_90)
    calls: list[dict[str, Any]] = [
        {},
        {"prompt": "three green squares"},
        {"control_image": other},
        {"controlnet_conditioning_scale": 0.3},
    ]
    with mock.patch("ernie_accel.models.replays.capture_cuda", record):
        ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), ernie_accel.CaptureGraphs(), context=H200)
        seen = []
        for change in calls:
            got = picture(pipe, steps=4, output_type="latent", **call | change)
            assert sqnr_db(got, picture(stock, steps=4, output_type="latent", **call | change)) > 100, change
            seen.append(got)
        assert record.captures == 1
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))
        for each in (stock, pipe):
            each.controlnet.control_layers_places = each.controlnet.config.control_layers_places = [0, 2]
        got = picture(pipe, steps=4, output_type="latent", **call)
        assert sqnr_db(got, picture(stock, steps=4, output_type="latent", **call)) > 100
        assert record.captures == 2 and not torch.equal(got, seen[0])
