"""`BatchGuidance`: one batch of two where the pipeline calls its transformer twice, and never a wrong answer."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import ernie_accel
from ernie_accel import (
    BatchGuidance,
    CacheSteps,
    Call,
    CaptureGraphs,
    CheckFinite,
    Context,
    FuseKernels,
    RewriteBlocks,
    Transform,
)
from ernie_accel.memory.stages import activations_of
from tests.pipelines import interrupt_at, picture, tiny_ernie, tiny_flux, tiny_lumina2, tiny_newbie, tiny_z_image
from tests.test_fuse_kernels import sqnr_db
from tests.test_graphs import Recorder
from tests.test_rewrite_next_dit import LONG, lora, made

GUIDED: dict[str, Any] = {"guidance_scale": 4.0, "negative_prompt": LONG}
WITH_CUDNN = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})
WITHOUT_CUDNN = Context("cuda", "NVIDIA L4", (8, 9), versions={"triton": "3.6"})


def latents(pipe: Any, steps: int = 4, **call: Any) -> torch.Tensor:
    return picture(pipe, output_type="latent", steps=steps, **GUIDED | call)


def rewritten(*more: Transform, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return ernie_accel.optimize(made("lumina2", dtype), RewriteBlocks(), *more, **kwargs)


@contextlib.contextmanager
def rows_of(pipe: Any) -> Iterator[list[int]]:
    """Give the rows of each batch that a block within the transformer sees."""
    seen: list[int] = []
    hook = pipe.transformer.layers[0].register_forward_pre_hook(lambda block, given: seen.append(len(given[0])))
    try:
        yield seen
    finally:
        hook.remove()


def check(call: dict[str, Any], rows: list[int], steps: int = 4, hook: Any = None) -> None:
    """Hold a call to what rewritten blocks draw, and to the batches that it should make."""
    want, pipe = rewritten(), rewritten(BatchGuidance())
    for each in (want, pipe):
        if hook is not None:
            hook(each)
    expected = latents(want, steps, **call)
    with rows_of(pipe) as seen:
        got = latents(pipe, steps, **call)
    assert seen == rows
    assert (got - expected).norm() < 1e-5 * expected.norm()


def embedded(name: str, tokens: int) -> dict[str, torch.Tensor]:
    text = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(1))
    return {f"{name}_embeds": text, f"{name}_attention_mask": torch.ones(1, tokens, dtype=torch.long)}


@pytest.mark.parametrize(
    ("call", "rows"),
    [
        ({}, 2),
        ({"negative_prompt": None}, 2),
        ({"prompt": ["a red circle on blue", LONG]}, 4),
        ({"num_images_per_prompt": 3, "height": 96, "width": 32}, 6),
        ({"guidance_scale": 1.0}, 1),
        ({"prompt": None, "negative_prompt": None, **embedded("prompt", 9), **embedded("negative_prompt", 9)}, 2),
    ],
    ids=["plain", "no negative prompt", "unequal", "several", "unguided", "embedded"],
)
def test_both_halves_are_one_batch_from_the_first_step_on(call: dict[str, Any], rows: int) -> None:
    check(call, [rows] * 4)


def test_pictures_are_those_of_stock_and_restore_brings_stock_back() -> None:
    pipe = made("lumina2")
    expected = latents(pipe)
    got = latents(ernie_accel.optimize(pipe, RewriteBlocks(), BatchGuidance()))
    assert 0 < (got - expected).norm() < 1e-5 * expected.norm()
    assert "encode_prompt" in vars(pipe)
    assert torch.equal(latents(ernie_accel.restore(pipe)), expected)
    assert "encode_prompt" not in vars(pipe)
    assert "forward" not in vars(pipe.transformer)


def test_where_guidance_is_truncated_one_half_is_computed_for_nothing() -> None:
    check({"cfg_trunc_ratio": 0.5}, [2, 2, 2, 2, 1, 1], steps=6)


def test_guidance_that_comes_and_goes_wastes_no_more_than_two_halves() -> None:
    def toggle(pipe: Any, at: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if at % 2 == 0 else 4.0
        return tensors

    rows = [2, 2, 1, 1, 2, 1, 1, 1, 1, 1]  # at steps 1 and 3
    check({"callback_on_step_end": toggle}, rows, steps=7)


@pytest.mark.parametrize("in_place", [False, True])
def test_another_prompt_in_the_middle_of_a_picture_is_noticed(in_place: bool) -> None:
    def change(pipe: Any, at: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if at != 1:
            return {}
        text = tensors["prompt_embeds"]
        return {"prompt_embeds": text.mul_(0.5) if in_place else text * 0.5}

    given = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    check(given, [2, 2, 1, 1, 2, 2], steps=5)  # the first step with it shows what belongs together now


def scale_latents(pipe: Any, calls: list[Any], given: dict[str, Any]) -> None:
    if len(calls) % 2:
        given["hidden_states"].mul_(0.9)


def scale_negative_prompt(pipe: Any, calls: list[Any], given: dict[str, Any]) -> None:
    if len(calls) == 3:  # the second step's half has been computed, and waits
        calls[1]["encoder_hidden_states"].mul_(0.5)


def switch_adapters(pipe: Any, calls: list[Any], given: dict[str, Any]) -> None:
    if len(calls) == 1:
        pipe.transformer.disable_adapters()
    elif len(calls) == 2:
        pipe.transformer.enable_adapters()


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (scale_latents, [2, 1, 1, 1, 1, 1, 1, 1]),
        (scale_negative_prompt, [2, 2, 1, 1, 1, 2]),
        (switch_adapters, [2, 1, 1, 1, 2, 2]),
    ],
)
def test_what_changes_between_the_two_calls_of_a_step_counts(change: Any, rows: list[int]) -> None:
    def hook(pipe: Any) -> None:
        calls: list[dict[str, Any]] = []
        if change is switch_adapters:
            lora(pipe)

        def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls.append(kwargs)
            change(pipe, calls, kwargs)

        pipe.transformer.register_forward_hook(after, with_kwargs=True)

    check({}, rows, hook=hook)


def test_it_works_in_inference_mode() -> None:
    pipe = rewritten(BatchGuidance())
    expected = latents(pipe)
    with torch.inference_mode(), rows_of(pipe) as seen:
        got = latents(pipe)
    assert seen == [2] * 4
    assert torch.equal(got, expected)


def test_nothing_is_left_after_a_picture_and_after_an_interrupt() -> None:
    pipe = rewritten(BatchGuidance())
    expected = latents(pipe)
    state = dict(vars(pipe.transformer.forward))
    with pytest.raises(KeyboardInterrupt):
        latents(pipe, callback_on_step_end=interrupt_at(1))
    assert vars(pipe.transformer.forward) == state
    assert torch.equal(latents(pipe), expected)


def test_another_pipe_with_the_transformer_is_left_alone() -> None:
    pipe = rewritten(BatchGuidance())
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with rows_of(pipe) as seen:
        latents(other)
    assert seen == [1] * 8
    copied = copy.deepcopy(pipe)
    with rows_of(pipe) as seen, rows_of(copied) as theirs:
        assert torch.equal(latents(copied), latents(pipe))
    assert seen == theirs == [2] * 4


def test_what_is_captured_is_the_batch_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr("ernie_accel.models.replays.capture_cuda", recorder)
    expected = latents(rewritten())
    pipe = rewritten(BatchGuidance(), CaptureGraphs(), context=WITH_CUDNN)
    for _ in range(2):
        got = latents(pipe)
        assert (got - expected).norm() < 1e-5 * expected.norm()
    assert (recorder.captures, recorder.replays) == (1, 7)  # all but the very first step


@pytest.mark.parametrize(
    ("cache", "rows"), [(CacheSteps(), {2}), (CacheSteps(backend="diffusers", threshold=0.02), {1})], ids=str
)
def test_steps_are_cached_beside_it(cache: CacheSteps, rows: set[int]) -> None:
    expected, pipe = latents(rewritten(cache), 20), rewritten(cache, BatchGuidance())
    with rows_of(pipe) as seen:
        got = latents(pipe, 20)
    assert (got - expected).norm() < 1e-4 * expected.norm()
    assert set(seen) == rows


def test_a_call_made_again_in_float32_is_guided_too() -> None:
    pipe = rewritten(BatchGuidance(), CheckFinite(), dtype=torch.bfloat16)
    layer, bad = pipe.transformer.layers[0], [True]

    def once(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if bad and bad.pop() else output

    layer.register_forward_hook(once)
    with rows_of(pipe) as seen, pytest.warns(UserWarning, match="again in float32"):
        assert torch.isfinite(latents(pipe)).all()
    assert seen == [2] * 5


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_unequal_prompts_share_a_batch_by_lengths_and_without_a_mask(precision: str) -> None:
    pipe = made("lumina2", torch.bfloat16)
    expected = latents(pipe)
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels(precision), BatchGuidance(), context=WITH_CUDNN)
    masks: list[Any] = []
    pipe.transformer.layers[0].register_forward_pre_hook(lambda block, given: masks.append((given[1], given[-1])))
    got = latents(pipe)
    assert [(mask, len(lengths)) for mask, lengths in masks] == [(None, 2)] * 4
    floor = FuseKernels(precision).floor_db
    assert floor is not None
    assert sqnr_db(got, expected) > floor


@pytest.mark.parametrize(
    ("pipe", "transforms", "context", "note"),
    [
        (tiny_ernie, (), None, "nothing says that ERNIE-Image calls its transformer for each half of guidance"),
        (tiny_z_image, (), None, "nothing says that Z-Image calls"),
        (tiny_flux, (), None, "nothing says that FluxPipeline calls"),
        (tiny_newbie, (), None, "there are none for NewBie-image for NextDiT"),
        (tiny_lumina2, (), None, "add RewriteBlocks()"),
        (tiny_lumina2, (RewriteBlocks(),), None, ""),
        (tiny_lumina2, (RewriteBlocks(),), WITHOUT_CUDNN, "equally many tokens: others would need a mask"),
    ],
)
def test_what_it_needs_is_said(pipe: Any, transforms: Any, context: Context | None, note: str) -> None:
    step = ernie_accel.plan(pipe(), *transforms, BatchGuidance(), context=context).steps[-1]
    assert step.preview is not None
    assert note in step.preview.note
    assert bool(step.preview.changes) == (transforms != ())


def test_the_memory_of_both_halves_is_planned_for_where_they_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    sizes_only = mock.MagicMock(dtype=torch.float32)
    monkeypatch.setattr("ernie_accel.models.lumina.inputs.forward_inputs", lambda _, n, *size: rows.append(n) or {})
    monkeypatch.setattr("ernie_accel.memory.stages.peak_of", lambda part, run, tokens: run(sizes_only))
    monkeypatch.setattr("ernie_accel.memory.stages._language_models", {})
    both = (RewriteBlocks(), BatchGuidance())
    cases = [(made("lumina2"), both[:1]), (made("lumina2"), both), (rewritten(BatchGuidance()), ())]
    for (pipe, transforms), guidance in itertools.product(cases, (True, False)):
        call = Call(64, 64, pictures=3, guidance=guidance)
        activations_of(pipe, transforms, Context.named("cpu"), call)
    assert rows == [3, 3, 6, 3, 6, 3]
