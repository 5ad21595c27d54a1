"""`FuseKernels`: what it needs, what it changes and takes back; the numbers are those of the plain-torch twins here."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

import ernie_accel
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.undo import Undo
from ernie_accel.kernels import cudnn_attention, ops
from ernie_accel.kernels.linear import Fp8Linear
from ernie_accel.models.ernie_image import kernels
from ernie_accel.models.ernie_image.blocks import RewrittenAttention
from tests.pipelines import after, picture, tiny_ernie, tiny_flux

H200 = ernie_accel.Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6"})
VERSIONS = {"triton": "3.6", "cudnn": "1.32", "cache_dit": "1.5.3"}
WITH_CUDNN = ernie_accel.Context("cuda", "NVIDIA H200", (9, 0), versions={"triton": "3.6", "cudnn": "1.32"})


def sqnr_db(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (got - expected).norm()))


def latents(pipe: Any, **kwargs: Any) -> torch.Tensor:
    return picture(pipe, output_type="latent", **kwargs)


def fused(pipe: Any, precision: str = "fp8", **kwargs: Any) -> Any:
    return ernie_accel.optimize(
        pipe, ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels(precision, **kwargs), context=H200
    )


def count_gated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have products gate within, as on a Hopper card; return a list that grows by whether each gates by SiLU."""
    monkeypatch.setattr(ops, "gates_in_product", lambda x: True)
    counted, given = list[bool](), ops.gated_linear_fp8
    monkeypatch.setattr(ops, "gated_linear_fp8", lambda *a: (counted.append(a[4]), given(*a))[1])
    return counted


def test_gating_within_the_product_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fused(tiny_ernie(dtype=torch.bfloat16, layers=3))
    expected = latents(pipe)
    counted = count_gated(monkeypatch)
    assert torch.equal(latents(pipe), expected)
    assert len(counted) > 0
    assert not any(counted)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize(
    "call", [{}, {"prompt": ["a red circle on blue", "a"]}, {"guidance_scale": 4.0}], ids=["plain", "padded", "guided"]
)
def test_pictures_keep_the_promised_floor(precision: str, call: dict[str, Any]) -> None:
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=3)
    expected = latents(pipe, **call)
    got = latents(fused(pipe, precision), **call)
    floor = ernie_accel.FuseKernels(precision).floor_db
    assert floor is not None
    assert sqnr_db(got, expected) > floor
    assert not torch.equal(got, expected)
    assert torch.equal(latents(ernie_accel.restore(pipe), **call), expected)


def test_fp8_halves_the_blocks_and_leaves_the_first_one_precise() -> None:
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=3)
    before = pipe_bytes(pipe)
    plan = ernie_accel.plan(pipe, ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels("fp8"), context=H200)
    fused(pipe)
    first, second, _ = pipe.transformer.layers
    assert type(second.self_attention.to_qkv).__name__ == "Fp8Linear"
    assert type(second.mlp.linear_fc2).__name__ == "Fp8Linear"
    assert type(first.self_attention.to_qkv).__name__ == "FusedLinear"
    assert type(first.self_attention.to_out[0]).__name__ == "Linear"
    assert type(first.mlp.gate_up_proj).__name__ == "FusedLinear"
    assert type(first.mlp.linear_fc2).__name__ == "Fp8Linear"
    assert pipe_bytes(pipe) < before
    assert plan.steps[1].preview is not None
    assert plan.steps[1].planned.nbytes == pipe_bytes(pipe)


def test_optimizing_twice_changes_nothing() -> None:
    pipe = fused(tiny_ernie(dtype=torch.bfloat16))
    block = pipe.transformer.layers[1]
    assert fused(pipe).transformer.layers[1] is block
    assert ernie_accel.FuseKernels("fp8").preview(pipe, H200).changes == ()


def test_without_originals_there_is_no_way_back() -> None:
    pipe = fused(tiny_ernie(dtype=torch.bfloat16), keep_originals=False)
    with pytest.raises(ernie_accel.RestoreError, match="the weights are gone"):
        ernie_accel.restore(pipe)


