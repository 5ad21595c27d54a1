"""`CaptureGraphs`: when it captures, replays and starts anew. A stand-in records calls instead of CUDA graphs."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel.core.undo import Undo
from ernie_accel.kernels import ops
from ernie_accel.models import graphed_forward
from ernie_accel.models.ernie_image import blocks as ernie_image_blocks
from ernie_accel.models.ernie_image import kernels as ernie_image_kernels
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.models.replays import Replays
from ernie_accel.models.token_layout import LAYOUT, PaddingRule
from tests.pipelines import after, picture, tiny_ernie, tiny_flux

H200 = ernie_accel.Context("cuda", "NVIDIA H200", (9, 0))


class Recorder:
    """Records like a CUDA graph: a replay reads the recorded tensors and overwrites the recorded output."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: Any, pool: Any) -> Any:
        self.captures += 1
        output = torch.full_like(work(), float("nan"))
        recorder = self

        class Graph:
            def pool(self) -> str:
                return "its memory"

            def replay(self) -> None:
                recorder.replays += 1
                output.copy_(work())

        return Graph(), output


@pytest.fixture
def graphed() -> Any:
    pipe = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks())
    recorder = Recorder()
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 64, 2, recorder)
    return pipe, recorder


def test_pictures_stay_the_same_and_steps_are_replayed(graphed: Any) -> None:
    pipe, recorder = graphed
    stock = tiny_ernie()
    calls = [
        {},
        {"prompt": "a"},
        {},
        {"guidance_scale": 4.0},
        {"height": 32},
        {"prompt": ["a", "a red circle"]},
    ]
    for call in calls:
        assert torch.equal(picture(pipe, steps=4, **call), picture(stock, steps=4, **call))
    assert recorder.captures == len(calls) - 1  # two shapes are kept: the third call finds the first one's graph
    assert recorder.replays == 3 * (len(calls) - 1) + 4
    picture(pipe, steps=4)  # its graph has been dropped since
    assert recorder.captures == len(calls)


def test_a_known_shape_is_replayed_from_the_first_step(graphed: Any) -> None:
    pipe, recorder = graphed
    picture(pipe, steps=4)
    picture(pipe, steps=4, seed=1)
    assert (recorder.captures, recorder.replays) == (1, 7)


def test_prompts_of_many_lengths_share_a_graph_where_they_are_padded() -> None:
    pipe, recorder = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks()), Recorder()
    ernie_image_kernels.install(pipe.transformer, Undo(), "bf16")
    prompts = ("a", "a red circle on blue", "a red circle", "a")
    expected = [picture(pipe, steps=4, prompt=prompt) for prompt in prompts]
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 64, 2, recorder)
    got = [picture(pipe, steps=4, prompt=prompt) for prompt in prompts]
    assert all(map(torch.equal, got, expected))
    assert (recorder.captures, recorder.replays) == (1, 15)


def test_a_length_that_needs_no_padding_shares_the_graph_of_those_that_do() -> None:
    pipe, recorder = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks()), Recorder()
    ernie_image_kernels.install(pipe.transformer, Undo(), "bf16")
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 64, 2, recorder)
    with torch.no_grad():
        for length in (5, 48, 9, 48):  # with 16 tokens of the image
            step = (torch.randn(1, 16, 4, 4), torch.full((1,), 500.0), torch.randn(1, length, 64))
            got = [pipe.transformer(*step, torch.tensor([length])).sample for _ in range(2)]
            expected = tiny_ernie().transformer(*step, torch.tensor([length])).sample
            assert all((each - expected).norm() < 1e-5 * expected.norm() for each in got)
    assert recorder.captures == 1


