"""`FuseKernels` on Z-Image and Lumina 2; the numbers are those of the plain-torch twins here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import Context, FuseKernels, RewriteBlocks
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.undo import Undo
from ernie_accel.kernels import ops
from ernie_accel.kernels.linear import Fp8Linear
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.models.rewritten import kernels_of, rewritten_blocks
from tests.pipelines import picture
from tests.test_fuse_kernels import count_gated, sqnr_db
from tests.test_graphs import Recorder
from tests.test_rewrite_next_dit import CALLS, FAMILIES, LONG, latents, made, step

H200 = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6"})
WITH_CUDNN = Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})

every_family = pytest.mark.parametrize("name", FAMILIES)


def fused(pipe: Any, precision: str = "fp8", context: Context = WITH_CUDNN, **kwargs: Any) -> Any:
    return ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels(precision, **kwargs), context=context)


@every_family
@pytest.mark.parametrize(
    ("precision", "context", "call"),
    [
        ("bf16", H200, "plain"),
        ("bf16", WITH_CUDNN, "unequal"),
        ("fp8", H200, "guided"),
        ("fp8", WITH_CUDNN, "plain"),
        ("fp8", WITH_CUDNN, "unequal"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "cuDNN" if value is WITH_CUDNN else "torch",
)
def test_pictures_keep_the_promised_floor(name: str, precision: str, context: Context, call: str) -> None:
    pipe = made(name, torch.bfloat16)
    expected = latents(pipe, **CALLS[call])
    got = latents(fused(pipe, precision, context), **CALLS[call])
    floor = FuseKernels(precision).floor_db
    assert floor is not None
    assert sqnr_db(got, expected) > floor
    assert not torch.equal(got, expected)
    assert torch.equal(latents(ernie_accel.restore(pipe), **CALLS[call]), expected)


@every_family
def test_gating_within_the_product_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fused(made(name, torch.bfloat16))
    expected = latents(pipe, **CALLS["plain"])
    counted = count_gated(monkeypatch)
    assert torch.equal(latents(pipe, **CALLS["plain"]), expected)
    assert len(counted) > 0
    assert all(counted)


@every_family
@pytest.mark.parametrize("call", ["plain", "unequal", "odd size"])
@pytest.mark.parametrize("attention", [None, "bf16"])
def test_kernels_only_round(name: str, call: str, attention: str | None) -> None:
    """In float32, which the transform itself refuses: so what padding does cannot hide behind rounding."""
    pipe = made(name)
    expected = latents(pipe, **CALLS[call])
    ernie_accel.optimize(pipe, RewriteBlocks())
    assert kernels_of(pipe).install(pipe.transformer, Undo(), attention) == {}
    assert sqnr_db(latents(pipe, **CALLS[call]), expected) > 95


@every_family
def test_fp8_halves_the_blocks_and_leaves_what_is_sensitive_precise(name: str) -> None:
    pipe = made(name, torch.bfloat16)
    before = pipe_bytes(pipe)
    plan = ernie_accel.plan(pipe, RewriteBlocks(), FuseKernels("fp8"), context=WITH_CUDNN)
    assert "attention in fp8 by the lengths of prompts" in str(plan)
    fused(pipe)
    in_fp8 = {path for path, layer in pipe.transformer.named_modules() if isinstance(layer, Fp8Linear)}
    for layer in rewritten_blocks(pipe).FUSED_LAYERS:
        assert f"layers.0.{layer}" in in_fp8
    assert {path.split(".")[0] for path in in_fp8} == {"noise_refiner", "layers"}
    assert not [path for path in in_fp8 if "odulation" in path or "norm" in path]
    assert plan.steps[1].planned is not None
    assert plan.steps[1].planned.nbytes == pipe_bytes(pipe) < before
    assert FuseKernels("fp8").preview(pipe, WITH_CUDNN).changes == ()


@every_family
def test_who_attends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Main blocks and what refines noise in fp8, what refines the prompt in bf16, and nobody with a mask."""
    seen: list[tuple[str, bool]] = []
    for kind, at in (("attention", 3), ("attention_fp8", 4)):  # where each takes lengths
        attend = getattr(ops, kind)
        monkeypatch.setattr(ops, kind, lambda *a, k=kind, at=at, f=attend: seen.append((k, a[at] is not None)) or f(*a))
    pipe = fused(made(name, torch.bfloat16))
    with torch.no_grad():
        forward(pipe, name, (40,))
    assert sorted(seen[:2]) == [("attention", True), ("attention_fp8", False)]
    assert seen[2:] == [("attention_fp8", True)] * 2