def test_it_compiles_to_one_graph_for_all_prompt_lengths_but_the_precise_first_block() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []
    pipe = fused(tiny_ernie(dtype=torch.bfloat16, layers=4))
    pipe.transformer.compile_repeated_blocks(
        fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    with torch.no_grad():
        for length in (9, 1, 300, 512, 2):
            pipe.transformer(
                torch.randn(1, 16, 4, 4, dtype=torch.bfloat16),
                torch.full((1,), 500.0),
                torch.randn(1, length, 64, dtype=torch.bfloat16),
                torch.tensor([length]),
            )
    torch._dynamo.reset()
    assert len(graphs) == 2


def test_what_is_missing_is_said() -> None:
    fuse, pipe = ernie_accel.FuseKernels("fp8"), tiny_ernie()
    a100 = ernie_accel.Context("cuda", "NVIDIA A100", (8, 0))
    reasons = "\n".join(fuse.unsupported(pipe, a100))
    for words in ("capability >= 8.9; this device has 8.0", "triton is not installed", "add RewriteBlocks", "bfloat16"):
        assert words in reasons
    assert "no fused kernels for FluxPipeline" in fuse.unsupported(tiny_flux(), H200)[0]
    planned = after(H200, pipe, ernie_accel.CastDtype("bf16"), ernie_accel.RewriteBlocks(fuse=False))
    assert fuse.unsupported(pipe, planned) == [
        "the linear layers of the rewritten blocks stand apart: use RewriteBlocks(), with fuse=True"
    ]
    with pytest.raises(ernie_accel.UnknownNameError):
        ernie_accel.FuseKernels("fp4")
    with pytest.raises(ernie_accel.ConflictError):
        ernie_accel.plan(pipe, fuse, ernie_accel.Quantize("fp8"))


def test_bf16_kernels_do_nothing_where_they_cannot_run_and_compile_does_nothing_where_they_do() -> None:
    pipe = tiny_ernie()
    assert "no CUDA (cpu)" in ernie_accel.FuseKernels("bf16").preview(pipe, ernie_accel.Context("cpu", "a test")).note
    verdicts = {
        device.device: {type(step.transform).__name__: step.verdict for step in plan.steps}
        for device in (H200, ernie_accel.Context("cpu", "a test"))
        for plan in [ernie_accel.plan(pipe, preset="turbo-bf16", context=device)]
    }
    assert (verdicts["cuda"]["FuseKernels"], verdicts["cuda"]["Compile"]) == ("apply", "nothing to do")
    assert (verdicts["cpu"]["FuseKernels"], verdicts["cpu"]["Compile"]) == ("nothing to do", "apply")


PROMPTS = pytest.mark.parametrize(
    "prompt", ["a red circle on blue", ["a red circle on blue", "a"]], ids=["plain", "padded"]
)


@PROMPTS
def test_fp8_attention_keeps_the_floor_where_prompts_are_padded_too(prompt: Any) -> None:
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=3)
    expected = latents(pipe, prompt=prompt)
    bf16_attention = latents(fused(pipe), prompt=prompt)
    ernie_accel.restore(pipe)
    transforms = (ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels("fp8"))
    assert "attention in fp8 by the lengths of prompts" in str(ernie_accel.plan(pipe, *transforms, context=WITH_CUDNN))
    got = latents(ernie_accel.optimize(pipe, *transforms, context=WITH_CUDNN), prompt=prompt)
    assert sqnr_db(got, expected) > 10
    assert not torch.equal(got, bf16_attention)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count by what blocks attend: "attention" and "attention_fp8" by lengths, "torch" and "torch, mask" not."""
    seen: Counter[str] = Counter()

    def counting(name: str) -> None:
        attend = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *arguments: seen.update([name]) or attend(*arguments))

    counting("attention")
    counting("attention_fp8")
    attend = RewrittenAttention.attend

    def torchs(self: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        seen["torch" if mask is None else "torch, mask"] += 1
        return attend(self, q, k, v, mask)

    monkeypatch.setattr(RewrittenAttention, "attend", torchs)
    return seen


@PROMPTS
def test_all_blocks_but_the_precise_one_attend_in_fp8_and_none_with_a_mask(prompt: Any, attended: Any) -> None:
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=4)
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels("fp8"), context=WITH_CUDNN)
    latents(pipe, prompt=prompt, steps=2)
    assert attended == {"attention": 2, "attention_fp8": 6}


@pytest.mark.parametrize("backend", ["forecast", "diffusers", "cache-dit"])
def test_a_cache_of_steps_leaves_the_attention_as_it_is(backend: str, attended: Any) -> None:
    """Those of blocks put others in the place of the blocks while a forward lasts."""
    pipe, context = tiny_ernie(dtype=torch.bfloat16, layers=4), replace(WITH_CUDNN, versions=VERSIONS)
    transforms = (ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels("fp8"), ernie_accel.CacheSteps(backend=backend))
    latents(ernie_accel.optimize(pipe, *transforms, context=context), steps=30)
    assert set(attended) == {"attention", "attention_fp8"}
    assert attended["attention_fp8"] >= attended["attention"] >= 15


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("by", ["for the model", "for the process"])
def test_a_chosen_backend_gets_no_mask_where_nothing_pads(precision: str, by: str, attended: Any) -> None:
    """Flash kernels refuse one."""
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=4)
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels(precision), context=WITH_CUDNN)
    if by == "for the model":
        for layer in pipe.transformer.layers:
            layer.self_attention.processor._attention_backend = "_native_math"
        latents(pipe, steps=1)
    else:
        with attention_backend("_native_math"):
            latents(pipe, steps=1)
    assert attended == ({"torch": 1, "attention_fp8": 3} if precision == "fp8" else {"torch": 4})


@PROMPTS
def test_bf16_attention_by_lengths_only_rounds(prompt: Any) -> None:
    """In float32, which the transform itself refuses: so what padding does cannot hide behind rounding."""
    pipe = tiny_ernie(layers=3)
    expected = latents(pipe, prompt=prompt)
    kernels.install(ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks()).transformer, Undo(), "bf16")
    assert sqnr_db(latents(pipe, prompt=prompt), expected) > 100


def tokens_seen(pipe: Any, **call: Any) -> set[int]:
    """Return how many tokens the last block gets."""
    seen = set()
    hook = pipe.transformer.layers[-1].register_forward_pre_hook(lambda block, given: seen.add(given[0].shape[1]))
    latents(pipe, **call)
    hook.remove()
    return seen


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_with_cudnn_few_numbers_of_tokens_are_made_of_many(precision: str) -> None:
    pipe, prompts = tiny_ernie(dtype=torch.bfloat16, layers=3), ("a", "a red circle on blue", "a red circle")
    transforms = (ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels(precision))
    ernie_accel.optimize(pipe, *transforms, context=WITH_CUDNN)
    assert {t for prompt in prompts for t in tokens_seen(pipe, prompt=prompt)} == {kernels.TOKENS_MULTIPLE_OF}
    ernie_accel.optimize(ernie_accel.restore(pipe), ernie_accel.RewriteBlocks())
    assert len({t for prompt in prompts for t in tokens_seen(pipe, prompt=prompt)}) == 3
    ernie_accel.optimize(pipe, *transforms, context=H200)
    assert len({t for prompt in prompts for t in tokens_seen(pipe, prompt=prompt)}) == 3


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Collect whether attention gets lengths."""
    seen: set[bool] = set()

    def noting(attend: Any, at: int) -> Any:
        def attend_and_note(*arguments: Any) -> Any:
            seen.add(arguments[at] is not None)
            return attend(*arguments)

        return attend_and_note

    for name, at in (("attention", 3), ("attention_fp8", 4)):
        monkeypatch.setattr(ops, name, noting(getattr(ops, name), at))
    return seen


