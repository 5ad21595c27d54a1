"""NewBie-image on its authors' own code: what of it is known, what is left to the stock forward, and its adapters.

What it has in common with Z-Image and Lumina 2 is in `test_rewrite_next_dit.py` and `test_fuse_next_dit.py`.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ernie_accel
from ernie_accel import (
    BatchGuidance,
    CacheSteps,
    Context,
    FreeAfterUse,
    FuseKernels,
    Quantize,
    RewriteBlocks,
    Transform,
    TruncatePrompts,
)
from ernie_accel.core.undo import Undo
from ernie_accel.families import families, family_of
from ernie_accel.kernels.linear import Fp8Linear
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.models.rewritten import inputs_of, kernels_of, rewritten_blocks, rewritten_model
from tests import own_newbie
from tests.own_newbie import NextDiT_CLIP, tiny_own_newbie
from tests.pipelines import picture, randomize
from tests.test_fuse_kernels import sqnr_db
from tests.test_graphs import Recorder

H200 = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})
LONG = "a red circle on a blue square on " * 5


def arguments(lengths: tuple[int, ...] = (5, 3), size: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the arguments of a forward, with a time and a pooled text of its own for each row."""
    generator, rows = torch.Generator().manual_seed(1), len(lengths)
    mask = (torch.arange(max(8, *lengths)) < torch.tensor(lengths)[:, None]).long()
    made = {
        "x": torch.randn(rows, 4, size, 8, generator=generator),
        "t": torch.linspace(0.2, 0.7, rows),
        "cap_feats": torch.randn(*mask.shape, 32, generator=generator),
        "clip_text_pooled": torch.randn(rows, 16, generator=generator),
    }
    return {name: value.to(dtype) for name, value in made.items()} | {"cap_mask": mask}


def both(pipe: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """Return what stock predicts, and what the rewritten blocks do; they stay."""
    with torch.no_grad():
        expected = pipe.transformer(**given)
        ernie_accel.optimize(pipe, RewriteBlocks())
        return expected, pipe.transformer(**given)


# ---- a third family is data, and few lines ---------------------------------------------------------------------------


def test_a_third_family_is_data_and_at_most_300_lines() -> None:
    """Every line counts: empty ones, docstrings and comments, too."""
    source = Path(ernie_accel.__file__).parent
    models = sum(len(path.read_text("utf-8").splitlines()) for path in (source / "models" / "newbie").glob("*.py"))
    text = (source / "families" / "newbie.py").read_text("utf-8")
    (data,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["_OWN_CODE"]
    )
    assert data.end_lineno is not None
    assert models > 0
    assert models + data.end_lineno - data.lineno + 1 <= 300


# ---- what is known ---------------------------------------------------------------------------------------------------


def test_the_family_is_that_of_the_weights_with_what_is_known_of_the_code() -> None:
    pipe = tiny_own_newbie()
    family, (known,) = family_of(pipe), (each for each in families() if each.name == "NewBie-image")
    assert family in known.other_codes
    assert (family.name, family.modes, family.keep_precise) == (known.name, known.modes, known.keep_precise)
    assert family.guidance_calls is None
    for transform in (BatchGuidance(), CacheSteps()):
        assert ernie_accel.plan(pipe, transform, context=H200).ok


class OtherForward(NextDiT_CLIP):
    def forward(self, x: Any, t: Any, cap_feats: Any, cap_mask: Any, **kwargs: Any) -> Any:
        return super().forward(x, t, cap_feats * 2, cap_mask, **kwargs)


class OtherArguments(NextDiT_CLIP):
    def forward(self, x: Any, t: Any, cap_feats: Any, cap_mask: Any, style: Any = None, **kwargs: Any) -> Any:
        return super().forward(x, t, cap_feats, cap_mask, **kwargs)


class OtherPatches(own_newbie.NextDiT_CLIP_CNN):
    pass


OtherArguments.__name__ = OtherPatches.__name__ = "NextDiT_CLIP"  # as a fork might, whose parts tell it apart


def more_parts() -> Any:
    pipe = tiny_own_newbie()
    pipe.transformer.style_embedder = nn.Linear(2, 2)
    return pipe


def of_class(cls: type[NextDiT_CLIP]) -> Any:
    pipe = tiny_own_newbie()
    pipe.transformer.__class__ = cls
    return pipe


@pytest.mark.parametrize(
    ("make", "whose"),
    [
        (partial(of_class, own_newbie.NextDiT_CLIP_CNN), "for NextDiT_CLIP_CNN"),
        (partial(of_class, OtherForward), "for OtherForward"),
        (partial(of_class, OtherArguments), "for NextDiT_CLIP"),
        (partial(of_class, OtherPatches), "for NextDiT_CLIP"),
        (more_parts, "for NextDiT_CLIP"),
    ],
)
def test_a_variant_of_the_class_stays_as_it_is(make: Callable[[], Any], whose: str) -> None:
    pipe = make()
    before = picture(pipe)
    assert family_of(pipe).name == "NewBie-image"
    (step,) = ernie_accel.plan(pipe, RewriteBlocks()).steps
    assert step.preview.note == f"NewBie-image: no rewritten blocks {whose}"
    ernie_accel.optimize(pipe, RewriteBlocks())
    assert rewritten_model(pipe) is None
    assert torch.equal(picture(pipe), before)


def test_fp8_of_a_variant_is_quantizing() -> None:
    pipe = of_class(own_newbie.NextDiT_CLIP_CNN)
    steps = ernie_accel.plan(pipe, preset="quality-fp8", context=H200).steps
    assert [repr(each.transform) for each in steps if each.transform.slot == "quantize"] == ["Quantize('fp8')"]


class OtherAttention(own_newbie.JointAttention):
    def forward(self, x: Any, x_mask: Any, freqs_cis: Any, window: int = 0) -> Any:
        return super().forward(x, x_mask, freqs_cis)


def _other_attention(block: Any) -> None:
    block.attention.__class__ = OtherAttention


def _gated_attention(block: Any) -> None:
    block.attention.gate = nn.Linear(2, 2)


def _unnormed(block: Any) -> None:
    block.attention.q_norm = nn.Identity()


def _other_feed_forward(block: Any) -> None:
    block.feed_forward.w4 = nn.Linear(2, 2)


def _other_block(block: Any) -> None:
    block.cross_attention = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_other_attention, "OtherAttention"),
        (_gated_attention, "JointAttention"),
        (_unnormed, "Identity"),
        (_other_feed_forward, "FeedForward"),
        (_other_block, "JointTransformerBlock"),
    ],
)
def test_blocks_of_code_that_is_not_known_are_refused_by_name(change: Callable[[Any], None], name: str) -> None:
    pipe = tiny_own_newbie()
    change(pipe.transformer.layers[1])
    (reason,) = RewriteBlocks().unsupported(pipe, Context("cpu", "a test"))
    assert reason == f"its blocks have parts of code that is not known here: {name}"


