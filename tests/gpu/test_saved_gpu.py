"""Folders of `save` on a CUDA device: read straight onto it, or placed within a budget; the same bits."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import Call, CastDtype, FuseKernels, Quantize, Residency, RewriteBlocks
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.kernels import cudnn_attention
from ernie_accel.memory.planner import plan_memory
from ernie_accel.storage import meanwhile, read_ahead, reading
from ernie_accel.transforms.weights.residency import least_weights
from tests.pipelines import picture, tiny_ernie
from tests.test_saving import assert_same_bits, bits

SMALL = Call(64, 64, prompt_tokens=16)
ENCODER = Quantize("fp8-weight-only", components=("text_encoder",))
FP8 = (CastDtype("bf16"), RewriteBlocks(), FuseKernels("fp8", attention="bf16"), ENCODER)


@pytest.fixture
def saved(tmp_path):
    """A pipe on kernels, and the folder that it was saved to."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs capability 8.9")
    pipe = tiny_ernie(layers=6).to("cuda")
    ernie_accel.optimize(pipe, *FP8)
    return pipe, ernie_accel.save(pipe, tmp_path / "saved")


def test_it_comes_back_bit_equal_on_the_device(saved):
    pipe, folder = saved
    again = ernie_accel.load(folder, device="cuda")
    assert {tensor.device.type for tensor in bits(again).values()} == {"cuda"}
    assert_same_bits(
        {name: t.cpu() for name, t in bits(pipe).items()}, {name: t.cpu() for name, t in bits(again).items()}
    )
    assert torch.equal(picture(again), picture(pipe))


def test_it_is_placed_within_a_budget(saved):
    pipe, folder = saved
    before, planned = picture(pipe), PlannedPipe.of(pipe)
    found = plan_memory(pipe, (), None, ernie_accel.Context.detect(), "auto", SMALL)
    budget = found.needed - (planned.nbytes - least_weights(pipe, planned)) // 2
    again = ernie_accel.load(folder, memory=budget, call=SMALL)
    assert Residency in {type(entry.step.transform) for entry in ernie_accel.report(again).entries}
    for _ in range(2):
        assert torch.equal(picture(again), before)


def test_it_is_read_ahead_for_whichever_stream_and_device_are_current(saved):
    pipe, folder = saved
    expected, last = picture(pipe).cpu(), torch.device("cuda", torch.cuda.device_count() - 1)
    for device in {torch.device("cuda", 0), last}:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            again = ernie_accel.load(folder, device="cuda")
            assert {tensor.device for tensor in bits(again).values()} == {device}
            assert torch.equal(picture(again).cpu(), expected)


def test_what_was_read_for_nothing_leaves_no_memory(saved, monkeypatch):
    _, folder = saved
    begun = []

    def refuse(*args):
        wait_until_read(begun[0])
        raise SavedPipelineError(folder, "names what is not data")

    def wait_until_read(ahead):
        for started in ahead._started.values():
            started.result()
        for reader in ahead._readers.values():
            for _, parts in reader._pending.values():
                for part in parts:
                    part.result()

    class Watched(read_ahead.ReadAhead):
        def __enter__(self):
            begun.append(self)
            return self

    monkeypatch.setattr(meanwhile, "_start_to_wake", lambda device: None)  # which takes memory of its own
    monkeypatch.setattr(reading, "ReadAhead", Watched)
    monkeypatch.setattr(reading, "vet", refuse)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with pytest.raises(SavedPipelineError, match="names what is not data"):
        ernie_accel.load(folder, device="cuda")
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("scheme", ["fp8", "int8", "nf4"])
def test_quantized_layers_are_mapped_whatever_device_they_run_on(scheme, tmp_path):
    pipe = tiny_ernie(layers=3, dtype=torch.bfloat16).to("cuda")
    ernie_accel.optimize(pipe, Quantize(scheme), on_unsupported="skip")
    before = picture(pipe)
    again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"), call=SMALL)
    assert torch.equal(picture(again), before)


def test_plans_of_attention_are_bounded_and_graphs_replay_after_many_of_them(saved):
    pytest.importorskip("cudnn")
    pipe, _ = saved
    ernie_accel.optimize(pipe, *FP8, ernie_accel.CaptureGraphs())
    expected = [picture(pipe, width=64, height=64) for _ in range(3)][-1]
    for width in range(16, 16 * 90, 16):
        x = torch.randn(1, width, 2, 64, dtype=torch.bfloat16, device="cuda")
        cudnn_attention.attention(x, x, x, None)
    assert len(cudnn_attention._PLANS) <= cudnn_attention._KEEP
    assert torch.equal(picture(pipe, width=64, height=64), expected)