def prediction(pipe: Any, tokens: int, *lengths: int) -> torch.Tensor:
    """Return the transformer's prediction for 32 image tokens and `tokens` of text a row, of which `lengths` count."""
    rows, config, generator = len(lengths), pipe.transformer.config, torch.Generator().manual_seed(0)
    image = torch.randn(rows, config.in_channels, 4, 8, generator=generator)
    text = torch.randn(rows, tokens, config.text_in_dim, generator=generator)
    image, text, time = (x.to(pipe.transformer.dtype) for x in (image, text, torch.full((rows,), 0.5)))
    out: torch.Tensor = pipe.transformer(image, time, text, torch.tensor(lengths), return_dict=False)[0]
    return out


NOTHING_PADDED = [(32, (32,)), (32, (32, 32)), (96, (96,))]
PADDED = [(31, (31,)), (32, (31, 32)), (32, (20,)), (33, (33, 33)), (32, (31, 31))]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize(("tokens", "lengths"), NOTHING_PADDED + PADDED)
def test_attention_in_bf16_gets_lengths_only_where_something_is_padded(
    precision: str, tokens: int, lengths: tuple[int, ...], told: set[bool]
) -> None:
    """There it takes longer with them; in fp8 it does not, and one plan is enough."""
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=3)
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels(precision), context=WITH_CUDNN)
    prediction(pipe, tokens, *lengths)
    assert told == {precision == "fp8" or (tokens, lengths) in PADDED}