def forward(pipe: Any, name: str, tokens: tuple[int, ...]) -> torch.Tensor:
    """Return the transformer's prediction for prompts of so many tokens."""
    dtype, generator = pipe.transformer.dtype, torch.Generator().manual_seed(1)
    if name != "z_image":
        mask = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
        text = torch.randn(*mask.shape, 32, generator=generator).to(dtype)
        noise = torch.randn(len(tokens), 4, 8, 8, generator=generator).to(dtype)
        out = pipe.transformer(noise, torch.full((len(tokens),), 0.3, dtype=dtype), text, mask.long())
        found: torch.Tensor = out if isinstance(out, torch.Tensor) else out.sample
        return found
    x, t, captions = step((8,) * len(tokens), tokens)
    arguments = ([each.to(dtype) for each in x], t.to(dtype), [each.to(dtype) for each in captions])
    return torch.stack(pipe.transformer(*arguments, return_dict=False)[0])


@every_family
def test_64_prompt_lengths_make_one_shape(name: str) -> None:
    """So nothing is planned, compiled or captured anew."""
    pipe, recorder, shapes = fused(made(name, torch.bfloat16)), Recorder(), set()
    hook = pipe.transformer.layers[0].register_forward_pre_hook(lambda block, given: shapes.add(given[0].shape))
    with torch.no_grad():
        for tokens in range(1, 65):
            forward(pipe, name, (tokens,))
        assert len(shapes) <= 2
        hook.remove()
        pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, recorder)
        for tokens in range(1, 33):
            for _ in range(2):
                got = forward(pipe, name, (tokens,))
    assert recorder.captures == 1
    assert torch.isfinite(got).all()


@every_family
def test_graphs_of_padded_prompts_draw_what_is_drawn_without(name: str) -> None:
    prompts = ("a", LONG, "a red circle on blue", "a")
    pipe, recorder = fused(made(name, torch.bfloat16), "bf16"), Recorder()
    expected = [picture(pipe, steps=4, prompt=prompt) for prompt in prompts]
    pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, recorder)
    got = [picture(pipe, steps=4, prompt=prompt) for prompt in prompts]
    assert all((g - e).norm() < 0.02 * e.norm() for g, e in zip(got, expected, strict=True))
    assert recorder.captures < len(prompts)


@every_family
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_blocks_in_a_chain_compute_what_each_alone_does(name: str, precision: str) -> None:
    """A hook on one of them, which does nothing, breaks the chain."""
    pipe = fused(made(name, torch.bfloat16), precision)
    with torch.no_grad():
        chained = forward(pipe, name, (40, 3))
        hooks = [block.register_forward_hook(lambda *given: None) for block in pipe.transformer.layers]
        assert torch.equal(forward(pipe, name, (40, 3)), chained)
        for hook in hooks:
            hook.remove()
        seen: list[int] = []
        pipe.transformer.layers[1].register_forward_hook(lambda *given: seen.append(1))
        forward(pipe, name, (40, 3))
    assert seen == [1]


def test_pictures_of_several_sizes_and_a_controlnet_run_on_the_kernels_too() -> None:
    pipe = made("z_image")
    mixed, control = step((8, 4), (5, 40)), {1: torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(2))}
    expected = pipe.transformer(*mixed).sample
    controlled = pipe.transformer(*step(), controlnet_block_samples=control).sample[0]
    ernie_accel.optimize(pipe, RewriteBlocks())
    kernels_of(pipe).install(pipe.transformer, Undo(), "bf16")
    for got, want in zip(pipe.transformer(*mixed).sample, expected, strict=True):
        assert sqnr_db(got, want) > 95
    assert sqnr_db(pipe.transformer(*step(), controlnet_block_samples=control).sample[0], controlled) > 95