# ---- what is left to the stock forward -------------------------------------------------------------------------------


def test_images_of_several_sizes_in_one_batch_are_those_of_stock() -> None:
    given = arguments()
    given["x"] = [given["x"][0], given["x"][1][:, :4]]
    expected, got = both(tiny_own_newbie(), given)
    assert [each.shape for each in got] == [(4, 8, 8), (4, 4, 8)]
    assert all(map(torch.equal, got, expected))


def test_prompts_that_begin_with_padding_are_those_of_stock() -> None:
    given = arguments()
    given["cap_mask"] = given["cap_mask"].flip(1)
    expected, got = both(tiny_own_newbie(), given)
    assert torch.equal(got, expected)


def test_one_time_for_all_rows_is_that_of_stock() -> None:
    given = arguments()
    given["t"] = given["t"][:1]
    del given["clip_text_pooled"]
    expected, got = both(tiny_own_newbie(), given)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)  # its modulation is computed for each row


@pytest.mark.parametrize("lengths", [(5, 3), (8, 8), (0, 3), (0,)])
@pytest.mark.parametrize("pooled", [True, False])
def test_prompts_of_any_length_are_those_of_stock(lengths: tuple[int, ...], pooled: bool) -> None:
    given = arguments(lengths)
    if not pooled:
        del given["clip_text_pooled"]
    expected, got = both(tiny_own_newbie(), given)
    assert torch.isfinite(expected).all()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("changed", [{"t": torch.tensor(0.3)}, {"clip_img_pooled": torch.ones(2, 16)}])