@pytest.mark.parametrize("on_kernels", [3, 2], ids=["all blocks", "all but one"])
@pytest.mark.parametrize(("tokens", "lengths"), NOTHING_PADDED + PADDED)
def test_predictions_only_round_whatever_is_padded(on_kernels: int, tokens: int, lengths: tuple[int, ...]) -> None:
    """In float32, which the transform itself refuses."""
    pipe = tiny_ernie(layers=3)
    expected = prediction(pipe, tokens, *lengths)
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks())
    for block in pipe.transformer.layers[on_kernels:]:
        block.self_attention.split()
    assert len(kernels.install(pipe.transformer, Undo(), "bf16")) == 3 - on_kernels
    assert sqnr_db(prediction(pipe, tokens, *lengths), expected) > 100


def test_an_attention_backend_that_was_chosen_is_used_and_gets_no_padding() -> None:
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=3)
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels("bf16"), context=WITH_CUDNN)
    by_length = latents(pipe)
    for backend in ("_native_math", "native"):
        pipe.transformer.set_attention_backend(backend)
        assert tokens_seen(pipe) != {kernels.TOKENS_MULTIPLE_OF}
        assert not torch.equal(latents(pipe), by_length)
    pipe.transformer.reset_attention_backend()
    assert tokens_seen(pipe) == {kernels.TOKENS_MULTIPLE_OF}
    assert torch.equal(latents(pipe), by_length)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_automatic_attention_leaves_it_to_kernels_that_call_cudnn(precision: str) -> None:
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=3)
    auto, fuse = ernie_accel.SetAttention(), ernie_accel.FuseKernels(precision)
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), fuse, auto, context=WITH_CUDNN)
    assert tokens_seen(pipe) == {kernels.TOKENS_MULTIPLE_OF}
    assert auto.preview(pipe, WITH_CUDNN).changes == ()  # nor where they are in place
    assert auto.explain(pipe, WITH_CUDNN).startswith("SetAttention() chooses none on cuda (NVIDIA H200, ")

    ernie_accel.restore(pipe)
    ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(), fuse, auto, context=H200)  # without the extra it chooses
    assert auto.explain(pipe, H200).startswith("SetAttention() takes 'cudnn' on cuda")


def test_automatic_attention_chooses_where_another_model_has_changed_the_default() -> None:
    pipe, auto = tiny_ernie(dtype=torch.bfloat16, layers=3), ernie_accel.SetAttention()
    transforms = ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels("bf16")
    with attention_backend("_native_math"):
        assert len(auto.preview(pipe, after(WITH_CUDNN, pipe, *transforms)).changes) == 3
    assert auto.preview(pipe, after(WITH_CUDNN, pipe, *transforms)).changes == ()
    pipe.transformer.layers[0].self_attention.processor._attention_backend = "_native_math"
    assert len(auto.preview(pipe, after(WITH_CUDNN, pipe, *transforms)).changes) == 3


