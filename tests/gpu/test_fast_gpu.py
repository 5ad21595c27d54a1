"""The fast path on a GPU: rewriting, kernels and graphs draw what stock draws with the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import CaptureGraphs, FuseKernels, KeepTimestepsOnHost, RewriteBlocks, SwapScheduler
from ernie_accel.core.stand_in import standing_in
from ernie_accel.models.graphed_forward import FREE_FOR_MANY, GraphedForward, free_bytes
from ernie_accel.samplers.solvers import SCHEDULERS


@pytest.fixture
def pipe() -> Any:
    pipe = ernie_accel.demo.load(dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, prompt: Any = "a large red circle in the center on a grey background") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"height": 128, "width": 128, "num_inference_steps": 8, "guidance_scale": 1.0, "use_pe": False}
    return pipe(prompt, generator=generator, output_type="latent", **settings).images.float()  # type: ignore[no-any-return]


def sqnr_db(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (got - expected).norm()))


@pytest.mark.parametrize("prompt", ["a red circle", ["a red circle", "a large blue square on a grey background"]])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_kernels_keep_their_floor(pipe: Any, precision: str, prompt: Any) -> None:
    expected = latents(pipe, prompt)
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels(precision))
    floor = FuseKernels(precision).floor_db
    assert floor is not None
    assert sqnr_db(latents(pipe, prompt), expected) > floor
    ernie_accel.restore(pipe)
    assert torch.equal(latents(pipe, prompt), expected)


@pytest.mark.parametrize(
    "transforms", [(RewriteBlocks(),), (RewriteBlocks(), FuseKernels("fp8"))], ids=["blocks", "fp8"]
)
def test_replays_are_bitwise_the_same(pipe: Any, transforms: tuple[Any, ...]) -> None:
    ernie_accel.optimize(pipe, *transforms)
    expected = [latents(pipe, prompt) for prompt in ("a red circle", "a blue square on white", "a red circle")]
    ernie_accel.optimize(pipe, *transforms, CaptureGraphs())
    got = [latents(pipe, prompt) for prompt in ("a red circle", "a blue square on white", "a red circle")]
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize(("gib", "captured"), [(None, True), (6, False)])
def test_large_pictures_are_captured_where_there_is_memory(pipe: Any, gib: int | None, captured: bool) -> None:
    """A limit that a process has set for itself counts as the card's."""
    pytest.importorskip("cudnn")
    if captured and free_bytes(pipe.transformer.device) <= FREE_FOR_MANY:
        pytest.skip("too little memory is free")
    if gib is not None and not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        pytest.skip("this torch does not tell a process its limit")
    settings = {"height": 768, "width": 768, "num_inference_steps": 4, "guidance_scale": 1.0, "use_pe": False}

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn: torch.Tensor = pipe("a red circle", generator=generator, output_type="latent", **settings).images
        return drawn

    transforms = (RewriteBlocks(), FuseKernels("fp8"))
    ernie_accel.optimize(pipe, *transforms)
    expected = draw()
    ernie_accel.optimize(pipe, *transforms, CaptureGraphs())
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * 2**30 / total)
        assert torch.equal(draw(), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    graphed = standing_in(pipe.transformer, GraphedForward)
    assert graphed is not None
    assert (len(graphed._graphs) > 0) == captured


@pytest.mark.parametrize("preset", ["turbo-bf16", "turbo-fp8"])
def test_no_step_waits_for_the_device(pipe: Any, preset: str) -> None:
    ernie_accel.optimize(pipe, preset=preset)
    latents(pipe)  # compiles and captures

    watched: list[int] = []

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        watched.append(step)
        torch.cuda.set_sync_debug_mode("error" if step < 7 else "default")  # what waits raises
        return tensors

    try:
        pipe("a red circle", output_type="latent", use_pe=False, height=128, width=128, callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == list(range(8))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_on_the_host_change_no_bit_of_any_scheduler(pipe: Any, name: str) -> None:
    ernie_accel.optimize(pipe, SwapScheduler(name))
    expected = latents(pipe)
    ernie_accel.optimize(pipe, SwapScheduler(name), KeepTimestepsOnHost())
    assert torch.equal(latents(pipe), expected)