def test_what_stock_cannot_compute_fails_as_in_stock(changed: dict[str, Any]) -> None:
    """A time without dimensions, and a pooled picture, for which the class has no layer."""
    pipe, given = tiny_own_newbie(), arguments() | changed
    with pytest.raises((IndexError, AttributeError)) as stock:
        pipe.transformer(**given)
    ernie_accel.optimize(pipe, RewriteBlocks())
    with pytest.raises(stock.type) as rewritten:
        pipe.transformer(**given)
    assert str(rewritten.value) == str(stock.value)


@pytest.mark.parametrize("case", ["sizes", "padding first", "one time"])
def test_the_stock_forward_runs_on_the_kernels_too(case: str) -> None:
    given = arguments()
    if case == "sizes":
        given["x"] = [given["x"][0], given["x"][1][:, :4]]
    elif case == "padding first":
        given["cap_mask"] = given["cap_mask"].flip(1)
    else:
        given["t"] = given["t"][:1]
        del given["clip_text_pooled"]
    pipe = tiny_own_newbie()
    expected, _ = both(pipe, given)
    assert kernels_of(pipe).install(pipe.transformer, Undo(), "bf16") == {}
    with torch.no_grad():
        got = pipe.transformer(**given)
    for one, other in zip(got, expected, strict=True):
        assert sqnr_db(one, other) > 95


# ---- guidance and graphs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [{}, {"cfg_trunc": 0.4}, {"renorm_cfg": False, "negative_prompt": LONG}])
def test_guidance_within_the_transformer_uses_the_rewritten_forward(call: dict[str, Any]) -> None:
    pipe = tiny_own_newbie()
    seen: list[Any] = []
    expected = picture(pipe, guidance_scale=4.0, output_type="latent", **call)
    ernie_accel.optimize(pipe, RewriteBlocks())
    pipe.transformer.layers[0].register_forward_pre_hook(lambda block, given: seen.append(len(given[0])))
    assert torch.equal(picture(pipe, guidance_scale=4.0, output_type="latent", **call), expected)
    assert seen == ([2, 2, 1] if "cfg_trunc" in call else [2, 2, 2])


def test_a_pooled_text_that_changes_is_noticed_by_graphs() -> None:
    """The captions may be the same tensor: what is pooled is another argument."""
    pipe, stock, recorder = tiny_own_newbie(), tiny_own_newbie(), Recorder()
    ernie_accel.optimize(pipe, RewriteBlocks())
    pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, recorder)
    given = arguments()
    with torch.no_grad():
        for _ in range(3):
            given["clip_text_pooled"] = given["clip_text_pooled"] + 1
            got, want = pipe.transformer(**given), stock.transformer(**given)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        del given["clip_text_pooled"]
        for _ in range(2):
            torch.testing.assert_close(pipe.transformer(**given), stock.transformer(**given), atol=2e-5, rtol=0)
        replays = recorder.replays
        given["cap_mask"] = given["cap_mask"].flip(1)
        torch.testing.assert_close(pipe.transformer(**given), stock.transformer(**given), atol=2e-5, rtol=0)
    assert replays > 0
    assert recorder.replays == replays  # what stock has to compute is not captured


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_makes_no_tables_which_a_graph_could_not_copy_from_the_host() -> None:
    pipe, given = tiny_own_newbie(), arguments()
    with torch.no_grad(), Operators() as stock:
        expected = pipe.transformer(**given)
    ernie_accel.optimize(pipe, RewriteBlocks())
    text, at = rewritten_blocks(pipe).prepare(pipe.transformer, given)
    with torch.no_grad(), Operators() as step:
        (got,) = pipe.transformer(**{**given, "cap_feats": text}, at=at)
    assert torch.equal(got, expected)
    assert stock.seen >= {"arange", "exp"}
    assert not step.seen & {"arange", "exp", "lift_fresh"}


def test_another_embedding_of_the_time_is_not_taken_for_the_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_own_newbie()
    embedder = pipe.transformer.t_embedder
    known = type(embedder).timestep_embedding
    assert rewritten_model(pipe) is not None
    monkeypatch.setattr(type(embedder), "timestep_embedding", staticmethod(lambda t, dim: known(t, dim, 1000)))
    assert rewritten_model(pipe) is None


def test_a_hook_on_the_embedding_of_the_time_runs() -> None:
    pipe, given, seen = tiny_own_newbie(), arguments(), list[Any]()
    ernie_accel.optimize(pipe, RewriteBlocks())
    pipe.transformer.t_embedder.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        pipe.transformer(**given)
    assert seen == [pipe.transformer.t_embedder]


