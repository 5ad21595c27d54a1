"""Regional compilation: one graph for every prompt length, taken back without a trace."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import ernie_accel
from ernie_accel import Compile
from tests.pipelines import tiny_ernie

counter = torch._dynamo.testing.CompileCounter


def forward(pipe, text_length, batch=1):
    return pipe.transformer(
        hidden_states=torch.randn(batch, 16, 4, 4, generator=torch.Generator().manual_seed(0)),
        timestep=torch.full((batch,), 500.0),
        text_bth=torch.randn(batch, text_length, 64, generator=torch.Generator().manual_seed(1)),
        text_lens=torch.full((batch,), text_length),
        return_dict=False,
    )[0]


@pytest.fixture
def graphs(monkeypatch):
    """Count graphs: the compiler is replaced by one that runs them as they are."""
    torch._dynamo.reset()
    count = counter()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **(k | {"backend": count, "mode": None})))
    yield count
    torch._dynamo.reset()


def test_one_graph_serves_all_blocks_and_twelve_prompt_lengths(graphs):
    pipe = tiny_ernie(layers=3)
    ernie_accel.optimize(pipe, Compile())
    with torch.no_grad():
        for length in (1, 2, 3, 5, 8, 13, 21, 34, 40, 50, 55, 60):
            forward(pipe, length)
        assert graphs.frame_count == 1
        forward(pipe, 9, batch=2)
        forward(pipe, 11, batch=3)
        assert graphs.frame_count == 2


def test_state_dict_keys_stay(ernie):
    keys = list(ernie.transformer.state_dict())
    ernie_accel.optimize(ernie, Compile())
    assert list(ernie.transformer.state_dict()) == keys


def test_blocks_compiled_before_are_left_alone(ernie):
    block = ernie.transformer.layers[0]
    block.compile()
    theirs = block._compiled_call_impl
    ernie_accel.optimize(ernie, Compile())
    (entry,) = ernie_accel.report(ernie).entries
    assert entry.applied.changed == ("transformer.layers.1",)
    assert entry.applied.skipped == {"transformer.layers.0": "was compiled before"}
    ernie_accel.restore(ernie)
    assert block._compiled_call_impl is theirs


def test_global_settings_stay_as_they_were(ernie):
    import torch._inductor.config as inductor

    before = (inductor.coordinate_descent_tuning, torch._dynamo.config.recompile_limit, inductor.max_autotune)
    ernie_accel.optimize(ernie, Compile())
    assert (inductor.coordinate_descent_tuning, torch._dynamo.config.recompile_limit, inductor.max_autotune) == before


@pytest.mark.parametrize(("mode", "meant"), [("max-autotun", "max-autotune"), ("reduce_overhead", "reduce-overhead")])
def test_a_mode_that_torch_does_not_have_is_refused_when_it_is_written(mode, meant):
    with pytest.raises(ernie_accel.UnknownNameError, match=f"Unknown mode {mode!r}. Did you mean {meant!r}"):
        Compile(mode=mode)


def test_every_mode_of_torch_can_be_asked_for():
    from torch._inductor import list_mode_options

    assert all(Compile(mode=mode).mode == mode for mode in list_mode_options())
