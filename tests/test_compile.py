"""Regional compilation: one graph for every prompt length, taken back without a trace."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing

import ernie_accel
from ernie_accel import Compile, Context, ErnieAccelError, Offload, Quantize
from ernie_accel.core.planned import Blocks
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


@pytest.fixture
def both(ernie):
    """A pipe whose text encoder declares its blocks, as some pipelines' do."""
    ernie.text_encoder._repeated_blocks = ["Ministral3DecoderLayer"]
    return ernie


BOTH = {
    "transformer": ("transformer.layers.0", "transformer.layers.1"),
    "text_encoder": tuple(f"text_encoder.language_model.layers.{i}" for i in range(3)),
}


@pytest.mark.parametrize("components", [("transformer",), ("text_encoder",), ("text_encoder", "transformer")], ids=str)
def test_the_components_that_were_asked_for_are_compiled_and_no_others(both, components):
    expected = tuple(name for component in components for name in BOTH[component])
    assert ernie_accel.plan(both, Compile(components=components)).steps[0].preview.changes == expected
    ernie_accel.optimize(both, Compile(components=components))
    parts = {
        f"{component}.{path}": part for component in BOTH for path, part in getattr(both, component).named_modules()
    }
    compiled = {name for name, part in parts.items() if part._compiled_call_impl is not None}
    assert compiled == set(expected) == set(ernie_accel.report(both).entries[0].applied.changed)
    ernie_accel.restore(both)
    assert all(part._compiled_call_impl is None for part in parts.values())


def test_a_component_that_cannot_be_compiled_is_named_whatever_the_others_are(ernie):
    plan = ernie_accel.plan(ernie, Compile(components=("transformer", "text_encoder", "unet")))
    assert [reason.partition(";")[0] for reason in plan.steps[0].reasons] == [
        "ErnieImagePipeline has no component 'unet'"
    ]
    plan = ernie_accel.plan(ernie, Compile(components=("transformer", "text_encoder", "vae")))
    assert plan.steps[0].reasons == tuple(
        f"{name} declares no repeated blocks to compile (_repeated_blocks)"
        for name in ("Mistral3Model", "AutoencoderKLFlux2")
    )


@pytest.mark.parametrize(
    ("components", "left"),
    [
        (("transformer",), ("transformer",)),
        (("text_encoder",), ()),
        (("transformer", "text_encoder"), ("transformer",)),
    ],
    ids=str,
)
def test_only_blocks_that_run_on_fused_kernels_are_left_to_them(both, components, left):
    context = Context.named("h200")
    context = replace(context, state=replace(context.planned(both), blocks=Blocks.KERNELS))
    preview = Compile(components=components).preview(both, context)
    assert preview.changes == tuple(name for each in components if each not in left for name in BOTH[each])
    assert ("fused kernels, which need no compiling" in preview.note) == bool(left)
    assert ("the first picture compiles" in preview.note) == bool(preview.changes)


def test_layers_that_break_graphs_are_a_reason_for_their_component_only(both):
    """quanto's int4 in bfloat16 cannot be traced."""
    both.transformer.bfloat16(), both.text_encoder.bfloat16()
    int4 = Quantize("int4", backend="quanto", components=("text_encoder",), exclude=())
    for components, reasons in ((("transformer",), 0), (("text_encoder",), 1), (("transformer", "text_encoder"), 1)):
        step = ernie_accel.plan(both, int4, Compile(components=components)).steps[1]
        assert len(step.reasons) == reasons, components
        assert all("cannot be traced: take another backend" in reason for reason in step.reasons)
        broken = ernie_accel.plan(both, int4, Compile(components=components, fullgraph=False))
        assert broken.steps[1].reasons == ()


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


CPU = torch.device("cpu")
HOOKED = {
    "enable_group_offload": {"onload_device": CPU, "offload_device": CPU, "offload_type": "leaf_level"},
    "enable_layerwise_casting": {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32},
}


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_a_full_graph_cannot_have_are_refused_whichever_comes_first(flux, name):
    enable = functools.partial(getattr(type(flux.transformer), name), **HOOKED[name])
    with pytest.raises(ErnieAccelError, match=rf"{name}\(\): its blocks are compiled as full graphs"):
        getattr(ernie_accel.optimize(flux, Compile()).transformer, name)(**HOOKED[name])
    assert not any(hasattr(part, "_diffusers_hook") for part in flux.transformer.modules())
    enable(ernie_accel.restore(flux).transformer)
    (reason,) = Compile().unsupported(flux, Context.named("cpu"))
    assert reason.startswith(f"{name}() attaches hooks")
    assert Compile(fullgraph=False).unsupported(flux, Context.named("cpu")) == []


def test_group_offloading_that_is_planned_is_refused_beside_full_graphs(flux):
    plan = ernie_accel.plan(flux, Offload("group"), Compile(), context=Context("cuda", "NVIDIA H200", (9, 0)))
    assert "Offload('group') attaches hooks" in str(plan)