def test_arguments_by_place_are_taken_by_graphs() -> None:
    pipe, given = tiny_own_newbie(), arguments()
    ernie_accel.optimize(pipe, RewriteBlocks())
    expected = pipe.transformer(**given)
    pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, Recorder())
    with torch.no_grad():
        for _ in range(3):
            places = (given["x"], given["t"], given["cap_feats"], given["cap_mask"])
            got = pipe.transformer(*places, clip_text_pooled=given["clip_text_pooled"])
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_arguments_that_are_too_many_or_given_twice_fail_as_in_stock() -> None:
    pipe, given = tiny_own_newbie(), arguments()
    ernie_accel.optimize(pipe, RewriteBlocks())
    pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, Recorder())
    places = (given["x"], given["t"], given["cap_feats"], given["cap_mask"])
    with pytest.raises(TypeError, match=r"got 5 arguments by place; expected \(x, t, cap_feats, cap_mask\)"):
        pipe.transformer(*places, given["clip_text_pooled"])
    with pytest.raises(TypeError, match="got 4 arguments by place, and by name, too: t;"):
        pipe.transformer(*places, t=given["t"])


def test_what_has_to_happen_before_the_transformer_happens_though_no_hook_of_a_module_runs() -> None:
    """`forward_with_cfg` calls ``self.forward(...)``; offloading waits for the transformer to begin."""
    pipe, seen = tiny_own_newbie(), list[Any]()
    expected = picture(pipe)

    def hook(module: nn.Module, *_: object) -> None:
        seen.append(module)

    with Undo() as undo:
        undo.hook_before_forward(pipe.transformer, hook)
        undo.hook_before_forward(pipe.transformer, hook)
    assert torch.equal(picture(pipe, steps=3), expected)
    assert seen == [pipe.transformer] * 6
    copied = copy.deepcopy(pipe)
    copied.transformer.forward_with_cfg(**arguments(), cfg_scale=2.0, renorm_cfg=0)
    assert seen[6:] == [copied.transformer] * 2
    undo()
    assert "forward_with_cfg" not in vars(pipe.transformer)
    assert torch.equal(picture(pipe), expected)
    assert len(seen) == 8


def test_the_text_encoder_is_freed_once_the_transformer_begins() -> None:
    pipe = tiny_own_newbie()
    expected, sizes = picture(pipe), list[int]()
    ernie_accel.optimize(pipe, RewriteBlocks(), FreeAfterUse())
    layer = pipe.text_encoder.layers[0].mlp.up_proj
    pipe.transformer.layers[0].register_forward_pre_hook(lambda *given: sizes.append(layer.weight.numel()))
    got = picture(pipe)
    assert set(sizes) == {0}
    assert torch.equal(got, expected)


def test_few_graphs_of_compiled_blocks_serve_all_prompt_lengths() -> None:
    torch._dynamo.reset()
    pipe, counted = ernie_accel.optimize(tiny_own_newbie(), RewriteBlocks()), list[Any]()
    for name in rewritten_blocks(pipe).BLOCKS:
        for block in getattr(pipe.transformer, name):
            block.compile(fullgraph=True, dynamic=True, backend=lambda graph, _: counted.append(graph) or graph.forward)
    numbers = []
    for prompt in ("a", LONG, "a red circle"):
        picture(pipe, output_type="latent", steps=1, prompt=prompt)
        numbers.append(len(counted))
    torch._dynamo.reset()
    assert numbers[1] == numbers[2] <= 6


@pytest.mark.parametrize("more", [(), (RewriteBlocks(),)])
def test_steps_of_a_transformer_that_returns_a_tensor_are_forecast(more: tuple[Transform, ...]) -> None:
    pipe, seen = tiny_own_newbie(), list[int]()
    call: dict[str, Any] = {"steps": 20, "guidance_scale": 4.0, "output_type": "latent"}
    expected = picture(pipe, **call)
    ernie_accel.optimize(pipe, *more, CacheSteps())
    pipe.transformer.layers[0].register_forward_pre_hook(lambda block, given: seen.append(len(given[0])))
    got = picture(pipe, **call)
    assert set(seen) == {2}
    assert 2 < len(seen) < 16
    assert sqnr_db(got, expected) > 10


def test_a_pipeline_without_encode_prompt_cannot_have_its_prompts_cut() -> None:
    (reason,) = TruncatePrompts(8).unsupported(tiny_own_newbie(), Context("cpu", "a test"))
    assert reason == "NewbiePipeline has no encode_prompt that could be given shorter prompts"