def test_the_first_step_plans_what_the_capture_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is padded, so outside of a graph attention would get no lengths; a plan cannot be made in a capture."""
    told, attention = [], ops.attention

    def noting(*arguments: Any) -> Any:
        told.append(arguments[-1] is not None)
        return attention(*arguments)

    monkeypatch.setattr(ops, "attention", noting)
    pipe = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks())
    ernie_image_kernels.install(pipe.transformer, Undo(), "bf16")
    step = torch.randn(1, 16, 4, 4), torch.full((1,), 500.0), torch.randn(1, 48, 64), torch.tensor([48])
    with torch.no_grad():
        pipe.transformer(*step)
        assert not any(told)
        told.clear()
        pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 64, 2, Recorder())
        pipe.transformer(*step)
        assert told and all(told)


def test_a_first_step_that_fails_is_not_taken_for_done(graphed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, recorder = graphed
    with monkeypatch.context() as patched:
        patched.setattr(pipe.transformer.layers[-1], "forward", None)
        with pytest.raises(TypeError):
            picture(pipe, steps=4)
    picture(pipe, steps=4)
    assert (recorder.captures, recorder.replays) == (1, 3)


def test_graphs_of_a_pipe_that_was_dropped_are_not_freed_in_a_capture() -> None:
    """CUDA would refuse that, and break the capture."""
    freed: list[bool] = []
    seen: list[int] = []

    class Dropped:
        def __del__(self) -> None:
            freed.append(True)

    def work() -> torch.Tensor:
        kept = [[i] for i in range(50_000)]  # enough for a search or two
        seen.append(len(freed))
        return torch.tensor(float(len(kept)))

    replays: Replays[None, torch.Tensor] = Replays(1, Recorder())
    replays.run("", work)
    gc.collect()
    dropped = Dropped()
    dropped.itself = dropped  # type: ignore[attr-defined]
    del dropped
    assert replays.run("", work) == 50_000
    assert seen[1] == 0  # the second time it was captured; the recorder does the work a third time to replay it
    gc.collect()
    assert freed
    assert gc.isenabled()


def test_the_graph_that_was_not_used_for_longest_goes() -> None:
    pipe, recorder = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks()), Recorder()
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 64, 2, recorder)
    for side, captures in ((32, 1), (64, 2), (32, 2), (48, 3), (32, 3), (64, 4)):
        picture(pipe, steps=3, height=side, width=side)
        assert recorder.captures == captures


def test_the_same_text_with_another_length_or_size_is_another_picture(graphed: Any) -> None:
    pipe, _ = graphed
    stock, text = tiny_ernie().transformer, torch.randn(2, 3, 64)
    with torch.no_grad():
        for side, lengths in ((4, (3, 3)), (4, (3, 2)), (4, (3, 3)), (2, (3, 3)), (4, (3, 2))):
            step = (torch.randn(2, 16, side, side), torch.full((2,), 500.0), text, torch.tensor(lengths))
            for _ in range(3):
                assert torch.equal(pipe.transformer(*step).sample, stock(*step).sample)


def test_positions_are_of_the_dtype_that_image_and_text_have_together() -> None:
    transformer = ernie_accel.optimize(tiny_ernie(dtype=torch.bfloat16), ernie_accel.RewriteBlocks()).transformer
    arguments = {"hidden_states": torch.randn(1, 16, 4, 4).bfloat16(), "text_lens": torch.tensor([3])}
    for dtype in (torch.float32, torch.bfloat16):
        text = torch.randn(1, 3, 64, dtype=dtype)
        assert ernie_image_blocks.prepare(transformer, arguments | {"text_bth": text})[1].cos_bs1d.dtype == dtype


def test_what_failed_to_be_prepared_is_prepared_again(graphed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = graphed
    stock, texts = tiny_ernie().transformer, [torch.randn(1, 3, 64) for _ in range(2)]
    step, length = (torch.randn(1, 16, 4, 4), torch.full((1,), 500.0)), torch.tensor([3])
    with torch.no_grad():
        for _ in range(3):
            pipe.transformer(*step, texts[0], length)
        with monkeypatch.context() as patched:
            patched.setattr(ernie_image_blocks, "prepare", None)
            with pytest.raises(TypeError):
                pipe.transformer(*step, texts[1], length)
        assert torch.equal(pipe.transformer(*step, texts[1], length).sample, stock(*step, texts[1], length).sample)


def test_graphs_made_in_inference_mode_serve_calls_outside_of_it(graphed: Any) -> None:
    pipe, recorder = graphed
    arguments = (torch.randn(1, 16, 4, 4), torch.full((1,), 500.0), torch.randn(1, 3, 64), torch.tensor([3]))
    with torch.inference_mode():
        for _ in range(3):
            expected = pipe.transformer(*arguments).sample
    with torch.no_grad():
        assert torch.equal(pipe.transformer(*arguments).sample, expected)
    assert recorder.captures == 1


def test_a_copy_of_the_pipe_has_graphs_of_its_own(graphed: Any) -> None:
    pipe, recorder = graphed
    expected = picture(pipe, steps=4)
    copied = copy.deepcopy(pipe)
    for parameter in pipe.transformer.parameters():
        parameter.data.zero_()
    copied.transformer.forward._capture = other = Recorder()
    copied.transformer.forward.forget()
    assert torch.equal(picture(copied, steps=4), expected)
    assert (recorder.captures, other.captures) == (1, 1)


def test_pictures_of_one_shape_may_take_turns(graphed: Any) -> None:
    """Each call may be of another picture: what one is known by must not be taken for the other's."""
    pipe, _ = graphed
    stock = tiny_ernie().transformer
    texts = [torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    lengths = [torch.tensor([3, 3]), torch.tensor([3, 2])]
    latents, timestep = torch.randn(2, 16, 4, 4), torch.full((2,), 500.0)
    with torch.no_grad():
        for turn in range(12):
            arguments = (latents, timestep, texts[turn % 2], lengths[turn // 2 % 2])
            assert torch.equal(pipe.transformer(*arguments).sample, stock(*arguments).sample)


def test_autocast_is_not_captured(graphed: Any) -> None:
    pipe, recorder = graphed
    without = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(picture(pipe, steps=4), picture(without, steps=4))
    assert recorder.captures == 0


def test_other_weights_are_noticed(graphed: Any) -> None:
    pipe, recorder = graphed
    stock = tiny_ernie()
    picture(pipe, steps=4)
    for part in (pipe.transformer.final_linear, stock.transformer.final_linear):
        part.weight = torch.nn.Parameter(part.weight.detach() * 2, requires_grad=False)
    assert torch.equal(picture(pipe, steps=4), picture(stock, steps=4))
    assert recorder.captures == 2


def test_large_images_run_as_before(graphed: Any) -> None:
    pipe, recorder = graphed
    assert torch.equal(picture(pipe, height=160, width=160), picture(tiny_ernie(), height=160, width=160))
    assert recorder.captures == 0


@pytest.mark.parametrize(
    ("attention", "free", "captures"), [("fp8", 9, 1), ("fp8", 7, 0), ("bf16", 9, 0), (None, 9, 0)]
)
def test_large_images_are_captured_only_in_fp8_and_with_free_memory(
    attention: str | None, free: int, captures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 a graph would attend by lengths, which takes longer; in fp8 every call does."""
    pipe, recorder = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks()), Recorder()
    if attention is not None:
        ernie_image_kernels.install(pipe.transformer, Undo(), "bf16")
    if attention == "fp8":  # which needs products in fp8, too
        rule = PaddingRule(64, "lengths", always_lengths=True)
        LAYOUT.required(pipe.transformer).padding_rule = lambda: rule
    expected = picture(pipe, steps=4, height=160, width=160)
    monkeypatch.setattr(graphed_forward, "FEW_TOKENS", 64)
    monkeypatch.setattr(graphed_forward, "MANY_TOKENS", 100)
    monkeypatch.setattr(graphed_forward, "free_bytes", lambda _: free * 2**30)
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, None, 2, recorder)
    assert torch.equal(picture(pipe, steps=4, height=160, width=160), expected)  # 100 tokens
    assert recorder.captures == captures
    picture(pipe, steps=4, height=176, width=160)
    assert recorder.captures == captures
    picture(pipe, steps=4, height=128, width=128)
    assert recorder.captures == captures + 1


def test_memory_that_is_free_later_counts_then(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, recorder = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks()), Recorder()
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, None, 2, recorder)
    monkeypatch.setattr(graphed_forward, "FEW_TOKENS", 1)
    rule = PaddingRule(64, "lengths", always_lengths=True)
    LAYOUT.required(pipe.transformer).padding_rule = lambda: rule
    for free, captures in ((7, 0), (9, 1), (7, 1)):  # the graph that is there is used
        monkeypatch.setattr(graphed_forward, "free_bytes", lambda _, free=free: free * 2**30)
        picture(pipe, steps=4)
        assert recorder.captures == captures


def test_a_capture_without_memory_is_given_up_and_the_picture_drawn() -> None:
    pipe, tries = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks()), 0

    def no_memory(work: Any, pool: Any) -> Any:
        nonlocal tries
        tries += 1
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 64, 2, no_memory)
    for _ in range(2):
        assert torch.equal(picture(pipe, steps=4), picture(tiny_ernie(), steps=4))
    assert tries == 1
    weight = next(pipe.transformer.parameters())
    before, weight.data = weight.data, weight.data.clone()  # a weight elsewhere: there may be room now
    picture(pipe, steps=4)
    assert tries == 2
    assert before.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(("fraction", "free"), [(0.5, 5), (1.0, 13), (None, 13)])
def test_free_memory_is_what_torch_could_still_give(
    fraction: float | None, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds and does not use counts, and a limit that the process has set for itself."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 5)
    if fraction is None:
        monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction", raising=False)
    else:
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction, raising=False)
    assert graphed_forward.free_bytes(torch.device("cuda", 0)) == free
    assert graphed_forward.free_bytes(torch.device("cpu")) == 0


def test_both_ways_of_returning_work(graphed: Any) -> None:
    pipe, _ = graphed
    arguments = (torch.randn(1, 16, 4, 4), torch.full((1,), 500.0), torch.randn(1, 3, 64), torch.tensor([3]))
    with torch.no_grad():
        expected = tiny_ernie().transformer(*arguments).sample
        for _ in range(3):
            assert torch.equal(pipe.transformer(*arguments).sample, expected)
        assert torch.equal(pipe.transformer(*arguments, return_dict=False)[0], expected)


def test_where_it_cannot_work_the_plan_says_why() -> None:
    capture = ernie_accel.CaptureGraphs()
    assert "need a CUDA device" in capture.preview(tiny_ernie(), ernie_accel.Context("cpu", "a test")).note
    assert "add RewriteBlocks()" in capture.preview(tiny_ernie(), H200).note
    assert "none for FluxPipeline" in capture.preview(tiny_flux(), H200).note
    pipe = tiny_ernie()
    rewritten = after(H200, pipe, ernie_accel.RewriteBlocks())
    assert capture.preview(pipe, rewritten).changes == ("transformer.forward",)
    autocast = after(rewritten, pipe, ernie_accel.Autocast("bfloat16"))
    assert "runs under autocast, here to bfloat16, is not captured" in capture.preview(pipe, autocast).note


def test_it_is_applied_and_undone() -> None:
    pipe = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks(), ernie_accel.CaptureGraphs(), context=H200)
    assert isinstance(pipe.transformer.forward, GraphedForward)
    assert ernie_accel.CaptureGraphs().preview(pipe, H200).changes == ()
    ernie_accel.restore(pipe)
    assert "forward" not in vars(pipe.transformer)


def test_weights_that_come_and_go_are_not_captured(graphed: Any) -> None:
    pipe, recorder = graphed
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(picture(pipe, steps=4), picture(tiny_ernie(), steps=4))
    assert recorder.captures == 0