def test_torchs_attention_by_name_takes_the_place_of_cudnns_own(attended: Any) -> None:
    pipe, native = tiny_ernie(dtype=torch.bfloat16, layers=3), ernie_accel.SetAttention("native")
    transforms = ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels("bf16"), native
    assert len(ernie_accel.plan(pipe, *transforms, context=WITH_CUDNN).steps[-1].preview.changes) == 3
    latents(ernie_accel.optimize(pipe, *transforms, context=WITH_CUDNN), steps=1)
    assert attended == {"torch": 3}


def test_what_cudnn_cannot_plan_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotSupportedError(Exception):
        pass

    def refuse() -> None:
        raise NotSupportedError("no engine")

    cudnn = MagicMock(cudnnGraphNotSupportedError=NotSupportedError)
    graph = cudnn.pygraph.return_value
    graph.sdpa.return_value, graph.check_support = (MagicMock(), None), refuse
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    x, lengths = torch.zeros(2, 64, 3, 24, dtype=torch.bfloat16), torch.tensor([64, 60], dtype=torch.int32)
    expected = r"no attention for 2 x 64 tokens and 3 heads of 24 in bfloat16: no engine\. .*SetAttention\('native'\)"
    with pytest.raises(ernie_accel.ErnieAccelError, match=expected):
        cudnn_attention.attention(x, x, x, lengths)


def test_the_choice_of_attention_is_said() -> None:
    pipe = tiny_ernie(dtype=torch.bfloat16)
    rewritten = after(H200, pipe, ernie_accel.RewriteBlocks())
    assert "ernie-accel[cudnn]" in ernie_accel.FuseKernels("fp8").preview(pipe, rewritten).note
    assert ernie_accel.FuseKernels("fp8", attention="bf16").preview(pipe, rewritten).note == "attention in bf16"
    bf16 = ernie_accel.FuseKernels("bf16")
    assert "planned anew for each prompt length: cudnn is not installed" in bf16.preview(pipe, rewritten).note
    with_cudnn = after(WITH_CUDNN, pipe, ernie_accel.RewriteBlocks())
    assert (
        bf16.preview(pipe, with_cudnn).note == "attention in bf16 by the lengths of prompts where no backend is chosen"
    )
    assert bf16.preview(pipe, replace(rewritten, capability=(8, 9))).note == ""
    assert "cudnn" in ernie_accel.FuseKernels("fp8", attention="fp8").unsupported(pipe, rewritten)[0]
    with pytest.raises(ernie_accel.UnknownNameError):
        ernie_accel.FuseKernels("fp8", attention="int8")


def test_asking_again_for_what_keeps_no_originals_changes_nothing_and_more_can_be_added() -> None:
    """It sets attributes that `RewriteBlocks` had set; without an undo of its own this must still be known."""
    pipe = tiny_ernie(dtype=torch.bfloat16)
    wanted = (ernie_accel.RewriteBlocks(), ernie_accel.FuseKernels("fp8", attention="bf16", keep_originals=False))
    ernie_accel.optimize(pipe, *wanted, context=H200)
    first = ernie_accel.report(pipe)
    ernie_accel.optimize(pipe, *wanted, context=H200)
    assert ernie_accel.report(pipe).entries == first.entries
    ernie_accel.optimize(pipe, *wanted, ernie_accel.KeepTimestepsOnHost(), context=H200)
    assert ernie_accel.report(pipe).entries[:2] == first.entries


def test_a_layer_of_a_model_without_weights_is_what_one_with_weights_is():
    weight = torch.randn(32, 48, dtype=torch.bfloat16)
    real, empty = Fp8Linear(weight), Fp8Linear(weight.to("meta"))
    kinds = [
        [(name, buffer.shape, buffer.stride(), buffer.dtype) for name, buffer in each.named_buffers()]
        for each in (real, empty)
    ]
    assert kinds[0] == kinds[1]
    assert {buffer.device.type for buffer in empty.buffers()} == {"meta"}