def test_what_a_step_needs_is_worked_out_from_arguments_of_its_own() -> None:
    pipe = tiny_own_newbie()
    make = inputs_of(family_of(pipe))
    assert make is not None
    given = make(pipe.transformer, 2, 64, 64, 5)
    assert set(given) == set(arguments())
    assert (
        {name: given[name].shape[1:] for name in ("x", "clip_text_pooled")}
        == {  # type: ignore[attr-defined]
            name: arguments()[name].shape[1:] for name in ("x", "clip_text_pooled")
        }
    )
    with torch.no_grad():
        assert pipe.transformer(**given).shape == (2, 4, 8, 8)


# ---- precision and adapters ------------------------------------------------------------------------------------------


def test_quantizing_takes_the_layers_of_blocks_that_see_the_image() -> None:
    for transform in (Quantize("fp8"), FuseKernels("fp8")):
        pipe = tiny_own_newbie()
        pipe.transformer.to(torch.bfloat16)
        first = (RewriteBlocks(),) if isinstance(transform, FuseKernels) else ()
        machine = replace(H200, versions={**H200.versions, "torchao": "0.14"})
        plan = ernie_accel.plan(pipe, *first, transform, context=machine)
        assert plan.ok, str(plan)
        planned = plan.steps[-1].planned
        assert planned is not None
        layers = ("attention.qkv", "attention.out", "feed_forward.w2")
        fused = ("feed_forward.w13",) if first else ("feed_forward.w1", "feed_forward.w3")
        expected = {
            f"{block}.{layer}" for block in ("layers.0", "layers.1", "noise_refiner.0") for layer in (*layers, *fused)
        }
        found = {
            name.removeprefix("transformer.").removesuffix(".weight")
            for name, weight in planned.weights.items()
            if name.startswith("transformer.") and weight.stored_as is not None
        }
        assert found == expected


def adapted(transformer: Any, *layers: str) -> None:
    """Put PEFT's layers on the module itself, which loads none by itself."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(5)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(layers), init_lora_weights=False), transformer)
    randomize_adapters(transformer)


def randomize_adapters(transformer: Any) -> None:
    for path, part in transformer.named_modules():
        if path.endswith(("lora_A.default", "lora_B.default")):
            randomize(part, seed=sum(map(ord, path)), std=0.2)
            part.to(transformer.dtype)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lora_counts_whether_it_comes_before_or_after(when: str) -> None:
    layers = ("qkv", "out", "w2") if when == "after" else ("qkv", "out", "w1", "w2")
    given, pipe, stock = arguments(), tiny_own_newbie(), tiny_own_newbie()
    with torch.no_grad():
        plain = stock.transformer(**given)
        adapted(stock.transformer, *layers)
        expected = stock.transformer(**given)
        assert not torch.equal(expected, plain)
        if when == "before":
            adapted(pipe.transformer, *layers)
        ernie_accel.optimize(pipe, RewriteBlocks())
        if when == "after":
            adapted(pipe.transformer, *layers)
        assert torch.equal(pipe.transformer(**given), expected)
        ernie_accel.restore(pipe)
        assert torch.equal(pipe.transformer(**given), expected)


def test_nothing_loads_adapters_on_a_module_that_does_not() -> None:
    pipe = ernie_accel.optimize(tiny_own_newbie(), RewriteBlocks())
    assert not hasattr(pipe.transformer, "load_lora_adapter")
    assert not hasattr(pipe.transformer, "add_adapter")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_lora_that_is_there_already_goes_onto_the_kernels(precision: str) -> None:
    given, pipe = arguments(dtype=torch.bfloat16), tiny_own_newbie()
    pipe.transformer.to(torch.bfloat16)
    with torch.no_grad():
        plain = pipe.transformer(**given)
        adapted(pipe.transformer, "qkv", "out", "w1", "w2")
        expected = pipe.transformer(**given)
        ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels(precision), context=H200)
        got = pipe.transformer(**given)
        assert sqnr_db(got, expected) > 10 > sqnr_db(plain, expected)
        assert any(isinstance(part, Fp8Linear) for part in pipe.transformer.modules()) == (precision == "fp8")
        ernie_accel.restore(pipe)
        assert torch.equal(pipe.transformer(**given), expected)
